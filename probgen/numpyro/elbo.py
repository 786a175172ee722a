r"""The evidence lower bound and its importance-weighted sibling, with what is known in closed form taken so.

.. math::
    \mathrm{ELBO} = \operatorname{E}_{q(z \mid x)}[\log p(x, z) - \log q(z \mid x)] \le
    \operatorname{E}\Big[\log \tfrac1K \sum_k \frac{p(x, z_k)}{q(z_k \mid x)}\Big] = \mathrm{IWAE}_K \le \log p(x)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from probgen.errors import ProbgenError
from probgen.numpyro import terms
from probgen.numpyro.loss import Loss, Result
from probgen.schedules import Schedule, refuse_other, value_at


class Bound(Loss):
    """A bound with one player, which NumPyro's own `SVI` can use as well."""

    can_infer_discrete = True

    def objective(self, rng_key: jax.Array, params: dict, model: Callable, guide: Callable, **arrays: Any) -> Result:
        """Minus the bound on one batch, its terms, and the modules' new state."""
        return self.loss_with_mutable_state(rng_key, params, model, guide, **arrays)

    def loss(self, rng_key: jax.Array, param_map: dict, model: Callable, guide: Callable, *args: Any, **kw: Any) -> Any:
        """Minus the bound, in nats for all N rows: the protocol of `numpyro.infer.ELBO`."""
        return self.loss_with_mutable_state(rng_key, param_map, model, guide, *args, **kw)["loss"]


