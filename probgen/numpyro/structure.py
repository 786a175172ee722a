"""What one abstract run tells of a NumPyro program: sites, plates, parents, and how it uses its arrays.

Nothing is computed here but shapes and dependencies; only where an array seems to be read by the model's own draws
are two draws compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import (
    Delta,
    ExpandedDistribution,
    Independent,
    MaskedDistribution,
    Unit,
)
from numpyro.handlers import replay, seed, substitute, trace, uncondition
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.initialization import init_to_sample

from probgen.errors import ProbgenError
from probgen.numpyro.leaves import QUICK, collect, prepared
from probgen.numpyro.modes import mode
from probgen.numpyro.provenance import eval_provenance
from probgen.numpyro.trace import Trace, as_jax, callables, enumerated, log_density, marked, own_containers
from probgen.program import Plate, Program, Site, Structure, arguments, rows_of
from probgen.refusals import enumerable, refuse_local_autoguide, refuse_self_subsampling
from probgen.supports import refuse_shape

PARTS = ("sample", "deterministic")


def inspect(program: Program, arrays: Mapping[str, Any], rows: int | None = None, seed: int = 0) -> Structure:
    """The structure of a program on one prepared batch of a data set of `rows` rows."""
    arrays = as_jax(arrays)
    with mode(False, program.model, program.guide):
        program = prepared(program, arrays, seed)
        leaves = collect(program, arrays, seed)
        return structure_of(program, arrays, leaves.values, rows)


def structure_of(
    program: Program, arrays: Mapping[str, Any], params: Mapping[str, Any], rows: int | None = None
) -> Structure:
    """Read sites, plates, parents and the use of the arrays off abstract runs on one batch.

    `params` holds the constrained parameters and the buffers. Raises `ProbgenError` for an array that is read as
    input to its own site, a plate that subsamples a minibatch for itself, and an autoguide over a local latent under
    minibatches.
    """
    arrays = as_jax(arrays)
    model, guide = callables(program)
    batch = rows_of(arrays)
    p, q = _abstract_pair(model, guide, arrays, params)
    for name, site in p.items():
        if site["type"] == "sample" and site["is_observed"]:
            refuse_shape(name, tuple(jnp.shape(site["value"])), tuple(site["fn"].shape()), site["fn"].event_dim)
    sizes = _plate_sizes(p, q)
    for name, (full, size) in sizes.items():
        refuse_self_subsampling(name, full, size, batch, rows or batch)
    # An autoguide remembers the plates of its first batch, so it is not asked again.
    fns = (model,) if isinstance(program.guide, AutoGuide) else (model, guide)
    data_plates = following(lambda other: _abstract_sizes(fns, (), other, params), sizes, arrays)
    structure = Structure(
        model=sites(p, data_plates, parents(model, arrays, params, p)),
        guide=sites(q, data_plates, {}),
        data_plates=data_plates,
        states_rows=any(sizes[name][0] != sizes[name][1] for name in data_plates),
        arrays=_use_of_arrays(model, program, arrays, params, p),
    )
    if isinstance(program.guide, AutoGuide):
        refuse_local_autoguide(type(program.guide).__name__, structure, batch, rows or batch)
    return structure


def _abstract_pair(
    model: Callable, guide: Callable, arrays: Mapping[str, Any], params: Mapping[str, Any]
) -> tuple[Trace, Trace]:
    """Traces of guide and model whose arrays have shapes but no values."""
    found = {}

    def both(key: jax.Array, arrays: Mapping[str, Any]) -> None:
        own = own_containers(params)
        q = trace(substitute(seed(guide, key), data=own)).get_trace(**arrays)
        conditioned = replay(seed(model, key), trace=q)
        anywhere = substitute(conditioned, substitute_fn=_improper_at_zero)
        found["p"], found["q"] = trace(substitute(anywhere, data=own)).get_trace(**arrays), q

    jax.eval_shape(both, jax.random.key(0), arrays)
    return found["p"], found["q"]


def _improper_at_zero(site: Mapping[str, Any]) -> Any:
    """A value for priors that have no sampler, such as `ImproperUniform`."""
    if site["type"] == "sample" and type(unwrapped(site["fn"])).__name__ == "ImproperUniform":
        return init_to_sample(site)
    return None


def _plate_sizes(*traces: Trace) -> dict[str, tuple[int, int]]:
    """Full and drawn size of every plate; inside a `scan` only its frames are seen."""
    sizes = {}
    for tr in traces:
        for name, site in tr.items():
            if site["type"] == "plate":
                sizes[name] = (site["args"][0], site["value"].shape[0])
            for frame in site.get("cond_indep_stack", ()):
                sizes.setdefault(frame.name, (frame.size, frame.size))
    return sizes


def following(
    sizes_for: Callable[[Mapping[Any, jax.Array]], Mapping[str, tuple[int, int]]],
    sizes: Mapping[str, tuple[int, int]],
    arrays: Mapping[Any, jax.Array],
) -> tuple[str, ...]:
    """The plates as long as the batch: of those with its size, the ones that follow it when its length is another."""
    batch = rows_of(arrays)
    other = batch - 1 if batch > 1 else 2
    candidates = [name for name, (_, size) in sizes.items() if size == batch]
    if not candidates:
        return ()
    resized = {
        name: jnp.resize(array, (other, *array.shape[1:])) if jnp.ndim(array) and len(array) == batch else array
        for name, array in arrays.items()
    }
    try:
        after = sizes_for(resized)
    except (TypeError, ValueError, IndexError, AssertionError):
        return tuple(candidates)  # a program made for one batch length: the plate of that length is the data's
    return tuple(name for name in candidates if after.get(name, (0, 0))[1] == other)


def scaled_plates(fns: tuple[Callable, ...], args: tuple) -> tuple[str, ...]:
    """The plates of callables with positional arrays that follow the batch and do not state how many rows there are."""

    def sizes_for(arrays: Mapping[int, jax.Array]) -> dict[str, tuple[int, int]]:
        return _abstract_sizes(fns, tuple(arrays.values()), {}, {})

    arrays = dict(enumerate(args))
    sizes = sizes_for(arrays)
    return tuple(name for name in following(sizes_for, sizes, arrays) if sizes[name][0] == sizes[name][1])


def _abstract_sizes(
    fns: tuple[Callable, ...], args: tuple, kwargs: Mapping[str, Any], params: Mapping[str, Any]
) -> dict[str, tuple[int, int]]:
    """The plate sizes of callables, each run on its own."""
    found: dict[str, tuple[int, int]] = {}

    def run(args: tuple, kwargs: Mapping[str, Any]) -> None:
        for fn in fns:
            anywhere = substitute(seed(fn, jax.random.key(0)), substitute_fn=_improper_at_zero)
            found.update(
                _plate_sizes(trace(substitute(anywhere, data=own_containers(params))).get_trace(*args, **kwargs))
            )

    jax.eval_shape(run, args, dict(kwargs))
    return found


def parents(
    model: Callable[..., Any],
    arrays: Mapping[str, Any],
    params: Mapping[str, Any],
    p: Trace,
    args: tuple = (),
) -> dict[str, tuple[str, ...]]:
    """The sites that each site's distribution depends on directly, read off the program's own arithmetic."""
    latents = {n: s["value"] for n, s in p.items() if s["type"] == "sample" and not s["is_observed"]}

    def densities(**values: Any) -> dict[str, Any]:
        own = own_containers(params)
        tr = trace(substitute(substitute(seed(model, jax.random.key(0)), data=own), data=values)).get_trace(
            *args, **arrays
        )
        sampled = {n: log_density(s) for n, s in tr.items() if s["type"] == "sample"}
        return sampled | {n: s["value"] for n, s in tr.items() if s["type"] == "deterministic"}

    abstract = {n: jnp.zeros(jnp.shape(v), jnp.result_type(v)) for n, v in latents.items()}
    found = eval_provenance(densities, **abstract) if latents else dict.fromkeys(p, frozenset())
    return {
        name: tuple(parent for parent in latents if parent in found[name] and parent != name)
        for name in p
        if name in found
    }


def sites(tr: Trace, data_plates: tuple[str, ...], parents: Mapping[str, tuple[str, ...]]) -> dict[str, Site]:
    """The sample and deterministic sites of a trace."""
    return {
        name: _site(name, site, data_plates, parents.get(name, ()))
        for name, site in tr.items()
        if site["type"] in PARTS
    }


def _site(name: str, site: Mapping[str, Any], data_plates: tuple[str, ...], parents: tuple[str, ...]) -> Site:
    plates = tuple(Plate(f.name, f.size, f.dim, f.name in data_plates) for f in site["cond_indep_stack"])
    shape = tuple(jnp.shape(site["value"]))
    if site["type"] == "deterministic":
        event_dim = len(shape) - max((-f.dim for f in plates), default=0)
        return Site(name, "deterministic", "Deterministic", shape, max(event_dim, 0), plates, parents=parents)
    fn = site["fn"]
    base = unwrapped(fn)
    observed = "factor" if isinstance(base, Unit) else "observed"
    return Site(
        name=name,
        role=observed if site["is_observed"] else "latent",
        family=type(base).__name__.removesuffix("Logits").removesuffix("Probs"),
        shape=shape,
        event_dim=fn.event_dim,
        plates=plates,
        support=str(fn.support),
        discrete=bool(getattr(fn.support, "is_discrete", False)),
        enumerated=enumerated(site),
        values=enumerable(name, fn) if marked(site) and not site["is_observed"] else 0,
        reparametrised=bool(fn.has_rsample),
        delta=isinstance(base, Delta),
        parents=parents,
    )


def unwrapped(fn: Any) -> Any:
    """The distribution under `to_event`, `mask` and `expand`."""
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    return fn


def _use_of_arrays(
    model: Callable, program: Program, arrays: Mapping[str, jax.Array], params: Mapping[str, Any], p: Trace
) -> dict[str, str]:
    """For each array the model names: "data" if an unconditioned draw does not depend on its values, else "given"."""
    named = arguments(program.model, arrays)
    names = [n for n in arrays if n in named] or list(arrays)

    def draw(**values: Any) -> dict[str, Any]:
        free = uncondition(seed(model, jax.random.key(0)))
        free = substitute(free, substitute_fn=_improper_at_zero)
        tr = trace(substitute(free, data=own_containers(params))).get_trace(**values)
        return {n: s["value"] for n, s in tr.items() if s["type"] == "sample"}

    def observe(**values: Any) -> dict[str, Any]:
        tr = trace(substitute(seed(model, jax.random.key(0)), data=own_containers(params))).get_trace(**values)
        return {n: s["value"] for n, s in tr.items() if s["type"] == "sample" and s["is_observed"]}

    read = eval_provenance(draw, **arrays)
    use = {}
    for name in names:
        changed = [site for site, sources in read.items() if name in sources]
        changed = changed and _changed_by(draw, arrays, name)
        use[name] = "given" if changed else "data"
        if not changed:
            continue
        own = [site for site, sources in eval_provenance(observe, **arrays).items() if name in sources]
        if set(changed) & set(own):
            raise ProbgenError(
                f"the array {name!r} is read as input to its own site {own[0]!r}, so the program cannot be sampled: write "
                "it as one distribution (autoregressive programs are one site with an autoregressive distribution)"
            )
    return use


def _changed_by(draw: Callable[..., Any], arrays: Mapping[str, jax.Array], name: str) -> list[str]:
    """The sites whose draw, with the same key, differs between an array's values and the same values in other rows."""
    values = np.asarray(arrays[name])
    other = np.roll(values, 1, axis=0)
    draw = jax.jit(draw, compiler_options=QUICK)
    before, after = draw(**arrays), draw(**{**arrays, name: jnp.asarray(other)})
    if np.array_equal(values, other):  # rows all alike tell nothing: trust the program's arithmetic
        return [site for site, sources in eval_provenance(draw, **arrays).items() if name in sources]
    return [
        site
        for site in before
        if before[site].shape != after[site].shape
        or not np.array_equal(np.nan_to_num(before[site]), np.nan_to_num(after[site]))
    ]
