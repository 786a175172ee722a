"""A network with its weights, as JAX sees it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax


def as_tree(network: Callable) -> Callable:
    """A network whose weights are the leaves of a pytree, so that they are traced where the one who holds it is.

    `flax_module` returns a plain partial, of which JAX sees nothing; functions without weights have no leaves.
    """
    if isinstance(network, jax.tree_util.Partial):
        return network
    if isinstance(network, functools.partial):
        return jax.tree_util.Partial(network.func, *network.args, **network.keywords)
    leaf = jax.tree_util.treedef_is_leaf(jax.tree.structure(network))
    return jax.tree_util.Partial(network) if leaf else network
