"""The bound of a diffusion from one random step of its chain, and the weighted errors trained in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.handlers import seed, substitute

from probgen.diffusion.objective import ChainBound, proposal_of, spread_steps
from probgen.diffusion.requirements import denoiser_of
from probgen.diffusion.schedules import LearnedSchedule
from probgen.errors import ProbgenError
from probgen.numpyro.denoiser import Denoiser
from probgen.numpyro.loss import Loss, Result
from probgen.numpyro.trace import Buffers, bound, own_containers, rows_factor
from probgen.program import Player, Program, rows_of


class DiffusionELBO(ChainBound, Loss):  # noqa: D101
    __doc__ = ChainBound.__doc__

    def players(self, program: Program) -> dict[str, Player]:
        """One: the program, whose weights are all that its denoiser touches."""
        denoiser = bound(denoiser_of(program, "DiffusionELBO"), like=program.model)

        def objective(rng_key: jax.Array, params: dict, model: Callable, guide: Callable, **arrays: Any) -> Result:
            buffers, (own, other) = Buffers(), jax.random.split(rng_key)
            with buffers, substitute(data=own_containers(params)), seed(rng_seed=other):
                chain = denoiser(**arrays)
                losses, terms = self.of_rows(chain, arrays[chain.site], own)
            scale = rows_factor(model, rows_of(arrays))
            named = {name: term.sum() * scale for name, term in terms.items()}
            return {"loss": losses.sum() * scale, "terms": named, "mutable_state": dict(buffers.held) or None}

        return {"program": Player((program.model, program.denoiser), objective)}

    def of_rows(self, chain: Denoiser, data: jax.Array, rng_key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of each row at a random step, [B], and its terms."""
        if self.proposal == "importance" and isinstance(chain.schedule, LearnedSchedule):
            raise ProbgenError(
                'DiffusionELBO(proposal="importance") draws steps by what a schedule makes them cost, and a learned one says '
                'that to no compiled step: leave proposal="uniform", or take a fixed schedule'
            )
        own, steps, dropped = jax.random.split(rng_key, 3)
        x = chain.embed(data)
        if self.drop and chain.labels is not None:
            chain = chain.dropped(jax.random.uniform(dropped, (len(x),)) < self.drop)
        step, weight = drawn_steps(proposal_of(chain, self.proposal), x, steps)
        return self.at_step(chain, data, x, step, weight, own)

    def at_step(
        self, chain: Denoiser, data: jax.Array, x: jax.Array, step: jax.Array, weight: jax.Array, rng_key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of each row, [B], at the step 1..T that is given for it, times its weight."""
        return self.of_step(chain, data, x, chain.noise_like(x, rng_key), step, weight)


def drawn_steps(chances: Any, like: jax.Array, rng_key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A step 1..T for each row, drawn by its chance, and 1 / chance, [B]."""
    start = jax.random.uniform(rng_key, (), like.dtype)
    return spread_steps(jnp.asarray(chances, like.dtype), start, jnp.ones(len(like), like.dtype))