@dataclass(frozen=True)
class ELBO(Bound):
    r"""The evidence lower bound, site by site:

    .. math:: \sum_s \operatorname{E}_q[\log p(x_s \mid z)]
              - \beta \sum_s \max\big(\lambda, \mathrm{KL}(q(z_s) \,\|\, p(z_s))\big)

    A KL is taken in closed form (`kl="analytic"`) only where that is exact: the model's distribution of the site
    depends on nothing that the guide draws at or after it. Elsewhere, and with `kl="sampled"`, it is log q − log p at
    the draw. Discrete latents marked ``infer={"enumerate": "parallel"}`` are summed out; draws that are neither
    reparametrised nor enumerated get score-function gradients.

    Args:
        num_particles: draws of the guide that are averaged.
        beta: weight of the KLs, a number or a schedule (Higgins et al., 2017).
        free_bits: nats per datum of each local latent's KL, averaged over the batch, that cost nothing
            (Kingma et al., arXiv:1606.04934); a number or a schedule.
        kl: "analytic" or "sampled".
    """

    num_particles: int = 1
    beta: float | Schedule = 1.0
    free_bits: float | Schedule = 0.0
    kl: Literal["analytic", "sampled"] = "analytic"

    def __post_init__(self) -> None:
        _check_particles(self)
        refuse_other("ELBO", beta=self.beta, free_bits=self.free_bits)
        if self.kl not in ("analytic", "sampled"):
            raise ProbgenError(f'ELBO: `kl` is "analytic" or "sampled", not {self.kl!r}')

    def at(self, step: Any) -> ELBO:
        """The ELBO with beta and free bits as they are at a step."""
        return replace(self, beta=value_at(self.beta, step), free_bits=value_at(self.free_bits, step))

    def loss_with_mutable_state(
        self, rng_key: jax.Array, param_map: dict, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Result:
        """Loss, terms by site (for all N rows, before beta and free bits) and the modules' new state."""
        _refuse_schedules(self, self.beta, self.free_bits)

        def particle(key: jax.Array) -> Result:
            run = terms.run(key, param_map, model, guide, args, kwargs)
            exact = terms.exact_kl(run, model, args, kwargs, param_map) if self.kl == "analytic" else ()
            found = terms.site_terms(run, exact)
            loss = -self._weighted(run, found) - terms.score_function(run, found)
            named = {name: run.scale(name) * term.sum() for name, term in found.items()}
            return {"loss": loss, "terms": named, "mutable_state": dict(run.buffers) or None}

        return _averaged(particle, rng_key, self.num_particles)

    def _weighted(self, run: terms.Run, found: Mapping[str, jax.Array]) -> jax.Array:
        """Σ of the terms, with beta on the latents' and their free bits not counted."""
        bound = jnp.zeros(())
        for name, term in found.items():
            scale = run.scale(name)
            if name in run.observed:
                bound += scale * term.sum()
            elif run.frames(name) and not _is_zero(self.free_bits):
                bound += self.beta * scale * term.size * -jnp.maximum(-term.mean(), self.free_bits)
            else:
                bound += self.beta * scale * term.sum()
        return bound


@dataclass(frozen=True)
class IWAE(Bound):
    r"""The importance-weighted bound :math:`\log \frac1K \sum_k p(x, z_k) / q(z_k \mid x)` of every datum.

    With global latents the rows are not independent: the bound is then that of all data together, which a minibatch
    cannot estimate. Burda, Grosse & Salakhutdinov, arXiv:1509.00519.

    Args:
        num_particles: K.
        alpha: with α ≠ 0 the Rényi bound 1/(1−α) log 1/K Σ_k w_k^{1−α} (Li & Turner, arXiv:1602.02311).
    """

    num_particles: int
    alpha: float = 0.0

    def __post_init__(self) -> None:
        _check_particles(self)
        if self.alpha == 1:
            raise ProbgenError("IWAE: alpha = 1 is the ELBO itself, use ELBO()")

    def loss_with_mutable_state(
        self, rng_key: jax.Array, param_map: dict, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Result:
        """Loss (for all N rows) and the modules' new state."""

        def particle(key: jax.Array) -> tuple[jax.Array, jax.Array, Any, Any]:
            run = terms.run(key, param_map, model, guide, args, kwargs)
            weights = terms.log_weight(run)
            local = all(run.frames(name) for name in weights)
            scales = {name: run.scale(name) for name in weights}
            if not local and any(not _is_one(scale) for scale in scales.values()):
                outside = next(name for name in weights if not run.frames(name))
                raise ProbgenError(
                    f"IWAE bounds all data together where a latent is global ({outside!r}), which a minibatch cannot "
                    "estimate: give batch_size=None, or use ELBO()"
                )
            log_weight = terms.per_datum(run, weights) if local else sum(w.sum() for w in weights.values())
            scale = next(iter(scales.values())) if local else 1.0
            return log_weight, jnp.asarray(scale, float), _draw_score(run), dict(run.buffers) or None

        keys = jax.random.split(rng_key, self.num_particles) if self.num_particles > 1 else rng_key[None]
        log_weights, scale, score, buffers = jax.vmap(particle)(keys)
        power = 1 - self.alpha
        bound = (jax.nn.logsumexp(power * log_weights, axis=0) - jnp.log(self.num_particles)) / power
        surrogate = jax.lax.stop_gradient(bound) * (score - jax.lax.stop_gradient(score)).sum(0)
        loss = -(scale[0] * (bound + surrogate)).sum()
        return {"loss": loss, "terms": {}, "mutable_state": _first(buffers)}


def _draw_score(run: terms.Run) -> jax.Array:
    """log q of the draws that are not reparametrised, whose gradient carries theirs."""
    scores = [
        run.per_row(terms.log_density(run.q[name]), name)
        for name in [*run.latents, *run.auxiliary]
        if not run.q[name]["fn"].has_rsample and not terms.enumerated(run.q[name])
    ]
    return sum(scores, jnp.zeros(()))


def _averaged(particle: Callable[[jax.Array], Result], key: jax.Array, number: int) -> Result:
    """The mean of several particles; buffers are those of the first."""
    if number == 1:
        return particle(key)
    results = jax.vmap(particle)(jax.random.split(key, number))
    mean = jax.tree.map(lambda values: values.mean(0), {k: results[k] for k in ("loss", "terms")})
    return {**mean, "mutable_state": _first(results["mutable_state"])}


def _first(buffers: Any) -> Any:
    return jax.tree.map(lambda values: values[0], buffers)


def _check_particles(loss: Any) -> None:
    if not isinstance(loss.num_particles, int) or loss.num_particles < 1:
        raise ProbgenError(
            f"{type(loss).__name__}: `num_particles` must be a whole number above 0, not {loss.num_particles!r}"
        )


def _refuse_schedules(loss: Any, *values: Any) -> None:
    if any(callable(value) for value in values):
        raise ProbgenError(
            f"{type(loss).__name__} with a schedule needs to know the step, which numpyro.infer.SVI does not say: use "
            "probgen.fit or probgen.numpyro.SVI, or give `loss.at(step)`"
        )


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0


def _is_one(value: Any) -> bool:
    return isinstance(value, int | float) and value == 1
