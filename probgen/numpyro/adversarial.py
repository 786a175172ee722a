"""Losses that compare draws of a program with data through a critic, or with each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.contrib.module import eqx_module, flax_module, nnx_module
from numpyro.handlers import block, condition, seed, substitute, trace, uncondition

from probgen.adversarial.settings import Adversary, Information, Pair
from probgen.arrays import rows_sum, spread
from probgen.errors import ProbgenError
from probgen.numpyro.loss import Loss, Result
from probgen.numpyro.trace import Buffers, bound, log_density, own_containers, rows_factor
from probgen.program import Player, Program, rows_of

Model = Callable[..., Any]
Seen = tuple[jax.Array, ...]
Params = Mapping[str, Any]


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
        What gives one logit for each row: a flax or equinox module, a function of the arrays seen that uses `flax_module`, or
        a function of `spec` that builds either.
    sites
        Of the trace, or arrays that are given.
    objective
        "minimax", "non-saturating", "least-squares", "hinge", "wasserstein", "relativistic", or an `Objective`.
    penalties
        Any of `GradientPenalty`, `R1`, `R2`, `OrthogonalRegularization`, `WeightClip`. Spectral normalisation is the
        network's own: `flax.nnx.SpectralNorm`.
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
        """With the critic that a function of `spec` builds."""
        return replace(self, critic=self.critic(spec)) if self.builds else self

    def players(self, program: Program) -> dict[str, Player]:
        """The critic, and the program."""
        parts = tuple(part for part in (program.model, program.guide) if part is not None)

        def register(**arrays: jax.Array) -> None:
            with block():
                seen = self._fake(jax.random.key(0), {}, bound(program.model), arrays)
            self._run(self._packed(seen))

        register.critic = self.critic  # where what looks for modules finds it
        return {
            self.name: Player((register,), self._tell, self.critic_steps, self.project),
            "program": Player(parts, self._fool),
        }

    # -- the critic ---------------------------------------------------------------------------------------------------

    def _run(self, seen: Seen) -> jax.Array:
        """The critic run as a part of a program: one number for each packed row, [B / pac]."""
        library = {cls.__module__ for cls in type(self.critic).__mro__ if cls.__name__ == "Module"}
        if any(name.startswith("flax.nnx") for name in library):
            critic = nnx_module(self.name, self.critic)
        elif any(name.startswith("equinox") for name in library):
            critic = jax.vmap(eqx_module(self.name, self.critic))
        elif any(name.startswith("flax") for name in library):
            critic = flax_module(self.name, self.critic, *seen, mutable=_collections(self.critic, seen))
        else:
            critic = self.critic
        return self.one_each(critic(*seen), len(seen[0]))

    def _logits(self, key: jax.Array, params: Params, seen: Seen) -> jax.Array:
        """The critic with `params` in its places."""
        return substitute(seed(self._run, key), data=own_containers(params))(seen)

    def _tell(self, key: jax.Array, params: Params, model: Model, guide: Model, **arrays: jax.Array) -> Result:
        """The critic's loss; no gradient reaches the program."""
        keys = jax.random.split(key, 4)
        buffers = Buffers()
        with buffers:
            fake = jax.lax.stop_gradient(self._packed(self._fake(keys[0], params, model, arrays)))
            real = jax.lax.stop_gradient(self._packed(self._real(keys[1], params, guide, arrays)[0]))
            d_real = self._logits(keys[2], params, real)
            d_fake = self._logits(keys[2], {**params, **buffers.held}, fake)
        total = self._total(model, arrays)
        terms = {"real": d_real, "fake": d_fake, "accuracy": (1 + jnp.sign(d_real - d_fake)) / 2}
        slopes = [p.of_rows(self._slope(p.where, keys, params, real, fake)) for p in self.slopes]
        loss = sum(slopes, self.losses.critic(d_real, d_fake))
        if slopes:
            terms["penalty"] = sum(slopes)
        loss = loss + sum(p.of_matrix(w) for p in self.orthogonal for w in self._matrices(params))
        named = {f"{self.name}_{name}": total(values) for name, values in terms.items()}
        return {"loss": total(loss), "terms": named, "mutable_state": buffers.held or None}

    def _slope(self, where: str, keys: jax.Array, params: Params, real: Seen, fake: Seen) -> jax.Array:
        """‖∇d‖² of rows at real or fake ones, or between them, [B / pac]; differentiable by the critic's weights."""
        seen = {"real": real, "fake": fake}.get(where) or self._between(keys[3], real, fake)
        moving = [i for i, x in enumerate(seen) if jnp.issubdtype(x.dtype, jnp.floating)]

        def judged(values: list[jax.Array]) -> jax.Array:
            places = dict(zip(moving, values, strict=True))
            return self._logits(keys[2], params, tuple(places.get(i, x) for i, x in enumerate(seen))).sum()

        slopes = jax.grad(judged)([seen[i] for i in moving])
        return sum(rows_sum(slope**2) for slope in slopes)

    @staticmethod
    def _between(key: jax.Array, real: Seen, fake: Seen) -> Seen:
        """A point on the line from each fake row to a real one, ε of the way; labels are those of the real row."""
        place = jax.random.uniform(key, (len(real[0]),))
        pairs = zip(real, fake, strict=True)
        return tuple(y + spread(place, x) * (x - y) if jnp.issubdtype(x.dtype, jnp.floating) else x for x, y in pairs)

    def _matrices(self, params: Params) -> list[jax.Array]:
        """The critic's weights with two axes or more as [outputs, inputs]: flax keeps the outputs last."""
        own = [value for name, value in params.items() if name == f"{self.name}$params"]
        if not own:
            raise ProbgenError(
                "Adversarial: OrthogonalRegularization looks at the weights of a module; give `critic` as one"
            )
        leaves = [leaf for leaf in jax.tree.leaves(own) if leaf.ndim > 1]
        first = any(
            cls.__module__.startswith("equinox") for cls in type(self.critic).__mro__
        )  # where it keeps the outputs
        return [leaf.reshape(len(leaf), -1) if first else leaf.reshape(-1, leaf.shape[-1]).T for leaf in leaves]

    # -- the program --------------------------------------------------------------------------------------------------

    def _fool(self, key: jax.Array, params: Params, model: Model, guide: Model, **arrays: jax.Array) -> Result:
        """The program's loss: gradients go through its draws, and those of its guide."""
        keys, buffers = jax.random.split(key, 3), Buffers()
        with buffers:
            real, moved = self._real(keys[1], params, guide, arrays)
            d_fake = self._logits(keys[2], params, self._packed(self._fake(keys[0], params, model, arrays)))
            looks = moved or self.losses.paired
            params = {**params, **buffers.held}
            d_real = self._logits(keys[2], params, self._packed(real)) if looks else jnp.zeros_like(d_fake)
        loss = self._total(model, arrays)(self.losses.program(d_real, d_fake))
        return {"loss": loss, "mutable_state": buffers.held or None}

    def _fake(self, key: jax.Array, params: Params, model: Model, arrays: Mapping[str, jax.Array]) -> Seen:
        """What the critic sees of a draw of the unconditioned program; arrays that are given stay as they are."""
        nodes = drawn(key, params, model, arrays)
        return self.picked(nodes, arrays)

    def _real(self, key: jax.Array, params: Params, guide: Model, arrays: Mapping[str, jax.Array]) -> tuple[Seen, bool]:
        """What it sees of the data and of the guide's draws, and whether there are any of these."""
        nodes = trace(substitute(seed(guide, key), data=own_containers(params))).get_trace(**arrays)
        return tuple(nodes[n]["value"] if n in nodes else arrays[n] for n in self.sites), self.moved(nodes)

    def _packed(self, seen: Seen) -> Seen:
        return tuple(self.packed(values) for values in seen)

    def _total(self, model: Model, arrays: Mapping[str, jax.Array]) -> Callable[[jax.Array], jax.Array]:
        """Means over rows as nats of all N rows, which is what an engine divides."""
        rows = rows_of(arrays) * rows_factor(model, rows_of(arrays))
        return lambda values: values.mean() * rows


