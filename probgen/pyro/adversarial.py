"""Losses that compare draws of a program with data through a critic, or with each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from probgen.adversarial.settings import Adversary, Information, Pair
from probgen.arrays import rows_sum, spread
from probgen.errors import ProbgenError
from probgen.program import Player, Program, rows_of
from probgen.pyro.loss import Loss
from probgen.pyro.trace import bound, forked, rows_factor

Model = Callable[..., Any]
Seen = tuple[Tensor, ...]


@dataclass(frozen=True, repr=False)
class Adversarial(Adversary, Loss):
    r"""Two players: a critic tells data from draws of the unconditioned program, and the program fools it.

    .. math::
        \text{real: data and draws of the guide,} \quad (x, z), \ z \sim q(z \mid x); \qquad
        \text{fake: } (x, z) \sim p(x, z)

    `sites` are what the critic sees, one argument each: ("x",) a GAN, ("x", "y") a conditional one, ("x", "z") ALI, ("z",) an
    adversarial autoencoder. One step updates the critic `critic_steps` times and then the program once, every time on a
    fresh batch; neither's gradient reaches the other. Terms: the critic's mean logits of real and fake rows, and how often it
    is right.

    Parameters
    ----------
    critic
        What gives one logit for each row: a module, a function of the arrays seen that uses `pyro.module`, or a function of
        `spec` that builds either.
    sites
        Of the trace, or arrays that are given.
    objective
        "minimax", "non-saturating", "least-squares", "hinge", "wasserstein", "relativistic", or an `Objective`.
    penalties
        Any of `GradientPenalty`, `R1`, `R2`, `OrthogonalRegularization`, `WeightClip`. Spectral normalisation is the
        network's own: `torch.nn.utils.parametrizations.spectral_norm`.
    critic_steps
        Updates of the critic a step.
    pac
        Rows that the critic judges at once.
    name
        Of the critic's player and parameters, where a sum of losses has several.

    References:
        | Generative adversarial nets (Goodfellow et al., 2014), arXiv:1406.2661;   ALI (Dumoulin et al., 2016), arXiv:1606.00704
        | PacGAN (Lin et al., 2017), arXiv:1712.04086
    """

    def built(self, spec: Mapping[str, Any], seed: int = 0) -> Adversarial:
        """With the critic that a function of `spec` builds, its weights drawn from `seed`."""
        if not self.builds:
            return self
        with forked(seed):
            return replace(self, critic=self.critic(spec))

    def players(self, program: Program) -> dict[str, Player]:
        """The critic, and the program."""
        parts = tuple(part for part in (program.model, program.guide) if part is not None)
        return {
            self.name: Player((self._register(program),), self._tell, self.critic_steps, self.project),
            "program": Player(parts, self._fool),
        }

    # -- the critic ---------------------------------------------------------------------------------------------------

    def _register(self, program: Program) -> Model:
        """What touches the critic's parameters: its module, or the function run on what it sees."""

        def critic(**arrays: Tensor) -> None:
            if isinstance(self.critic, nn.Module):
                pyro.module(self.name, self.critic)
                return
            with poutine.block():
                seen = self._fake(bound(program.model), arrays)
            self.critic(*self._packed(seen))

        return critic

    def _logits(self, seen: Seen) -> Tensor:
        """One number for each packed row, [B / pac]."""
        critic = pyro.module(self.name, self.critic) if isinstance(self.critic, nn.Module) else self.critic
        return self.one_each(critic(*seen), len(seen[0])).to(torch.get_default_dtype())

    def _tell(self, model: Model, guide: Model, **arrays: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's loss; no gradient reaches the program."""
        with torch.no_grad():
            fake, real = (self._packed(_as_float(s)) for s in (self._fake(model, arrays), self._real(guide, arrays)[0]))
        d_real, d_fake = self._logits(real), self._logits(fake)
        own, total = self.losses.critic(d_real, d_fake), self._total(arrays)
        terms = {"real": d_real, "fake": d_fake, "accuracy": (1 + torch.sign(d_real - d_fake)) / 2}
        slopes = [p.of_rows(self._slope(p.where, real, fake)) for p in self.slopes]
        loss = sum(slopes, own)
        if slopes:
            terms["penalty"] = sum(slopes)
        if self.orthogonal:
            loss = loss + sum(p.of_matrix(w) for p in self.orthogonal for w in self._matrices())
        return total(loss), {f"{self.name}_{name}": total(values) for name, values in terms.items()}

    def _slope(self, where: str, real: Seen, fake: Seen) -> Tensor:
        """‖∇d‖² of rows at real or fake ones, or between them, [B / pac]; differentiable by the critic's weights."""
        seen = {"real": real, "fake": fake}.get(where) or self._between(real, fake)
        by = [x.detach().requires_grad_() if x.is_floating_point() else x for x in seen]
        with torch.enable_grad():
            d = self._logits(tuple(by)).sum()
            moving = [x for x in by if x.requires_grad]
            slopes = torch.autograd.grad(d, moving, create_graph=True, allow_unused=True, materialize_grads=True)
        return sum(rows_sum(slope**2) for slope in slopes)

    @staticmethod
    def _between(real: Seen, fake: Seen) -> Seen:
        """A point on the line from each fake row to a real one, ε of the way; labels are those of the real row."""
        place = torch.rand(len(real[0]), dtype=torch.get_default_dtype(), device=real[0].device)
        pairs = zip(real, fake, strict=True)
        return tuple(torch.lerp(y, x, spread(place, x)) if x.is_floating_point() else x for x, y in pairs)

    def _matrices(self) -> list[Tensor]:
        if not isinstance(self.critic, nn.Module):
            raise ProbgenError(
                "Adversarial: OrthogonalRegularization looks at the weights of a module; give `critic` as one"
            )
        return [w.flatten(1) for w in self.critic.parameters() if w.dim() > 1]

    # -- the program --------------------------------------------------------------------------------------------------

    def _fool(self, model: Model, guide: Model, **arrays: Tensor) -> Tensor:
        """The program's loss: gradients go through its draws, and those of its guide."""
        real, moved = self._real(guide, arrays)
        d_fake = self._logits(self._packed(self._fake(model, arrays)))
        looks = moved or self.losses.paired
        d_real = self._logits(self._packed(real)) if looks else torch.zeros_like(d_fake)
        return self._total(arrays)(self.losses.program(d_real, d_fake))

    def _fake(self, model: Model, arrays: Mapping[str, Tensor]) -> Seen:
        """What the critic sees of a draw of the unconditioned program; arrays that are given stay as they are."""
        nodes = poutine.trace(poutine.uncondition(model)).get_trace(**arrays).nodes
        return self.picked(nodes, arrays)

    def _real(self, guide: Model, arrays: Mapping[str, Tensor]) -> tuple[Seen, bool]:
        """What it sees of the data and of the guide's draws, and whether there are any of these."""
        nodes = poutine.trace(guide).get_trace(**arrays).nodes
        return tuple(nodes[n]["value"] if n in nodes else arrays[n] for n in self.sites), self.moved(nodes)

    def _packed(self, seen: Seen) -> Seen:
        return tuple(self.packed(values) for values in seen)

    def _total(self, arrays: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        """Means over rows as nats of all N rows, which is what an engine divides."""
        rows = rows_of(arrays) * rows_factor()
        return lambda values: values.mean() * rows


def _as_float(seen: Seen) -> Seen:
    """Floats in the precision of the run: under autocast a network's draws are in half of it."""
    return tuple(x.to(torch.get_default_dtype()) if x.is_floating_point() else x for x in seen)


@dataclass(frozen=True)
class MutualInformation(Information, Loss):
    """−E[log q(c | x) − log p(c)], (c, x) ~ p: the guide finds the latent c in draws of the model, and the model lets it.

    Minus a lower bound of the mutual information of c and x (InfoGAN, where the guide is Q), which of a discrete c is never
    above its entropy; with all of z in the place of c, the reconstruction of noise of VEEGAN. Draws of x must be reparametrised.

    References:
        | InfoGAN (Chen et al., 2016), arXiv:1606.03657;   VEEGAN (Srivastava et al., 2017), arXiv:1705.07761
    """

    def objective(self, model: Model, guide: Model, **arrays: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Minus the bound, and the bound as a term."""
        drawn = poutine.trace(poutine.uncondition(model)).get_trace(**arrays)
        fake = {name: drawn.nodes[name]["value"] if name in drawn.nodes else value for name, value in arrays.items()}
        found = poutine.trace(poutine.condition(guide, data={self.site: drawn.nodes[self.site]["value"]})).get_trace(
            **fake
        )
        p, q = drawn.nodes[self.site], found.nodes[self.site]
        bound_ = q["fn"].log_prob(q["value"]) - p["fn"].log_prob(p["value"])
        total = bound_.sum() * rows_factor()
        return -total, {f"information_{self.site}": total}


@dataclass(frozen=True)
class L1(Pair, Loss):
    """E Σ |x̃ − y|: a draw x̃ of a site of the unconditioned program, held against the array or the site `to`.

    With `to` the data of the same site, pix2pix's; with the array that a cycle of two networks started from, cycle
    consistency.
    """

    def objective(self, model: Model, guide: Model, **arrays: Tensor) -> Tensor:
        """The summed distance."""
        nodes = poutine.trace(poutine.uncondition(model)).get_trace(**arrays).nodes
        other = arrays[self.other] if self.other in arrays else nodes[self.other]["value"]
        return rows_sum((nodes[self.site]["value"] - other).abs()).sum() * rows_factor()
