"""The trained program: draws, densities, posteriors and reconstructions, NumPy in and NumPy out.

Every method is compiled once for the shape of its arrays; many draws are taken in chunks of bounded memory. Rows come
first in every value of a local site, wherever the program keeps its data plate.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import prng_key
from numpyro.handlers import block, infer_config, seed, substitute, trace, uncondition

from probgen.cells import GAUSSIAN, Cell, row_axis
from probgen.diffusion.requirements import denoiser_of
from probgen.diffusion.samplers import Sampler
from probgen.energy import Langevin
from probgen.energy.requirements import refuse_different, refuse_escaped, refuse_unscored, tell_diverged
from probgen.errors import ProbgenError
from probgen.numpyro import terms
from probgen.numpyro.denoiser import Denoiser
from probgen.numpyro.distributions import Flow
from probgen.numpyro.energy import drawn, langevin, nuts, parts_and_scores, scored
from probgen.numpyro.leaves import Leaves, collect, named, own_containers, prepared, to_numpy, unnamed
from probgen.numpyro.modes import mode, modules_of
from probgen.numpyro.probability_flow import Path, along, path
from probgen.numpyro.samplers import looped, table
from probgen.numpyro.scope import Scope, device_of
from probgen.numpyro.structure import structure_of, unwrapped
from probgen.numpyro.support import refuse_out_of_support
from probgen.numpyro.trace import as_jax, bound, callables, log_density
from probgen.numpyro.transforms.bijection import call_and_ladj
from probgen.nuts.chains import Sampling
from probgen.program import Program, Site, rows_of

Arrays = Mapping[str, Any]

NUMBERS = 2**22  # values held at once by the sites of a chunk of draws


class TrainedCallable:
    """A trained model or guide: NumPyro's handlers, `Predictive` and `render_model` take it as any program.

    It runs in eval mode, with its parameters and buffers in place.
    """

    def __init__(self, fn: Callable[..., Any], values: Mapping[str, Any]) -> None:
        functools.update_wrapper(self, fn, updated=())
        self.fn, self.values = fn, values

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the callable."""
        with mode(False, self.fn), substitute(data=own_containers(self.values)):
            return self.fn(*args, **kwargs)


