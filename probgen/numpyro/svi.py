"""A drop-in for `numpyro.infer.SVI`: `from probgen.numpyro import SVI` is the one line to change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.infer
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.svi import SVIRunResult, SVIState

from probgen.errors import ProbgenError
from probgen.numpyro.elbo import ELBO
from probgen.numpyro.loss import Loss
from probgen.numpyro.structure import scaled_plates
from probgen.numpyro.trace import DataPlate


class SVI(numpyro.infer.SVI):
    """`numpyro.infer.SVI` with minibatches in `run`, and schedules in losses read at the optimizer's step."""

    def __init__(self, model: Any, guide: Any, optim: Any, loss: Any = None, **static_kwargs: Any) -> None:
        super().__init__(model, guide, optim, ELBO() if loss is None else loss, **static_kwargs)

    def update(self, svi_state: SVIState, *args: Any, **kwargs: Any) -> tuple[SVIState, jax.Array]:
        """One step: the new state and the loss, which numpyro's own `update` gives."""
        with self._at(svi_state):
            return super().update(svi_state, *args, **kwargs)

    def evaluate(self, svi_state: SVIState, *args: Any, **kwargs: Any) -> jax.Array:
        """The loss on a batch, at the step the state has reached."""
        with self._at(svi_state):
            return super().evaluate(svi_state, *args, **kwargs)

    @contextlib.contextmanager
    def _at(self, state: SVIState) -> Iterator[None]:
        loss = self.loss
        self.loss = loss.at(state.optim_state[0]) if isinstance(loss, Loss) else loss
        try:
            yield
        finally:
            self.loss = loss

    def run(
        self, rng_key: jax.Array, num_steps: int, *args: Any, batch_size: int | None = None, **kwargs: Any
    ) -> SVIRunResult:
        """`num_steps` steps in one compiled scan, without a progress bar unless `progress_bar=True`.

        With `batch_size`, every step sees that many rows of those arrays among `args` that are as long as the first,
        in an order that is a function of (key, epoch), and plates as long as the batch stand for all rows; such a
        scan has no progress bar.
        """
        if batch_size is None or batch_size >= len(args[0]):
            return super().run(rng_key, num_steps, *args, **{"progress_bar": False, **kwargs})
        kwargs.pop("progress_bar", None)
        state, init_params = kwargs.pop("init_state", None), kwargs.pop("init_params", None)
        arrays, rows, per_epoch = tuple(map(jnp.asarray, args)), len(args[0]), len(args[0]) // batch_size
        init_key, order_key = jax.random.split(rng_key)

        def batch(index: jax.Array) -> tuple:
            return tuple(a[index] if jnp.ndim(a) and len(a) == rows else a for a in arrays)

        def step(carry: tuple[SVIState, jax.Array], i: jax.Array) -> tuple[tuple[SVIState, jax.Array], jax.Array]:
            state, order = carry
            key = jax.random.fold_in(order_key, i // per_epoch)
            order = jax.lax.cond(i % per_epoch == 0, lambda: jax.random.permutation(key, rows), lambda: order)
            chosen = jax.lax.dynamic_slice(order, [i % per_epoch * batch_size], [batch_size])
            state, loss = whole.update(state, *batch(chosen), **kwargs)
            return (state, order), loss

        whole = self._standing_for(rows, batch(jnp.arange(batch_size)), kwargs)
        state = (
            whole.init(init_key, *batch(jnp.arange(batch_size)), init_params=init_params, **kwargs)
            if state is None
            else state
        )
        if local := whole.model.names & set(getattr(self.guide, "_prototype_frames", ())):
            raise ProbgenError(
                f"the autoguide keeps one value per row for a latent inside the plate {min(local)!r}, which minibatches "
                "cannot share: leave `batch_size` out, or write a guide that computes it from the data"
            )
        steps = jax.jit(lambda state: jax.lax.scan(step, (state, jnp.arange(rows)), jnp.arange(num_steps)))
        (state, _), losses = steps(state)
        self.constrain_fn = whole.constrain_fn
        return SVIRunResult(whole.get_params(state), state, losses)

    def _standing_for(self, rows: int, example: tuple, kwargs: dict[str, Any]) -> SVI:
        """The same inference in which a batch stands for all rows."""
        pair, fixed = (self.model, self.guide), kwargs | self.static_kwargs
        plates = scaled_plates(tuple(partial(f, **fixed) for f in pair if not isinstance(f, AutoGuide)), example)
        whole = SVI(*(DataPlate(f, plates, rows) for f in pair), self.optim, self.loss, **self.static_kwargs)
        whole.constrain_fn = self.constrain_fn
        return whole
