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

from probgen.numpyro.elbo import ELBO
from probgen.numpyro.loss import Loss
from probgen.numpyro.structure import scaled_plates
from probgen.numpyro.trace import DataPlate


class SVI(numpyro.infer.SVI):
    """Stochastic variational inference, `numpyro.infer.SVI` with schedules in losses and minibatches in `run`.

    `init`, `update`, `evaluate` and `get_params` are NumPyro's own; a loss whose `beta` or `free_bits` is a schedule
    is read at the optimizer's step.
    """

    def __init__(self, model: Any, guide: Any, optim: Any, loss: Any = None, **static_kwargs: Any) -> None:
        super().__init__(model, guide, optim, ELBO() if loss is None else loss, **static_kwargs)

    @contextlib.contextmanager
    def _at(self, state: SVIState) -> Iterator[None]:
        """The loss as its schedules have it at the state's step."""
        loss = self.loss
        self.loss = loss.at(state.optim_state[0]) if isinstance(loss, Loss) else loss
        try:
            yield
        finally:
            self.loss = loss

    def update(self, svi_state: SVIState, *args: Any, **kwargs: Any) -> tuple[SVIState, jax.Array]:
        """One step."""
        with self._at(svi_state):
            return super().update(svi_state, *args, **kwargs)

    def stable_update(self, svi_state: SVIState, *args: Any, **kwargs: Any) -> tuple[SVIState, jax.Array]:
        """One step, taken back if it is not finite."""
        with self._at(svi_state):
            return super().stable_update(svi_state, *args, **kwargs)

    def evaluate(self, svi_state: SVIState, *args: Any, **kwargs: Any) -> jax.Array:
        """The loss on a batch, at the step the state has reached."""
        with self._at(svi_state):
            return super().evaluate(svi_state, *args, **kwargs)

    def run(
        self,
        rng_key: jax.Array,
        num_steps: int,
        *args: Any,
        batch_size: int | None = None,
        progress_bar: bool = False,
        init_state: SVIState | None = None,
        init_params: dict | None = None,
        **kwargs: Any,
    ) -> SVIRunResult:
        """`num_steps` steps in one compiled scan.

        With `batch_size`, every step sees that many rows of the arrays among `args` that are as long as the first one,
        in an order that is a function of (key, epoch), and plates as long as the batch stand for all rows.
        """
        if batch_size is None or batch_size >= len(args[0]):
            return super().run(
                rng_key,
                num_steps,
                *args,
                progress_bar=progress_bar,
                init_state=init_state,
                init_params=init_params,
                **kwargs,
            )
        rows, per_epoch = len(args[0]), len(args[0]) // batch_size
        init_key, order_key = jax.random.split(rng_key)
        arrays = tuple(map(jnp.asarray, args))

        def batch(index: jax.Array) -> tuple:
            return tuple(a[index] if jnp.ndim(a) and len(a) == rows else a for a in arrays)

        example = batch(jnp.arange(batch_size))
        fixed = kwargs | self.static_kwargs
        fns = tuple(partial(fn, **fixed) for fn in (self.model, self.guide) if not isinstance(fn, AutoGuide))
        plates = scaled_plates(fns, example)
        scaled = SVI(
            *(DataPlate(f, plates, rows) for f in (self.model, self.guide)), self.optim, self.loss, **self.static_kwargs
        )
        state = scaled.init(init_key, *example, init_params=init_params, **kwargs) if init_state is None else init_state
        self.constrain_fn = scaled.constrain_fn = scaled.constrain_fn or self.constrain_fn

        def step(carry: tuple, i: jax.Array) -> tuple:
            state, order = carry
            epoch, place = i // per_epoch, i % per_epoch
            shuffle = lambda: jax.random.permutation(jax.random.fold_in(order_key, epoch), rows)  # noqa: E731
            order = jax.lax.cond(place == 0, shuffle, lambda: order)
            state, loss = scaled.update(
                state, *batch(jax.lax.dynamic_slice(order, [place * batch_size], [batch_size])), **kwargs
            )
            return (state, order), loss

        (state, _), losses = jax.jit(lambda s: jax.lax.scan(step, (s, jnp.arange(rows)), jnp.arange(num_steps)))(state)
        return SVIRunResult(scaled.get_params(state), state, losses)