class Trained:
    """A program with its weights; `arrays` is an example of a prepared batch, `rows` is N."""

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, np.ndarray],
        arrays: Arrays,
        *,
        rows: int,
        device: str = "cpu",
        precision: str = "32",
        seed: int = 0,
    ) -> None:
        self.rows, self.precision = rows, precision
        self.arrays = dict(arrays)
        self._device = device_of(device)
        with self._scope():
            arrays = as_jax(arrays)
            self.program = prepared(program, arrays, seed)
            leaves = collect(self.program, arrays, seed)
            params, buffers = unnamed(weights, (leaves.params, leaves.buffers))
            self._leaves = Leaves(params, buffers, leaves.transforms)
            self._values = jax.device_put(self._leaves.values, self._device)
            self._constrained = {name: self._values[name] for name in params}
            self.structure = structure_of(self.program, arrays, self._values)
        self._model, self._guide = callables(self.program)
        self._rows = frozenset(self.structure.data_plates)
        self._compiled: dict[Any, Callable] = {}

    # -- what it is ----------------------------------------------------------------------------------------------

    @property
    def model(self) -> Callable[..., Any]:
        """The trained model, a NumPyro callable."""
        return TrainedCallable(self.program.model, self._values)

    @property
    def guide(self) -> Callable[..., Any] | None:
        """The trained guide, a NumPyro callable, or None."""
        return None if self.program.guide is None else TrainedCallable(self.program.guide, self._values)

    @property
    def params(self) -> dict[str, np.ndarray]:
        """Names to constrained parameters."""
        return {name: to_numpy(leaf) for name, leaf in named(self._constrained, {}).items()}

    @property
    def modules(self) -> dict[str, Any]:
        """The networks' weights as trees, by the name they are registered under."""
        suffix = "$params"
        return {n.removesuffix(suffix): v for n, v in self._constrained.items() if n.endswith(suffix)}

    def refuse_outside(self, arrays: Arrays) -> None:
        """Refuse rows that lie outside the support of the site that observes them."""
        with self._scope():
            refuse_out_of_support(self._model, self._guide, as_jax(arrays), self._values, arrays)

    # -- draws of the model --------------------------------------------------------------------------------------

    def draw(self, n: int, seed: int, arrays: Arrays, prior: bool = False) -> dict[str, np.ndarray]:
        """One run of the unconditioned model on n rows; global latents come from the guide unless `prior`."""
        globals_ = [n for n, s in self.structure.sampled.items() if not s.local]

        def run(values: Any, key: jax.Array, arrays: Arrays) -> dict[str, jax.Array]:
            model_key, guide_key = jax.random.split(key)
            drawn = {}
            if globals_ and not prior:
                q = self._trace(self._guide, values, guide_key, arrays)
                drawn = {name: q[name]["value"] for name in globals_}
            p = self._trace(uncondition(self._model), values, model_key, arrays, drawn)
            return {
                name: self._rows_first(p[name]["value"], name) for name in self.structure.model if self._shown(name)
            }

        return self._call(("draw", prior), run, seed, arrays)

    def _shown(self, name: str) -> bool:
        return self.structure.model[name].role != "factor"

    def cells(self, arrays: Arrays, values: Arrays, seed: int) -> dict[str, Cell]:
        """Every site in one run of the unconditioned model with `values`, of latents and of data, held.

        Rows are filled up to a power of two, so that runs of many sizes share a few compiled programs.
        """
        rows = rows_of(arrays)
        more = (1 << (rows - 1).bit_length()) - rows
        local = {n for n, s in self.structure.model.items() if row_axis(s) is not None}

        def run(held: Any, key: jax.Array, both: tuple[Arrays, Arrays]) -> dict[str, Any]:
            arrays, given = both
            given = {name: self._rows_back(value, name) for name, value in given.items()}
            p = self._trace(uncondition(self._model), held, key, arrays, given)
            return {n: self._cell(n, p[n]) for n in self.structure.model if self._shown(n)}

        with self._scope():
            arrays = {name: _filled(value, more) for name, value in arrays.items()}
            values = {n: _filled(v, more) if n in local else v for n, v in values.items()}
            compiled = self._jit(("cells", *sorted(values)), run)
            found = _numpy(compiled(self._values, jax.random.key(seed), (as_jax(arrays), as_jax(values))))
        local |= {n for n, c in found.items() if c["value"].shape[:1] == (rows + more,)}  # deterministic, in no plate
        cut = {n: {k: a[:rows] if n in local and k != "support" else a for k, a in c.items()} for n, c in found.items()}
        return {n: Cell(site.family, **cut[n]) for n, site in self.structure.model.items() if n in cut}

    def _cell(self, name: str, node: Mapping[str, Any]) -> dict[str, jax.Array]:
        """What a node of a trace says of its site, entry by entry where its distribution is."""
        family, value = self.structure.model[name].family, jnp.asarray(node["value"])
        if node["type"] != "sample" or terms.masked(node["fn"]):
            return {"value": self._rows_first(value, name)}
        fn = unwrapped(node["fn"])
        parts, full = {"value": value, "log_prob": fn.log_prob(value)}, value.shape
        if family in GAUSSIAN:
            parts |= {"mean": fn.loc, "scale": fn.scale if family == "Normal" else fn.scale_tril}
        shapes = {"log_prob": full[: len(full) - fn.event_dim], "scale": full + full[-1:] * fn.event_dim}
        first = {n: jnp.broadcast_to(a, shapes.get(n, full)) for n, a in parts.items()}
        axis = row_axis(self.structure.model[name])
        if axis is not None:
            first = {n: jnp.moveaxis(a, value.ndim + axis, 0) for n, a in first.items()}
        support = _support(fn)
        return first if support is None else first | {"support": support}

    # -- a density known up to a constant ------------------------------------------------------------------------

    def by_chain(self, chain: Langevin | Sampling, arrays: Arrays, seed: int) -> dict[str, np.ndarray]:
        """As many rows of the data site as there are in `arrays`, by chains that follow its density.

        Of `Langevin` a chain for each row; of `NUTS` its `chains` share the rows, whatever its `draws`.
        """
        refuse_unscored(self.structure, type(chain).__name__)
        (name,) = self.structure.observed
        if isinstance(chain, Sampling):
            return {name: self._by_nuts(chain, arrays, name, seed)}

        def run(values: Any, key: jax.Array, arrays: Arrays) -> jax.Array:
            own, other = jax.random.split(key)
            start = drawn(self._model, values, arrays, name, own)
            return langevin(scored(self._model, values, arrays, name), other, start, chain)

        return refuse_escaped({name: self._call(("by_chain", chain), run, seed, arrays)}, chain)

    def _by_nuts(self, chain: Sampling, arrays: Arrays, name: str, seed: int) -> np.ndarray:
        refuse_different(self.structure, arrays)
        rows = rows_of(arrays)
        with self._scope():
            own, other = jax.random.split(jax.random.key(seed))
            several = {n: np.repeat(value[:1], chain.chains, axis=0) for n, value in arrays.items()}
            starts = drawn(self._model, self._values, as_jax(several), name, own)
            one = as_jax({n: value[:1] for n, value in arrays.items()})
            density = scored(self._model, self._values, one, name)
            draws, diverged = nuts(density, other, starts, chain, -(-rows // chain.chains))
            tell_diverged(diverged, draws.shape[0] * chain.chains)
            return np.asarray(draws).reshape(-1, *draws.shape[2:])[:rows]

    def log_parts(self, arrays: Arrays) -> tuple[np.ndarray, ...]:
        """log p(x_n) of the only data site and the log of all factors, [B] each, and their gradients, [B, ...]; float64."""
        (name,) = self.structure.observed

        def run(values: Any, key: jax.Array, arrays: Arrays) -> tuple[jax.Array, ...]:
            return parts_and_scores(self._model, values, arrays, name)

        return tuple(np.asarray(v, np.float64) for v in self._call(("log_parts",), run, 0, arrays))

    # -- a diffusion ---------------------------------------------------------------------------------------------

    def sampled(self, sampler: Sampler, arrays: Arrays, seed: int) -> dict[str, np.ndarray]:
        """As many rows of the data site as there are in `arrays`, by a sampler of the program's denoiser."""

        def run(values: Any, key: jax.Array, both: tuple[Arrays, Arrays]) -> dict[str, jax.Array]:
            (arrays, numbers), (own, start) = both, jax.random.split(key)
            with self._denoiser(values, arrays, key) as chain:
                x_T = chain.prior(arrays[chain.site]).sample(start, (rows_of(arrays),))
                found = looped(chain.guided(sampler.guidance), sampler, numbers, x_T, own)
                return {chain.site: chain.restored(found)}

        with self._scope():
            arrays = as_jax(arrays)
            numbers = table(self.denoiser(arrays, type(sampler).__name__), sampler)
            compiled = self._jit(("sampled", sampler), run)
            return _numpy(compiled(self._values, jax.random.key(seed), (arrays, numbers)))

    @property
    def has_probability_flow(self) -> bool:
        """Whether the program is a Gaussian diffusion, so that its data have a density by the probability flow too."""
        if self.program.denoiser is None or self.structure.kind != "latent":
            return False
        with self._scope():
            return isinstance(self.denoiser(as_jax(self.arrays), "the probability flow"), Denoiser)

    def flow_log_likelihood(self, arrays: Arrays, trace: str, seed: int) -> np.ndarray:
        """log p(x_1) + log p(x | x_1) − log q(x_1 | x) at a draw of x_1, p(x_1) by the probability flow, [B]."""

        def run(values: Any, key: jax.Array, both: tuple[Arrays, Path]) -> jax.Array:
            (arrays, looks), (own, signs) = both, jax.random.split(key)
            with self._denoiser(values, arrays, key) as chain:
                x = arrays[chain.site]
                near = chain.forward(chain.embed(x), 1 / chain.steps, 0.0)
                x_1 = near.sample(own)
                decoded = chain.decoder(x_1).log_prob(x) - near.log_prob(x_1)
                return decoded + along(chain, trace, looks, x_1, signs)

        with self._scope():
            arrays = as_jax(arrays)
            chain = self.denoiser(arrays, "the probability flow")
            compiled = self._jit(("flow_log_likelihood", trace), run)
            looks = path(chain, 1 / chain.steps)
            return _numpy(compiled(self._values, jax.random.key(seed), (arrays, looks)))

    def bases(self, arrays: Arrays, seed: int = 0) -> dict[str, np.ndarray]:
        """f(x) of the rows, by data site that is a flow: where in its base a datum comes from, [B, ...]."""

        def run(values: Any, key: jax.Array, arrays: Arrays) -> dict[str, jax.Array]:
            p = self._trace(self._model, values, key, arrays)
            flows = {n: p[n] for n in self.structure.observed if isinstance(unwrapped(p[n]["fn"]), Flow)}
            return {n: call_and_ladj(unwrapped(s["fn"]).transform, s["value"])[0] for n, s in flows.items()}

        return self._call(("bases",), run, seed, arrays)

    def denoiser(self, batch: Arrays, needs: str) -> Denoiser:
        """What the program's denoiser says with the weights in place; `needs` is named where there is none."""
        denoiser_of(self.program, needs)
        with self._denoiser(self._values, batch, jax.random.key(0)) as chain:
            return chain

    @contextlib.contextmanager
    def _denoiser(self, values: Any, batch: Arrays, key: jax.Array) -> Iterator[Denoiser]:
        """The same with weights that may be traced; its network is run inside, where random layers find their key."""
        with substitute(data=own_containers(values)), seed(rng_seed=key):
            yield bound(self.program.denoiser, like=self.program.model)(**batch)

    # -- densities -----------------------------------------------------------------------------------------------

    def log_weights(self, arrays: Arrays, k: int, seed: int) -> np.ndarray:
        """log p(x_n, z | θ) − log q(z | x_n) of local terms, [k, B]; enumerated latents are summed out."""

        def one(values: Any, key: jax.Array, arrays: Arrays) -> jax.Array:
            run = self._pair(values, key, arrays)
            return terms.per_datum(run, terms.log_weight(run))

        return self._many("log_weights", one, arrays, k, seed)

    def elbo(self, arrays: Arrays, draws: int, seed: int) -> np.ndarray:
        """Draws of the ELBO per datum, [draws, B]; global terms are shared out over the N rows."""
        return sum(self.terms(arrays, draws, seed).values())

    def terms(self, arrays: Arrays, draws: int, seed: int) -> dict[str, np.ndarray]:
        """log p of data and log p − log q of latents, [draws, B] each; global ones divided by N."""

        def one(values: Any, key: jax.Array, arrays: Arrays) -> dict[str, jax.Array]:
            size, run = rows_of(arrays), self._pair(values, key, arrays)  # compiled once for any number of rows
            found = terms.site_terms(run)
            terms.per_datum(run, found)
            return {n: t if run.frames(n) else jnp.broadcast_to(t / self.rows, (size,)) for n, t in found.items()}

        return self._many("terms", one, arrays, draws, seed)

    def posterior(self, arrays: Arrays, draws: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Latents ([draws, B, ...] local, [draws, ...] global), and log p and log q of the local terms, [draws, B].

        Latents that are enumerated in the model are drawn from their exact conditional.
        """

        def one(values: Any, key: jax.Array, arrays: Arrays) -> tuple:
            run = terms.run(key, values, self._model, self._guide, (), arrays, self._rows, sum_out=False)
            log_q = {n: run.per_row(log_density(run.q[n]), n) for n in [*run.latents, *run.auxiliary]}
            drawn = {n: run.q[n]["value"] for n in run.latents}
            log_p = self._log_p(values, key, arrays, drawn)
            if self.structure.enumerated:
                drawn |= self._conditional(values, jax.random.fold_in(key, 1), arrays, drawn)
            local_q = [q for n, q in log_q.items() if run.frames(n)]
            q = sum(local_q) if local_q else jnp.zeros_like(log_p)
            return {n: self._rows_first(v, n) for n, v in drawn.items()}, log_p, q

        return self._many("posterior", one, arrays, draws, seed)

    def guided(self, arrays: Arrays, draws: int, seed: int) -> dict[str, np.ndarray]:
        """Draws of the guide's latents given the rows, {site: [draws, B, ...] or [draws, ...] for a global one}."""

        def one(values: Any, key: jax.Array, arrays: Arrays) -> dict[str, jax.Array]:
            q = self._trace(self._guide, values, key, arrays)
            return {name: self._rows_first(q[name]["value"], name) for name in self.structure.sampled}

        return self._many("guided", one, arrays, draws, seed)

    def _log_p(self, values: Any, key: jax.Array, arrays: Arrays, drawn: Mapping[str, jax.Array]) -> jax.Array:
        """log p(x_n, z_n) of local terms at given latents, enumerated ones summed out, [B]."""
        run = self._pair(values, key, arrays, guide=point_masses(drawn))
        return terms.per_datum(run, terms.log_weight(run))

    def _conditional(
        self, values: Any, key: jax.Array, arrays: Arrays, drawn: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """A draw of the enumerated latents given the data and the other latents."""
        from probgen.numpyro.enumeration import draw_conditional

        model = substitute(substitute(self._model, data=dict(values)), data=dict(drawn))
        return draw_conditional(model, key, arrays, list(self.structure.enumerated))

    def log_states(
        self, arrays: Arrays, values: Arrays, sites: Iterable[str]
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """log p(x_n, y_n = k | θ_s) of enumerated local latents, [S, B, K] by site, and log p(θ_s), [S].

        `values` are S draws of every other latent, [S, ...] or [S, B, ...]; without any, S is 1. Other enumerated
        latents are summed out.
        """
        from probgen.numpyro.enumeration import state_table

        sites, draws = tuple(sites), len(next(iter(values.values()), [0]))

        def one(held: Any, drawn: Arrays, _: jax.Array, arrays: Arrays) -> tuple[dict[str, jax.Array], jax.Array]:
            given = {name: self._rows_back(value, name) for name, value in drawn.items()}
            run = self._pair(held, jax.random.key(0), arrays, guide=point_masses(given))
            whole = [n for n in given if not run.frames(n)]
            prior = sum((log_density(run.p[n]).sum() for n in whole), jnp.zeros(()))
            return {name: state_table(run, name) for name in sites}, prior

        with self._scope():
            arrays, values, parts = as_jax(arrays), as_jax(values), []
            chunk = min(self._chunk(rows_of(arrays)), 1 << (draws - 1).bit_length())
            many = self._jit(("log_states", sites), jax.vmap(one, in_axes=(None, 0, 0, None)))
            for first in range(0, draws, chunk):
                at = jnp.minimum(jnp.arange(first, first + chunk), draws - 1)
                part = _numpy(many(self._values, {n: v[at] for n, v in values.items()}, at, arrays))
                parts.append(jax.tree.map(lambda a, first=first: a[: draws - first], part))
        return jax.tree.map(lambda *a: np.concatenate(a), *parts)

    def under_prior(self, names: Collection[str]) -> Trained:
        """The program with the prior of the latents `names` as its guide, in which weights are p(x_n | those latents).

        Latents that are enumerated and not among them are summed out.
        """
        found, hidden = copy.copy(self), lambda site: site["type"] == "sample" and site["name"] not in names
        model = infer_config(self._model, config_fn=lambda site: {"enumerate": None} if site["name"] in names else {})

        def guide(**arrays: Any) -> None:
            with block(hide_fn=hidden), seed(rng_seed=prng_key()):  # what is hidden is drawn too, and needs a key
                model(**arrays)

        sites = {n: replace(s, enumerated=s.enumerated and n not in names) for n, s in self.structure.model.items()}
        found.structure = replace(self.structure, model=sites, guide={n: sites[n] for n in sites if n in names})
        found._model, found._guide, found._compiled = model, guide, {}
        return found

    def log_joint(self, arrays: Arrays, latents: Arrays, seed: int) -> tuple[dict, dict]:
        """Log densities of model and guide at given latents by site: [B] for local sites, scalars for global ones."""

        def run(values: Any, key: jax.Array, arrays: Arrays, given: Arrays) -> tuple[dict, dict]:
            guide = substitute(self._guide, data=given)
            found = terms.run(
                key, values, substitute(self._model, data=given), guide, (), arrays, self._rows, sum_out=False
            )
            model = [*found.observed, *[n for n, s in found.p.items() if terms.drawn(s)]]
            return (
                {n: found.per_row(log_density(found.p[n]), n) for n in model},
                {n: found.per_row(log_density(found.q[n]), n) for n in [*found.latents, *found.auxiliary]},
            )

        with self._scope():
            given = {n: self._rows_back(v, n) for n, v in as_jax(latents).items()}
            return _numpy(self._jit("log_joint", run)(self._values, jax.random.key(seed), as_jax(arrays), given))

    # -- means ---------------------------------------------------------------------------------------------------

    def reconstruct(self, arrays: Arrays, seed: int) -> dict[str, np.ndarray]:
        """The mean of every data site's distribution at one draw of the guide, [B, ...]."""

        def run(values: Any, key: jax.Array, arrays: Arrays) -> dict[str, jax.Array]:
            model_key, guide_key = jax.random.split(key)
            q = self._trace(self._guide, values, guide_key, arrays)
            drawn = {n: q[n]["value"] for n in self.structure.sampled}
            if self.structure.enumerated:
                drawn |= self._conditional(values, jax.random.fold_in(key, 1), arrays, drawn)
            return self._means(self._trace(self._model, values, model_key, arrays, drawn))

        return self._call(("reconstruct",), run, seed, arrays)

    def complete(self, arrays: Arrays, values: Arrays, seed: int) -> dict[str, np.ndarray]:
        """Values of autoregressive sites, rows first, with their NaNs drawn given what comes before."""
        with self._scope():
            key = jax.random.key(seed)
            p = self._trace(self._model, self._values, key, as_jax(arrays))
            return {name: to_numpy(unwrapped(p[name]["fn"]).complete(key, v)) for name, v in as_jax(values).items()}

    def decode(self, latents: Arrays, n: int, seed: int, arrays: Arrays) -> dict[str, np.ndarray]:
        """The mean of every data site's distribution at given latents, [n, ...]; other latents are drawn."""

        def run(values: Any, key: jax.Array, both: tuple[Arrays, Arrays]) -> dict[str, jax.Array]:
            arrays, latents = both
            given = {name: self._rows_back(value, name) for name, value in latents.items()}
            return self._means(self._trace(uncondition(self._model), values, key, arrays, given))

        with self._scope():
            compiled = self._jit(("decode",), run)
            return _numpy(compiled(self._values, jax.random.key(seed), (as_jax(arrays), as_jax(latents))))

    def replicate(self, arrays: Arrays, latents: Arrays, seed: int) -> dict[str, np.ndarray]:
        """A draw of every data site, [S, B, ...], at each draw of the latents: [S, B, ...] local, [S, ...] global ones."""

        def one(values: Any, key: jax.Array, arrays: Arrays, drawn: Arrays) -> dict[str, jax.Array]:
            given = {name: self._rows_back(value, name) for name, value in drawn.items()}
            p = self._trace(uncondition(self._model), values, key, arrays, given)
            return {n: self._rows_first(p[n]["value"], n) for n in self.structure.observed}

        return self._many("replicate", one, arrays, len(next(iter(latents.values()))), seed, latents)

    def _means(self, p: terms.Trace) -> dict[str, jax.Array]:
        return {n: self._rows_first(_mean(p[n]["fn"]), n) for n in self.structure.observed}

    def k_hat(self, log_weights: np.ndarray) -> np.ndarray:
        """Pareto k̂ of every datum's weights [k, B] → [B], by NumPyro's generalised-Pareto fit.

        Below 0.5 the weights have finite variance; above 0.7 an importance-weighted number is not to be trusted
        (Vehtari et al., arXiv:1507.02646).
        """
        from numpyro.infer.importance import _psis_khat

        return np.array([_psis_khat(np.asarray(column, np.float64)) for column in np.asarray(log_weights).T])

    # -- running -------------------------------------------------------------------------------------------------

    def _pair(self, values: Any, key: jax.Array, arrays: Arrays, guide: Callable | None = None) -> terms.Run:
        return terms.run(key, values, self._model, guide or self._guide, (), arrays, self._rows)

    def _trace(
        self, fn: Callable, values: Any, key: jax.Array, arrays: Arrays, given: Mapping[str, Any] | None = None
    ) -> terms.Trace:
        values = {**own_containers(values), **(given or {})}
        return trace(substitute(seed(fn, key), data=values)).get_trace(**arrays)

    def _call(self, name: tuple, run: Callable, seed: int, arrays: Arrays) -> Any:
        """One compiled run."""
        with self._scope():
            return _numpy(self._jit(name, run)(self._values, jax.random.key(seed), as_jax(arrays)))

    def _many(self, name: str, one: Callable, arrays: Arrays, draws: int, seed: int, each: Arrays | None = None) -> Any:
        """`draws` compiled runs, chunk by chunk; the last chunk is filled up so that all have one shape.

        `each` holds arrays [draws, ...] of which every run gets its own.
        """
        with self._scope():
            arrays = as_jax(arrays)
            chunk = min(self._chunk(rows_of(arrays)), 1 << (draws - 1).bit_length())
            many = self._jit((name,), jax.vmap(one, in_axes=(None, 0, None, 0)[: 3 if each is None else 4]))
            key, parts = jax.random.key(seed), []
            for first in range(0, draws, chunk):
                keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(first, first + chunk))
                own = np.minimum(np.arange(first, first + chunk), draws - 1)
                more = () if each is None else (as_jax({n: np.asarray(a)[own] for n, a in each.items()}),)
                part = _numpy(many(self._values, keys, arrays, *more))
                parts.append(jax.tree.map(lambda a, first=first: a[: draws - first], part))
        return jax.tree.map(lambda *a: np.concatenate(a), *parts)

    def _chunk(self, rows: int) -> int:
        """How many draws are taken at once, a power of two."""
        sites = [*self.structure.model.values(), *self.structure.guide.values()]
        numbers = sum(int(np.prod(s.shape)) * rows // max(1, _rows_in(s)) for s in sites)
        return 1 << max(0, (NUMBERS // max(1, numbers)).bit_length() - 1)

    def _jit(self, name: Any, run: Callable) -> Callable:
        if name not in self._compiled:
            self._compiled[name] = jax.jit(run)
        return self._compiled[name]

    def _scope(self) -> Any:
        fns = [self.program.model, self.program.guide] if hasattr(self, "program") else []
        return Scope(self._device, self.precision, False, modules_of(*fns))

    def _rows_first(self, value: jax.Array, name: str) -> jax.Array:
        axis = row_axis(self.structure.model.get(name) or self.structure.guide[name])
        return value if axis is None else jnp.moveaxis(value, axis, 0)

    def _rows_back(self, value: jax.Array, name: str) -> jax.Array:
        site = self.structure.model.get(name)
        if site is None:
            raise ProbgenError(f"the program has no latent {name!r}; there are: {', '.join(self.structure.latents)}")
        axis = row_axis(site)
        return value if axis is None else jnp.moveaxis(value, 0, axis)


def _rows_in(site: Site) -> int:
    return next((plate.size for plate in site.plates if plate.data), 1)


def _filled(value: Any, more: int) -> Any:
    """The last row repeated `more` times."""
    return np.concatenate([value, np.repeat(value[-1:], more, axis=0)]) if more else value


def _support(fn: Any) -> jax.Array | None:
    """All the values that a discrete distribution takes, [K, *event]; None where there is no end of them."""
    if not fn.has_enumerate_support:
        return None
    try:
        values = fn.enumerate_support(expand=False)
    except NotImplementedError:
        return None
    return values.reshape(len(values), *fn.event_shape)


def _mean(fn: Any) -> jax.Array:
    """A distribution's mean; of a class its most probable one."""
    base = unwrapped(fn)
    if hasattr(base, "probs") and type(base).__name__.startswith("Categorical"):
        return jnp.broadcast_to(jnp.argmax(base.probs, -1), fn.shape())
    try:
        return jnp.broadcast_to(fn.mean, fn.shape())
    except (NotImplementedError, AttributeError) as error:
        raise ProbgenError(f"the distribution {type(base).__name__} of a data site has no mean to show") from error


def point_masses(drawn: Mapping[str, jax.Array]) -> Callable[..., None]:
    """A guide that puts all its mass at given values and adds nothing to a density."""
    import numpyro
    from numpyro.distributions import Delta

    def guide(**_: Any) -> None:
        for name, value in drawn.items():
            numpyro.sample(name, Delta(value, event_dim=jnp.ndim(value)))

    return guide


def _numpy(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)
