"""The binomial chain of bits on plain array operators (Sohl-Dickstein et al., arXiv:1503.03585).

    q(x_t | x_s) = Bernoulli(½ + κ_{t|s} (x_s − ½)),  κ_{t|s} = α_t / α_s:   a bit is kept with probability κ, else tossed
    q(x_s | x_t, x) ∝ q(x_t | x_s) q(x_s | x)                                bit by bit
    p(x_s | x_t) = b̂ q(x_s | x_t, x = 1) + (1 − b̂) q(x_s | x_t, x = 0)      b̂(x_t, t), the network's chance of x = 1

α_t is that of a noise schedule, as bits ±1 have the mean α_t x; with α_t = 1 − t the chain of T steps has the paper's
β_i = 1 / (T − i + 1), the probability that step i tosses. The network says b̂ at every step, as that of a Gaussian chain
may say x̂: each posterior is a function of one bit x, hence linear in it, so that to put b̂ for x is to average over x. At
b̂ = q(x = 1 | x_t) this is q(x_s | x_t) itself for each bit, and no product of bits comes closer to it; no b̂ leads out
of the posteriors' hull; and p(x | x_1) is Bernoulli(b̂).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from probgen.arrays import namespace, rows_sum, spread
from probgen.diffusion.denoiser import refuse_no_steps, time_of_rows
from probgen.diffusion.schedules import NOISE_ENOUGH, LearnedSchedule, NoiseSchedule, RectifiedSchedule
from probgen.errors import ProbgenError

Chances = tuple[Any, Any]  # of one and of zero: the smaller of them would be lost in 1 − the larger


class BitPrediction:
    """What a network said at (x_t, t): the log odds of each bit of the data."""

    def __init__(self, x_t: Any, t: Any, logits: Any) -> None:
        self.x_t, self.t, self.logits = x_t, t, logits

    @property
    def data(self) -> Any:
        """b̂, the chance of one."""
        return self.chances[0]

    @property
    def chances(self) -> Chances:
        """b̂ and 1 − b̂."""
        xp, logits = namespace(self.logits), self.logits
        return xp.exp(-xp.logaddexp(0 * logits, -logits)), xp.exp(-xp.logaddexp(0 * logits, logits))


class BinomialChain:
    """A network, a noise schedule and the chances of bits in the two chains.

    Parameters
    ----------
    network
        (2 x_t − 1 [B, *shape], t [B]) → log odds of the data's bits, [B, *shape].
    schedule
        Whose α_t is the probability κ_t that a bit is still that of the data.
    steps
        T: the chain has the times 1/T, 2/T, ..., 1.
    site
        The data site, which bears the name of its array.
    """

    labels = None

    def __init__(
        self,
        network: Callable[[Any, Any], Any],
        schedule: NoiseSchedule | None = None,
        steps: int = 10,
        site: str = "x",
    ) -> None:
        refuse_no_steps(steps)
        self.network, self.schedule, self.steps, self.site = network, schedule or RectifiedSchedule(), steps, site
        _refuse_schedule(self.schedule)

    def __call__(self, x_t: Any, t: Any) -> BitPrediction:
        """What the network says of x_t [B, *shape] at time t, a number or one for each row [B]."""
        logits = self.network(2 * x_t - 1, time_of_rows(x_t, t))
        if tuple(logits.shape) != tuple(x_t.shape):
            raise ProbgenError(
                f"{type(self).__name__}: of x_t {tuple(x_t.shape)} the network gives {tuple(logits.shape)}, and one number "
                "for each bit, its log odds, is needed"
            )
        return BitPrediction(x_t, t, logits)

    def embed(self, x: Any) -> Any:
        """Data as the chain sees them: bits as they are."""
        return x

    def before(self, t: Any, s: Any = None) -> Any:
        """The time one step before t, where no other is given."""
        return t - 1 / self.steps if s is None else s

    def chances(self, x_s: Any, s: Any, t: Any) -> Chances:
        """q(x_t = 1 | x_s) and q(x_t = 0 | x_s), [B, *shape]; s = 0 is the data's time."""
        pull = self.schedule.alpha(t) / self.schedule.alpha(s)
        pull = spread(pull, x_s) * (x_s - 0.5)
        return 0.5 + pull, 0.5 - pull

    def posterior(self, x_t: Any, x: Any, t: Any, s: Any) -> Chances:
        """q(x_s | x_t, x) of one and of zero, [B, *shape]."""
        before, after = self.chances(x, 0.0, s), self.chances(x_t, s, t)  # of x_t it is symmetric in x_s and x_t
        one, zero = before[0] * after[0], before[1] * after[1]
        return one / (one + zero), zero / (one + zero)

    def reversed_chances(self, said: BitPrediction, t: Any, s: Any) -> Chances:
        """p(x_s | x_t) of one and of zero, [B, *shape]."""
        of_one, of_zero = (self.posterior(said.x_t, x + 0 * said.x_t, t, s) for x in (1.0, 0.0))
        b, c = said.chances
        return b * of_one[0] + c * of_zero[0], b * of_one[1] + c * of_zero[1]

    def noised(self, x: Any, t: Any, noise: Any) -> Any:
        """x_t of the data, where `noise` is uniform in 0..1."""
        return namespace(x).where(noise < self.chances(x, 0.0, t)[0], 1 + 0 * x, 0 * x)

    def prior_kl(self, x: Any) -> Any:
        """L_T of each row, [B]."""
        one, zero = self.chances(x, 0.0, 1.0)
        xp = namespace(x)
        return rows_sum(xp.log(2 * one**one) + xp.log(zero**zero))

    def step_kl(self, x: Any, said: BitPrediction, t: Any, s: Any) -> Any:
        """KL(q(x_s | x_t, x) ‖ p(x_s | x_t)) of each row, [B]."""
        return rows_sum(bernoulli_kl(self.posterior(said.x_t, x, t, s), self.reversed_chances(said, t, s)))

    def expected_costs(self) -> np.ndarray:
        """What each step of the chain costs data that are tossed coins, in nats per bit, [T].

        The best b̂ makes p(x_s | x_t) exact, and step i costs what it hides: I(x; x_{i−1}) − I(x; x_i).
        """
        kept = np.asarray(self.schedule.alpha(np.arange(self.steps + 1) / self.steps) / self.schedule.alpha(0.0))
        one, zero = (1 + kept) / 2, (1 - kept) / 2
        return -np.diff(np.log(one**one) + np.log(zero**zero))


def bernoulli_kl(chances: Chances, others: Chances) -> Any:
    """KL of one Bernoulli to another, each by its chances of one and of zero, in nats."""
    xp = namespace(*chances)
    return sum(p * (xp.log(p) - xp.log(r)) for p, r in zip(chances, others, strict=True))


def _refuse_schedule(schedule: NoiseSchedule) -> None:
    """Refuse what does not end in tossed coins, and what is to be learned through draws of bits."""
    if isinstance(schedule, LearnedSchedule):
        raise ProbgenError(
            f"{schedule!r} cannot be learned with bits, whose draws carry no gradient: take a fixed schedule, such as "
            "RectifiedSchedule()"
        )
    left = float(schedule.alpha(1.0) / schedule.alpha(0.0)) ** 2
    if not left <= NOISE_ENOUGH:
        raise ProbgenError(
            f"{schedule!r} does not end in noise: {left:.0%} of the variance of a bit at t = 1 is the data's, and at most "
            f"{NOISE_ENOUGH:.0%} may be, since samples start from tossed coins: let α_t fall further"
        )
