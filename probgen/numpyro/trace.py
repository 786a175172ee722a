"""Running a NumPyro program: arrays bound by name, the data plate scaled, guide and model run one after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.handlers import replay, seed, substitute, trace
from numpyro.primitives import Messenger

from probgen import refusals
from probgen.program import Program, arguments

Trace = dict[str, dict[str, Any]]


def bound(fn: Callable[..., Any], like: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """`fn` as a callable that takes every array of the batch by keyword and uses those it names."""

    @functools.wraps(fn, updated=())
    def call(**arrays: jax.Array) -> Any:
        return fn(**arguments(fn, arrays, like))

    return call


def nothing(*_: Any, **__: Any) -> None:
    """The guide of a program that needs none."""


def callables(program: Program) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Model and guide, each called with the whole batch by keyword."""
    guide = nothing if program.guide is None else bound(program.guide, like=program.model)
    return bound(program.model), guide


class DataPlate(Messenger):
    """Let plates as long as the batch stand for N rows: they read as `plate(name, N, subsample_size=B)`.

    Sites inside are scaled by N / B. The plate's own message says N too, which is where `RenyiELBO` looks.
    """

    def __init__(self, fn: Callable[..., Any], names: tuple[str, ...], rows: int) -> None:
        super().__init__(fn)
        self.names = frozenset(names)
        self.rows = rows

    def process_message(self, msg: dict) -> None:
        """Scale a sample site, or rewrite a plate's size."""
        if msg["type"] == "plate" and msg["name"] in self.names:
            size = msg["args"][0]
            msg["args"] = (self.rows, size if size < self.rows else None)
        if msg["type"] != "sample":
            return
        for frame in msg["cond_indep_stack"]:
            if frame.name in self.names and frame.size != self.rows:
                msg["scale"] = (1.0 if msg["scale"] is None else msg["scale"]) * (self.rows / frame.size)


def rows_factor(model: Callable[..., Any], rows: int) -> float:
    """N / B, by which an engine makes `rows` stand for all: what a loss that has no sites scales by itself."""
    return model.rows / rows if isinstance(model, DataPlate) else 1.0


class Buffers(Messenger):
    """Collect the mutable state of the modules a program calls; it is complete when the program has run."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, Any] = {}

    def postprocess_message(self, msg: dict) -> None:
        """Keep the mutable value itself: modules write their new state into it."""
        if msg["type"] == "mutable" and msg["value"] is not None:
            self.held[msg["name"]] = msg["value"]


class StopGradient(Messenger):
    """No gradient flows through a draw that is not reparametrised."""

    def postprocess_message(self, msg: dict) -> None:
        """Detach the value."""
        if msg["type"] == "sample" and not msg["is_observed"] and not msg["fn"].has_rsample:
            msg["value"] = jax.lax.stop_gradient(msg["value"])


def run_pair(
    key: jax.Array,
    params: Mapping[str, Any],
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple,
    kwargs: Mapping[str, Any],
    tracing: Callable[..., Any] = trace,
) -> tuple[Trace, Trace, dict[str, Any]]:
    """Run the guide and the model against it: both traces and the new mutable state.

    Keys are split as in NumPyro's own ELBOs, so that the draws are the same.
    """
    model_key, guide_key = jax.random.split(key)
    params = own_containers(params)
    buffers = Buffers()
    with buffers:
        with StopGradient():
            q = tracing(substitute(seed(guide, guide_key), data=params)).get_trace(*args, **kwargs)
        params |= buffers.held
        p = tracing(substitute(replay(seed(model, model_key), trace=q), data=params)).get_trace(*args, **kwargs)
    return p, q, buffers.held


def refuse_unguided(p: Trace, q: Trace) -> None:
    """Raise for a latent that the guide does not draw and that is not enumerated."""
    for name, site in p.items():
        if site["type"] == "sample" and not site["is_observed"] and name not in q and not enumerated(site):
            if marked(site):
                refusals.enumerable(name, site["fn"])
            refusals.refuse_latent(name, site["fn"].has_enumerate_support)


def own_containers(tree: Any) -> Any:
    """The same leaves in containers of their own: modules write new state into the ones they are given."""
    return jax.tree.map(lambda leaf: leaf, dict(tree))


def marked(site: Mapping[str, Any]) -> bool:
    """Whether a site asks to be enumerated."""
    return site["infer"].get("enumerate") == "parallel"


def enumerated(site: Mapping[str, Any]) -> bool:
    """Whether a site asks to be enumerated, and its values can be listed."""
    return marked(site) and site["fn"].has_enumerate_support


def log_density(site: Mapping[str, Any], fn: Any = None) -> jax.Array:
    """log p at the site's value, one number for each element of its batch shape, masked but not scaled."""
    fn = site["fn"] if fn is None else fn
    if site.get("intermediates"):
        return fn.log_prob(site["value"], site["intermediates"])
    return fn.log_prob(site["value"])


def as_jax(arrays: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Arrays in the precision in force: floats as its float, pixels and bits as floats, integers as integers."""

    def one(array: Any) -> jax.Array:
        array = array if isinstance(array, jax.Array) else np.asarray(array)
        pixels = array.dtype in (np.uint8, np.bool_) and array.ndim > 1
        if pixels or jnp.issubdtype(array.dtype, jnp.floating):
            return jnp.asarray(array, dtype=jnp.result_type(float))
        return jnp.asarray(array)

    return {name: one(array) for name, array in arrays.items()}
