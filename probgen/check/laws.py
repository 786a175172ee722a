"""The laws that every program obeys, one function each: what `probgen check` and the test-suite both run.

A law returns a `Verdict`; where the program's kind leaves it undefined it says so. Random draws are seeded. A law
that compares estimates allows for five standard errors: fewer than one false alarm in a million.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from probgen.check.subject import Subject, Verdict
from probgen.program import Program, Site
from probgen.supports import word

_ERRORS = 5.0
_DRAWS = 200
_TRAINED = 150  # steps


def law_runs(subject: Subject) -> Verdict:
    """The program runs on its data, with a finite loss, and without them."""
    law = "runs"
    engine = subject.engine()
    loss = engine.loss_on(engine.start(), [subject.arrays], subject.seed)
    if not np.isfinite(loss):
        site = engine.diagnose(engine.start(), 0)
        return Verdict(law, False, f"the loss on the first batch is {loss}: {site}")
    draws = subject.trained.draw(subject_rows(subject), subject.seed, subject.arrays)
    for name in subject.structure.observed:
        if not np.isfinite(draws[name]).all():
            return Verdict(
                law, False, f"a draw of the unconditioned program has a value of {name!r} that is not finite"
            )
    return Verdict(law, True, f"on data (loss {loss:.4g} nats per datum) and unconditioned")


def law_data_plate(subject: Subject) -> Verdict:
    """Every data site lies in a plate as long as the batch."""
    law, structure, batch = "data plate", subject.structure, subject_rows(subject)
    outside = [n for n, s in structure.observed.items() if not s.local and s.shape[:1] == (batch,)]
    if outside and subject.batch_size is None:
        return Verdict(law, None, "the program is given whole arrays, so no plate has to stand for the other rows")
    if outside:
        name = outside[0]
        return Verdict(
            law, False, f'no plate holds the rows of {name!r}: write `with plate("data", len({name})):` around it'
        )
    if not structure.data_plates:
        return Verdict(law, None, "no data site has one value a row")
    stated = ", which states its own size" if structure.states_rows else ""
    return Verdict(law, True, f"{', '.join(structure.data_plates)}{stated}")


def law_scaling(subject: Subject) -> Verdict:
    """A batch stands for all N rows: the ELBO as trained equals the ELBO per datum, summed site by site.

    It compares the engine's loss, with its scales and its closed-form KLs, to log p − log q of plain draws.
    """
    law, structure = "scaling", subject.structure
    if structure.kind in ("implicit", "unnormalised"):
        return Verdict(law, None, f"an {structure.kind} program has no ELBO")
    engine = subject.engine(by=subject.backend.ELBO())
    state, draws = engine.start(), 20 if structure.has_global_latents else _DRAWS
    losses = np.array([-engine.loss_on(state, [subject.arrays], seed) for seed in range(20)], np.float64)
    plain = (
        _starting(subject, engine.weights(state)).elbo(subject.arrays, draws, subject.seed).astype(np.float64).mean(1)
    )
    gap, error = losses.mean() - plain.mean(), np.hypot(_error(losses), _error(plain))
    slack = 1e-4 * (1 + abs(plain.mean()))
    if not abs(gap) <= _ERRORS * error + slack:
        return Verdict(
            law,
            False,
            f"the loss says an ELBO of {losses.mean():.5g} nats per datum, the sites sum to {plain.mean():.5g}: let the "
            f"data plate be as long as the batch, or state N = {len(subject.data.train)}, and scale nothing yourself",
        )
    return Verdict(law, True, f"the loss and the sum over sites agree ({plain.mean():.4g} nats per datum)")


def law_fast_loss(subject: Subject) -> Verdict:
    """The bound of a diffusion by one random step is that of its whole chain, in expectation."""
    law = "fast loss"
    if type(subject.by).__name__ != "DiffusionELBO":
        return Verdict(law, None, "the program is not learned by the steps of a diffusion")
    engine = subject.engine(by=subject.backend.DiffusionELBO())
    state = engine.advance(engine.start(), 0, _TRAINED)[0]  # untrained networks err by far more than what is looked for
    steps = np.array([-engine.loss_on(state, [subject.arrays], seed) for seed in range(_DRAWS)], np.float64)
    whole = (
        _starting(subject, engine.weights(state)).elbo(subject.arrays, _DRAWS, subject.seed).astype(np.float64).mean(1)
    )
    gap, error = steps.mean() - whole.mean(), np.hypot(_error(steps), _error(whole))
    if not abs(gap) <= _ERRORS * error + 1e-4 * (1 + abs(whole.mean())):
        return Verdict(
            law,
            False,
            f"one step of the chain says an ELBO of {steps.mean():.5g} nats per datum, model and guide {whole.mean():.5g}: let "
            "the model draw from chain.prior, chain.reverse and chain.decoder, and the guide from chain.forward",
        )
    return Verdict(
        law, True, f"one random step and the whole chain have the same bound ({whole.mean():.4g} nats per datum)"
    )


def law_guide(subject: Subject) -> Verdict:
    """The guide draws the model's latents and no others, each with the model's shape and support."""
    law, structure = "guide", subject.structure
    if not structure.guide:
        return Verdict(law, None, "there is none, and none is needed")
    strange = [n for n, s in structure.guide.items() if s.role == "latent" and n not in structure.model]
    strange = [n for n in strange if not n.startswith("_")]  # an autoguide's own
    if strange:
        names = ", ".join(structure.latents) or "none"
        return Verdict(law, False, f"the guide draws {strange[0]!r}, which is no latent of the model; it has {names}")
    draws = subject.trained.draw(subject_rows(subject), subject.seed, subject.arrays, prior=True)
    for name, p in structure.sampled.items():
        q = structure.guide[name]
        if p.local and q.shape != draws[name].shape:
            return Verdict(
                law, False, f"{name!r} has shape {q.shape} in the guide and {draws[name].shape} in the model"
            )
        if p.local != q.local:
            here, there = ("model", "guide") if p.local else ("guide", "model")
            return Verdict(law, False, f"{name!r} lies in the data plate in the {here}, but not in the {there}")
        if not _inside(q, p):
            return Verdict(
                law,
                False,
                f"the guide draws {name!r} from a {q.family} on {q.support}, outside the support of the model's "
                f"{p.family}, {p.support}: choose a guide with that support",
            )
    return Verdict(law, True, f"{', '.join(structure.sampled)}: drawn with the model's shapes and supports")


def law_shapes(subject: Subject) -> Verdict:
    """A draw of each data site has the shape of its data."""
    law, rows = "shapes", subject_rows(subject)
    draws = subject.trained.draw(rows, subject.seed, subject.arrays, prior=True)
    for name, site in subject.structure.observed.items():
        if draws[name].shape != site.shape:
            return Verdict(
                law,
                False,
                f"the data of {name!r} have shape {site.shape}, its distribution draws {draws[name].shape}: "
                "give the distribution the shape of the data, and to_event for their axes",
            )
    return Verdict(law, True, "draws of the data sites have the shapes of the data")


def law_gradients(subject: Subject) -> Verdict:
    """Three steps move every parameter: the loss depends on each."""
    law, engine = "gradients", subject.engine()
    before, names = subject.weights, set(subject.trained.params)
    if not names:
        return Verdict(law, None, "the program has no parameters")
    state, _ = engine.advance(engine.start(), 0, 3)
    after = engine.weights(state)
    still = [n for n in names if n in before and before[n].size and np.array_equal(before[n], after[n])]
    if still:
        return Verdict(
            law,
            False,
            f"no gradient reaches the parameter {min(still)!r}: use it in the model or the guide, or remove it",
        )
    return Verdict(law, True, f"they reach all {len(names)} parameters")


def law_rows(subject: Subject) -> Verdict:
    """The density of a row does not depend on the other rows of its batch."""
    law, rows = "rows", subject_rows(subject)
    missing = _without_row_densities(subject) or ("a batch of one row says nothing" if rows < 2 else None)
    if missing:
        return Verdict(law, None, missing)
    other = {name: np.concatenate([a[1:2], a[1:]]) for name, a in subject.arrays.items()}
    here, there = (subject.trained.log_weights(a, 2, subject.seed)[:, 1:] for a in (subject.arrays, other))
    if not np.allclose(here, there, rtol=1e-3, atol=1e-3):
        return Verdict(
            law, False, "the density of a row changes with another row of its batch: compute each row from itself alone"
        )
    return Verdict(law, True, "no row's density depends on another row")


def law_missing_values(subject: Subject) -> Verdict:
    """A NaN in an observation is not passed over: the density of its row is not a number either."""
    law = "missing values"
    floats = [n for n, use in subject.structure.arrays.items() if use == "data" and subject.arrays[n].dtype.kind == "f"]
    missing = _without_row_densities(subject) or (None if floats else "no data array holds floats")
    if missing:
        return Verdict(law, None, missing)
    for name in floats:
        bad = np.array(subject.arrays[name])
        bad.reshape(len(bad), -1)[0, 0] = np.nan
        try:
            weights = subject.trained.log_weights({**subject.arrays, name: bad}, 1, subject.seed)
        except (ValueError, RuntimeError):  # refused by the distribution itself
            continue
        if np.isfinite(weights[:, 0]).all():
            return Verdict(
                law,
                False,
                f"a NaN in {name!r} goes unnoticed, and the density of its row is finite: mark what is missing by an "
                "array of its own and mask(), instead of replacing it",
            )
    return Verdict(law, True, "a NaN in an observation is noticed")


def law_save_and_open(subject: Subject) -> Verdict:
    """Saved and opened, in a program built afresh from other weights, it gives the same numbers."""
    from safetensors.numpy import load, save

    law = "save and open"
    weights = load(save({name: np.array(value, order="C") for name, value in subject.weights.items()}))
    opened = subject.with_weights(weights, _rebuilt(subject))
    before, after = (_numbers(subject, trained) for trained in (subject.trained, opened))
    for name, value in before.items():
        if not np.array_equal(value, after[name], equal_nan=True):
            return Verdict(
                law,
                False,
                f"opened again, the program gives other values of {name}: something it computes with is neither a "
                "parameter, a module's buffer, nor an option",
            )
    return Verdict(law, True, "the same numbers, to the bit")


def law_bounds(subject: Subject) -> Verdict:
    """ELBO ≤ IWAE-5 ≤ IWAE-50, each estimated from draws of its own."""
    law, structure = "bounds", subject.structure
    if structure.kind != "latent" or not structure.sampled:
        return Verdict(law, None, f"the program is {structure.kind}: it needs no bound")
    if structure.has_global_latents:
        return Verdict(law, None, "with global latents the bound is one number for all rows")
    trained, arrays, seed = subject.trained, subject.arrays, subject.seed
    bounds = {
        "ELBO": trained.elbo(arrays, _DRAWS, seed),
        "IWAE-5": _iwae(trained.log_weights(arrays, 5 * 60, seed + 1), 5),
        "IWAE-50": _iwae(trained.log_weights(arrays, 50 * 30, seed + 2), 50),
    }
    means = {name: values.mean() for name, values in bounds.items()}
    errors = {
        name: float(np.sqrt((values.var(0, ddof=1) / len(values)).sum()) / values.shape[1])
        for name, values in bounds.items()
    }
    for lower, upper in (("ELBO", "IWAE-5"), ("IWAE-5", "IWAE-50")):
        if means[lower] - means[upper] > _ERRORS * np.hypot(errors[lower], errors[upper]) + 1e-4 * abs(means[lower]):
            return Verdict(
                law,
                False,
                f"{lower} = {means[lower]:.5g} lies above {upper} = {means[upper]:.5g}: the program is not the "
                "same at every call: keep no state in it, and let nothing depend on the length of the batch",
            )
    return Verdict(law, True, " ≤ ".join(f"{name} {value:.4g}" for name, value in means.items()))


def law_density(subject: Subject) -> Verdict:
    """The density of an exact program sums, or integrates, to one."""
    from probgen.check.densities import total_mass

    law, structure = "density", subject.structure
    if structure.kind != "exact" or structure.has_global_latents:
        return Verdict(law, None, f"the program is {structure.kind}: only an exact density is summed up")
    mass = total_mass(subject)
    if isinstance(mass, str):
        return Verdict(law, None, mass)
    if not abs(mass - 1) <= 0.01:
        return Verdict(
            law, False, f"the density sums to {mass:.4g}, not to 1: a log-determinant or a normaliser is wrong"
        )
    return Verdict(law, True, f"it sums to {mass:.4f}")


def law_compiled(subject: Subject) -> Verdict:
    """The compiled step gives the losses of the eager one, with the same random stream."""
    law = "compiled"
    if hasattr(subject.program.by, "engine"):
        return Verdict(law, None, "what learns this program takes no gradient steps that could be compiled")
    eager, compiled = (subject.engine(compile=c, precision="64") for c in (False, True))
    _, one = eager.advance(eager.start(), 0, 3)
    _, two = compiled.advance(compiled.start(), 0, 3)
    if compiled.note:
        return Verdict(law, False, compiled.note)
    difference = float(np.max(np.abs(one["loss"] - two["loss"]) / np.maximum(np.abs(one["loss"]), 1e-12)))
    if not difference <= 1e-10:
        return Verdict(
            law, False, f"compiled and eager losses differ by {difference:.1e}: a branch reads a value of a tensor"
        )
    return Verdict(law, True, f"equal to the eager step (relative difference {difference:.0e})")


LAWS: tuple[Callable[[Subject], Verdict], ...] = (
    law_runs,
    law_data_plate,
    law_shapes,
    law_guide,
    law_gradients,
    law_scaling,
    law_fast_loss,
    law_rows,
    law_missing_values,
    law_bounds,
    law_density,
    law_save_and_open,
)


def subject_rows(subject: Subject) -> int:
    """B, the rows of the batch that laws look at."""
    return len(next(iter(subject.arrays.values())))


def _starting(subject: Subject, weights: dict[str, np.ndarray]) -> Any:
    """The program with these weights: EM starts from the data, and so not where the ELBO does."""
    same = all(np.array_equal(value, subject.weights[name]) for name, value in weights.items())
    return subject.trained if same else subject.with_weights(weights)


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _iwae(log_weights: np.ndarray, k: int) -> np.ndarray:
    """Estimates of IWAE-k from log weights [R k, B]: [R, B]."""
    groups = log_weights.astype(np.float64).reshape(-1, k, log_weights.shape[1])
    return np.logaddexp.reduce(groups, axis=1) - np.log(k)


def _without_row_densities(subject: Subject) -> str | None:
    structure = subject.structure
    if structure.kind in ("implicit", "unnormalised"):
        return f"an {structure.kind} program has no density of a row"
    if not structure.data_plates:
        return "without a data plate no row has a density of its own"
    return None


def _rebuilt(subject: Subject) -> Program:
    """The program built again from its file with other weights, where it comes from one."""
    origin = subject.program.origin
    if origin.path is None:
        return subject.program
    from probgen.zoo import build

    return build(origin.path, subject.data.spec, origin.seed + 1, origin.options)


def _numbers(subject: Subject, trained: Any) -> dict[str, np.ndarray]:
    rows, seed = subject_rows(subject), subject.seed
    found = {f"a draw of {n}": v for n, v in trained.draw(rows, seed, subject.arrays, prior=True).items()}
    if subject.structure.kind in ("exact", "latent"):
        found["log p(x, z) − log q(z | x)"] = trained.log_weights(subject.arrays, 2, seed)
    return found


def _inside(q: Site, p: Site) -> bool:
    """Whether the guide's support lies in the model's, as far as their names tell; a point mass may lie anywhere."""
    if q.delta or p.discrete != q.discrete:
        return q.delta
    if p.discrete or not p.support or not q.support:
        return True
    words = [word(site.support) for site in (q, p)]
    if words[0] == words[1] or words[1].startswith("real"):
        return True
    half_lines = ("positive", "greaterthan", "greaterthaneq", "nonnegative")
    return words[1] in half_lines and words[0] in (*half_lines, "unitinterval", "interval")
