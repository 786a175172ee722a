"""Which inputs each output of a function depends on, read off its jaxpr: nothing is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from numpyro.ops.provenance import track_deps_jaxpr


def eval_provenance(fn: Callable[..., Any], **inputs: Any) -> Any:
    """For each output of `fn(**inputs)` the names of the inputs it depends on, in the shape of the output.

    NumPyro's own `eval_provenance` fails before 0.22 on functions that close over arrays, as every program with
    built networks does.
    """
    names = list(inputs)
    flat, tree = jax.tree.flatten(tuple(inputs.values()))
    outputs: list[Any] = []

    def call(*leaves: Any) -> list[Any]:
        found, shape = jax.tree.flatten(fn(**dict(zip(names, jax.tree.unflatten(tree, leaves), strict=True))))
        outputs.append(shape)
        return found

    jaxpr = jax.make_jaxpr(call)(*flat).jaxpr
    labels = jax.tree.leaves(
        tuple(jax.tree.map(lambda _, n=name: n, value) for name, value in inputs.items())  # one label a leaf
    )
    sources = track_deps_jaxpr(jaxpr, [frozenset({label}) for label in labels])
    return jax.tree.unflatten(outputs[-1], sources)
