"""What a program trains and carries: its unconstrained parameters and its buffers, found by running it once.

Networks register their weights as one parameter that is a tree (`decoder$params`); on disk every array of it has a
name of its own: `decoder.hidden.kernel`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import biject_to, constraints
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.util import transform_fn

from probgen.errors import ProbgenError
from probgen.numpyro.trace import Buffers, as_jax, bound, callables, own_containers
from probgen.program import Program, arguments

Tree = dict[str, Any]

QUICK = {"xla_backend_optimization_level": 0}  # what runs once is compiled in half the time


@dataclass(frozen=True)
class Leaves:
    """The parameters (unconstrained, trained) and buffers (carried along) of a program, and its constraints."""

    params: Tree
    buffers: Tree
    transforms: Mapping[str, Any]

    def constrained(self, params: Tree) -> Tree:
        """The parameters as the program sees them."""
        return transform_fn(self.transforms, params)

    @functools.cached_property
    def values(self) -> Tree:
        """Parameters as the program sees them, and buffers: compiled, as a transform is many small functions."""
        return {**jax.jit(self.constrained, compiler_options=QUICK)(self.params), **self.buffers}


def collect(program: Program, arrays: Mapping[str, Any], seed_: int, extra: Iterable[Callable] = ()) -> Leaves:
    """Run guide, model and `extra` callables (critics) once and gather every parameter and buffer.

    Start values are a pure function of the seed; keys are split as in `numpyro.infer.SVI.init`.
    """
    arrays = as_jax(arrays)
    model, guide = callables(program)
    others = [bound(fn, like=program.model) for fn in extra if fn not in (program.model, program.guide)]
    kept: dict[str, Any] = {}

    def run(key: jax.Array) -> tuple[Tree, Tree]:
        _, model_key, guide_key = jax.random.split(key, 3)
        params, buffers = {}, Buffers()
        keys = [guide_key, model_key, *jax.random.split(jax.random.fold_in(key, 1), max(1, len(others)))]
        latents: Tree = {}
        with buffers:
            for fn, fn_key in zip([guide, model, *others], keys, strict=False):
                own = {**latents, **params, **buffers.held}
                tr = trace(substitute(seed(fn, fn_key), data=own)).get_trace(**arrays)
                latents |= {n: s["value"] for n, s in tr.items() if s["type"] == "sample" and not s["is_observed"]}
                for name, site in tr.items():
                    if site["type"] == "param" and name not in params:
                        kept[name] = biject_to(site["kwargs"].get("constraint", constraints.real))
                        params[name] = kept[name].inv(site["value"])
        return jax.tree.map(_in_force, (params, dict(buffers.held)))

    params, buffers = jax.jit(run, compiler_options=QUICK)(jax.random.key(seed_))
    return Leaves(params, buffers, kept)


def _in_force(leaf: Any) -> jax.Array:
    """An array of the precision in force: networks built in another scope keep theirs."""
    dtype = jnp.result_type(leaf)
    return jnp.asarray(leaf, jnp.result_type(float) if jnp.issubdtype(dtype, jnp.floating) else dtype)


def prepared(program: Program, arrays: Mapping[str, Any], seed_: int) -> Program:
    """The program with its autoguide set up on one batch, in a copy: the user's own stays as it was."""
    if not isinstance(program.guide, AutoGuide):
        return program
    guide = own_autoguide(program.guide)
    with seed(rng_seed=jax.random.key(seed_)), trace():
        bound(guide, like=program.model)(**as_jax(arrays))
    return Program(
        program.model, guide, program.by, program.prepare, program.defaults, program.denoiser, program.origin
    )


def own_autoguide(guide: AutoGuide) -> AutoGuide:
    """A copy that shares the model but keeps a prototype of its own."""
    own = copy.copy(guide)
    for name, value in vars(guide).items():
        if isinstance(value, dict | list) and name != "model":
            setattr(own, name, copy.copy(value))
    own.prototype_trace = None
    if hasattr(own, "_guides"):
        own._guides = [own_autoguide(g) if isinstance(g, AutoGuide) else g for g in own._guides]
    return own


def named(params: Tree, buffers: Tree) -> dict[str, Any]:
    """Every array under a name: the parameter's own, followed by the path inside it."""
    flat, _ = jax.tree_util.tree_flatten_with_path((params, buffers))
    names = {}
    for path, leaf in flat:
        site, *rest = [_word(part) for part in path[1:]]
        site = site.removesuffix("$params").removesuffix("$state")
        name = ".".join([site, *rest])
        names[name if name not in names else ".".join(_word(part) for part in path[1:])] = leaf
    return names


def unnamed(arrays: Mapping[str, Any], like: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
    """The trees `like` (params, buffers) filled with named arrays; a missing or misshapen one is refused."""
    template = named(*like)
    for name, leaf in template.items():
        if name not in arrays or np.shape(arrays[name]) != np.shape(to_numpy(leaf)):
            found = f"has shape {np.shape(arrays[name])}" if name in arrays else "is missing"
            raise ProbgenError(
                f"the weight {name!r} {found} where the program has shape {np.shape(to_numpy(leaf))}: the weights belong "
                "to another program or other options"
            )
    leaves = [from_numpy(arrays[name], leaf) for name, leaf in template.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _word(part: Any) -> str:
    for field in ("key", "name", "idx"):
        if hasattr(part, field):
            return str(getattr(part, field))
    return str(part)


def to_numpy(leaf: Any) -> np.ndarray:
    """A leaf as an array that a file can hold; random keys as their bits."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def from_numpy(array: np.ndarray, like: Any) -> jax.Array:
    """The reverse of `to_numpy`, always a copy, of `like`'s dtype."""
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.array(array), impl=jax.random.key_impl(like))
    return jnp.array(array, dtype=like.dtype)


def touched(
    fns: Iterable[Callable], leaves: Leaves, arrays: Mapping[str, Any], like: Callable | None = None
) -> frozenset[str]:
    """The names of the parameters that the callables touch when run once."""
    found: set[str] = set()

    def run(fn: Callable, arrays: Mapping[str, Any]) -> None:
        values = own_containers({**leaves.constrained(leaves.params), **leaves.buffers})
        tr = trace(substitute(seed(fn, jax.random.key(0)), data=values)).get_trace(**arguments(fn, arrays, like))
        found.update(name for name, site in tr.items() if site["type"] == "param")

    for fn in fns:
        jax.eval_shape(lambda arrays, fn=fn: run(fn, arrays), as_jax(arrays))
    return frozenset(found)