def _collections(critic: Any, seen: Seen) -> list[str] | None:
    """What a linen module keeps beside its weights, such as the statistics of a BatchNorm."""
    held = jax.eval_shape(lambda: critic.init(jax.random.key(0), *map(jnp.zeros_like, seen)))
    return sorted(set(held) - {"params"}) or None


def drawn(key: jax.Array, params: Params, model: Model, arrays: Mapping[str, jax.Array]) -> dict[str, Any]:
    """The trace of a run that is conditioned on nothing."""
    free = uncondition(seed(model, key))
    return trace(substitute(free, data=own_containers(params))).get_trace(**arrays)


@dataclass(frozen=True)
class MutualInformation(Information, Loss):
    """−E[log q(c | x) − log p(c)], (c, x) ~ p: the guide finds the latent c in draws of the model, and the model lets it.

    Minus a lower bound of the mutual information of c and x (InfoGAN, where the guide is Q), which of a discrete c is never
    above its entropy; with all of z in the place of c, the reconstruction of noise of VEEGAN. Draws of x must be reparametrised.

    References:
        | InfoGAN (Chen et al., 2016), arXiv:1606.03657;   VEEGAN (Srivastava et al., 2017), arXiv:1705.07761
    """

    def objective(self, key: jax.Array, params: Params, model: Model, guide: Model, **arrays: jax.Array) -> Result:
        """Minus the bound, and the bound as a term."""
        own, other = jax.random.split(key)
        buffers = Buffers()
        with buffers:
            nodes = drawn(own, params, model, arrays)
            fake = {name: nodes[name]["value"] if name in nodes else value for name, value in arrays.items()}
            found = condition(seed(guide, other), data={self.site: nodes[self.site]["value"]})
            q = trace(substitute(found, data=own_containers(params))).get_trace(**fake)[self.site]
        rows = rows_factor(model, rows_of(arrays))
        total = (log_density(q) - log_density(nodes[self.site])).sum() * rows
        return {"loss": -total, "terms": {f"information_{self.site}": total}, "mutable_state": buffers.held or None}


@dataclass(frozen=True)
class L1(Pair, Loss):
    """E Σ |x̃ − y|: a draw x̃ of a site of the unconditioned program, held against the array or the site `to`.

    With `to` the data of the same site, pix2pix's; with the array that a cycle of two networks started from, cycle
    consistency.
    """

    def objective(self, key: jax.Array, params: Params, model: Model, guide: Model, **arrays: jax.Array) -> Result:
        """The summed distance."""
        buffers = Buffers()
        with buffers:
            nodes = drawn(key, params, model, arrays)
        other = arrays[self.other] if self.other in arrays else nodes[self.other]["value"]
        distance = rows_sum(jnp.abs(nodes[self.site]["value"] - other)).sum()
        return {"loss": distance * rows_factor(model, rows_of(arrays)), "mutable_state": buffers.held or None}
