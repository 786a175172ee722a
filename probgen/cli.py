"""The command line: `probgen list | show | check | fit | resume | sample | posterior | evaluate | report | compare`.

Each command reads its words, calls one verb, and prints where the result lies. Nothing heavy is imported before a
command needs it. A mistake is one line on stderr and exit status 2; Ctrl-C exits 130, SIGTERM 143.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import itertools
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from probgen.errors import ProbgenError, did_you_mean
from probgen.parsing import CommandLine, called, help_of
from probgen.program import Program, backend_of
from probgen.schedules import Cosine, Linear, Steps
from probgen.zoo import list_models, load, options_of

if TYPE_CHECKING:
    from probgen.check.subject import Verdict
    from probgen.data import Data
    from probgen.run import Run

_RECIPE: dict[str, tuple[Any, str]] = {
    "epochs": (int, "passes over the training rows"),
    "steps": (int, "gradient steps, instead of epochs"),
    "batch_size": (int | None, "rows a step; null for all of them (default: 128)"),
    "lr": (float | dict, "learning rate, or a mapping by player (default: 1e-3)"),
    "optimizer": (str | dict, "its name, or a mapping by player (default: adam)"),
    "schedule": (str, "factor on the learning rate by step, e.g. 'Cosine(1, 0, 5000)'"),
    "clip": (float, "largest norm of the gradient"),
    "ema": (float, "decay of the averaged weights, e.g. 0.999"),
    "patience": (int, "stop after this many epochs without a better validation loss"),
    "device": (str, "auto, cpu, cuda or cuda:1 (default: auto)"),
    "precision": (Literal["32", "64", "bf16-mixed"], "of the floats (default: 32)"),
    "compile": (bool | Literal["auto"], "trace and compile the step (default: auto)"),
}


@dataclass(frozen=True)
class Command:
    """A word after `probgen`: what it takes first, what it does, and the function that does it."""

    takes: str
    summary: str
    run: Callable[[list[str]], int]


class Terminated(KeyboardInterrupt):
    """SIGTERM, which stops a command as Ctrl-C does, checkpoint included."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, _terminate)
        with _notes():
            return _dispatch(words)
    except ProbgenError as error:
        print(f"probgen: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        if stop.args:
            print(f"probgen: {stop}", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    except BrokenPipeError:  # `probgen list | head`
        sys.stderr.close()
        return 141
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """Inside, a warning is one line on stderr, without the line of code that it came from."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"note: {' '.join(str(message).split())}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _terminate(signum: int, frame: Any) -> None:
    raise Terminated


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] in ("-V", "--version", "version"):
        from importlib.metadata import version

        print(f"probgen {version('probgen')}")
        return 0
    if words[0] not in COMMANDS:
        raise ProbgenError(f"there is no command {words[0]!r}{did_you_mean(words[0], COMMANDS)}")
    try:
        return COMMANDS[words[0]].run(words[1:])
    except SystemExit as done:  # --help has printed
        if done.code not in (0, None):
            raise
        return 0


def _help() -> str:
    lines = [f"  {name + ' ' + command.takes:<17} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: probgen COMMAND ...",
            "",
            "Deep generative models written as probabilistic programs, on Pyro and NumPyro.",
            "",
            *lines,
            "",
            "MODEL is a name from `probgen list` or a .py file of your own; RUN is the folder of a run.",
            "`probgen COMMAND --help` tells a command's options, `probgen fit vae --help` the model's too.",
            "",
            "Start here:  probgen fit vae --data digits --z_dim 2 --out runs/vae",
        ]
    )


# Models


def _list(words: list[str]) -> int:
    _line("list").parse(words)
    found = list_models()
    width = max((len(model.name) for model in found), default=0)
    for family in dict.fromkeys(model.family for model in found):
        print(family)
        for model in found:
            if model.family == family:
                print(f"  {model.name:<{width}}  {model.summary}")
    return 0


def _show(words: list[str]) -> int:
    model, words = _leading("show", words)
    line = _model_line("show", model)
    line.add("--dot", str, "write the plate diagram to this file, as graphviz source")
    _add_model_options(line, model)
    given = line.parse(words)
    target = _target("--dot", given.get("dot"))
    data, program = _loaded(model, given)
    from probgen.show import show

    description = show(program, data)
    print(description)
    if target is not None:
        target.write_text(description.dot, encoding="utf-8")
        print(f"\n{target}")
    return 0


def _check(words: list[str]) -> int:
    model, words = _leading("check", words)
    line = _model_line("check", model)
    line.add("--compile", bool, "compare the compiled step with the eager one too")
    line.add("--calibration", bool, "fit it by its own recipe, and see whether its posteriors are calibrated")
    line.add("--simulations", int, "of the calibration (default: 1000; 100 where each one is fitted anew)")
    _add_model_options(line, model)
    given = line.parse(words)
    if "simulations" in given and not given.get("calibration"):
        raise ProbgenError("--simulations is of the calibration: add --calibration")
    data, program = _loaded(model, given)
    from probgen.check import verdicts

    passed = []
    for verdict in verdicts(program, data, given.get("seed", 0), given.get("compile", False)):
        print(verdict, flush=True)
        passed.append(verdict.passed)
    if given.get("calibration") and passed[0] is not False:
        for verdict in _calibrated(program, data, given):
            print(verdict, flush=True)
            passed.append(verdict.passed)
    held, broken = passed.count(True), passed.count(False)
    print(f"\n{held} hold, {broken} broken, {passed.count(None)} do not apply")
    return 1 if broken else 0


def _calibrated(program: Program, data: Data, given: dict[str, Any]) -> Iterator[Verdict]:
    """The verdicts of simulation-based calibration, after a fit by the program's own recipe."""
    from probgen.check import calibrated
    from probgen.fit import fit

    print("… calibration: first the program is fitted by its own recipe", flush=True)
    seed = given.get("seed", 0)
    return calibrated(fit(program, data, seed=seed), seed=seed, simulations=given.get("simulations"))


def _fit(words: list[str]) -> int:
    model, words = _leading("fit", words)
    line = _model_line("fit", model)
    line.add("--by", str, "the loss, e.g. iwae or 'IWAE(num_particles=5)' (default: the model's)")
    for name, (annotation, text) in _RECIPE.items():
        line.add(f"--{name}", annotation, text, "recipe (where you are silent, the model's own)")
    line.add("--out", str, "the run's folder (default: runs/MODEL-N)")
    _add_ending(line)
    _add_model_options(line, model)
    given = _with_ending(line.parse(words))
    data, program = _loaded(model, given)
    recipe = {name: given[name] for name in _RECIPE if name in given}
    if "by" in given:
        recipe["by"] = called(given["by"], _losses(program), "loss")
    if "schedule" in given:
        recipe["schedule"] = called(given["schedule"], _schedules(), "schedule")
    from probgen.fit import fit

    out = Path(given["out"]) if "out" in given else _next_folder(program.origin.name)
    run = fit(program, data, out=out, seed=given.get("seed", 0), **recipe)
    return _ending(run, data, given)


def _resume(words: list[str]) -> int:
    path, words = _leading("resume", words)
    line = _line(f"resume {path or 'RUN'}")
    line.add("--data", str, "the data, where they have moved")
    _add_ending(line)
    given = _with_ending(line.parse(words))
    from probgen.fit import resume

    run = resume(Path(path), data=_data(given["data"]) if "data" in given else None)
    return _ending(run, run.data, given)


def _add_ending(line: CommandLine) -> None:
    line.add("--no-report", bool, "stop after fitting: no evaluation, no report")
    line.add("--k", int, "importance samples of the evaluation (default: 1000)")


def _with_ending(given: dict[str, Any]) -> dict[str, Any]:
    """What was given, unless the numbers after the fit could not be had: that is said before it begins."""
    if given.get("k", 1000) < 2:
        raise ProbgenError(f"`k` is {given['k']}, and an error estimate needs at least 2 importance samples")
    return given


def _ending(run: Run, data: Data, given: dict[str, Any]) -> int:
    """After a fit: honest numbers on the test rows, and the report."""
    if given.get("no_report"):
        print(run.path)
        return 0
    if len(data.test):
        run.evaluate(data.test, k=given.get("k", 1000))
        _print_numbers(run)
    else:
        print("the data have no test rows: nothing to evaluate on")
    print(run.report())
    return 0


# Runs


def _sample(words: list[str]) -> int:
    path, words = _leading("sample", words)
    line = _line(f"sample {path or 'RUN'}")
    line.add("-n --number", int, "how many draws (default: 64)")
    line.add("--seed", int, "of the draws (default: 0)")
    line.add("--given", str, "values of arrays that the model is given, e.g. 'y=3'")
    line.add("--prior", bool, "take global latents from the model, not from the posterior")
    line.add("--sampler", str, "e.g. ddim, 'DDIM(50, eta=0.5)', langevin (default: the program itself)")
    line.add("--steps", int, "of the sampler")
    line.add("--out", str, "the file of the draws (default: RUN/samples.npz)")
    options = line.parse(words)
    target = _target("--out", options.get("out"), ".npz")
    run, number = _opened(path), options.get("number", 64)
    values = run.sample(
        number,
        seed=options.get("seed", 0),
        given=_assignments(options["given"]) if "given" in options else None,
        prior=options.get("prior", False),
        sampler=_sampler(options),
    )
    for name, value in values.items():
        print(f"{name}: {' x '.join(str(n) for n in value.shape)}")
    for written in _write_samples(run, values, target):
        print(written)
    return 0


def _sampler(options: dict[str, Any]) -> Any:
    """The sampler that `--sampler` names, with `--steps` steps; None where the program samples itself."""
    from probgen.diffusion.samplers import SAMPLERS
    from probgen.energy import Langevin

    if "sampler" not in options:
        if "steps" in options:
            raise ProbgenError("`--steps` are those of a sampler: name one, e.g. --sampler ddim")
        return None
    sampler = called(options["sampler"], {each.__name__: each for each in (*SAMPLERS, Langevin)}, "sampler")
    return dataclasses.replace(sampler, steps=options["steps"]) if "steps" in options else sampler


def _posterior(words: list[str]) -> int:
    path, words = _leading("posterior", words)
    line = _rows_line("posterior", path)
    line.add("--draws", int, "draws a row (default: 100)")
    line.add("--rows", int, "at most this many rows (default: 1000)")
    given = line.parse(words)
    run = _opened(path)
    rows = _rows(run, given)
    tree = run.posterior(rows, **{name: given[name] for name in ("draws", "rows", "seed") if name in given})
    for name, group in tree.children.items():
        print(f"{name}: {', '.join(str(variable) for variable in group.data_vars)}")
    print(Path(path) / "posterior.nc")
    return 0


def _evaluate(words: list[str]) -> int:
    path, words = _leading("evaluate", words)
    line = _rows_line("evaluate", path)
    line.add("--k", int, "importance samples (default: 1000; of --evidence the most, 100000)")
    line.add("--evidence", bool, "a table in its place: log p(x) by prior sampling beside importance weights")
    given = line.parse(words)
    run = _opened(path)
    if given.get("evidence"):
        most = given.get("k", 100_000)
        numbers = [k for k in (10, 100, 1000, 10_000) if k < most] + [most]
        print(run.evidence(_rows(run, given), k=numbers, seed=given.get("seed", 0)))
        return 0
    run.evaluate(_rows(run, given), **{name: given[name] for name in ("k", "seed") if name in given})
    _print_numbers(run)
    print(Path(path) / "evaluation.json")
    return 0


def _report(words: list[str]) -> int:
    path, words = _leading("report", words)
    _line(f"report {path or 'RUN'}").parse(words)
    print(_opened(path).report())
    return 0


def _compare(words: list[str]) -> int:
    paths = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    _leading("compare", words)
    line = _line("compare RUN RUN ...")
    line.add("--data", str, "the data, where no run finds them again")
    line.add("--rows", int, "test rows of the likelihoods, the first ones (default: all)")
    line.add("--k", int, "importance samples where latents are integrated out (default: 1000)")
    line.add("--samples", int, "draws of each run, at most as many as test rows (default: 2000)")
    line.add("--seed", int, "of every draw (default: 0)")
    line.add("--out", str, "the file of the page (default: compare.html)")
    given = line.parse(words[len(paths) :])
    target = _target("--out", given.get("out", "compare.html"), ".html")
    from rich.console import Console

    from probgen.compare import compare
    from probgen.compare.terminal import printed

    options = {name: given[name] for name in ("rows", "k", "samples", "seed") if name in given}
    data = _data(given["data"]) if "data" in given else None
    Console(highlight=False).print(printed(compare([_opened(path) for path in paths], data, out=target, **options)))
    print(target)
    return 0


COMMANDS = {
    "list": Command("", "the models of the zoo", _list),
    "show": Command("MODEL", "a program's sites, shapes and plates, its factorisation, its diagram", _show),
    "check": Command("MODEL", "the laws on a program: a tick, or one sentence with the cure", _check),
    "fit": Command("MODEL", "train a program on data, evaluate it, write a report", _fit),
    "resume": Command("RUN", "go on with a fit that was stopped", _resume),
    "sample": Command("RUN", "draw from the trained program", _sample),
    "posterior": Command("RUN", "draw the latents of rows, as ArviZ groups", _posterior),
    "evaluate": Command("RUN", "likelihood and diagnostics on held-out rows, with errors", _evaluate),
    "report": Command("RUN", "write report.html again", _report),
    "compare": Command("RUN", "one table over runs on the same data, and compare.html", _compare),
}


# What commands share


def _line(words: str) -> CommandLine:
    """The command line of `probgen WORDS`, without options yet."""
    summary = COMMANDS[words.partition(" ")[0]].summary
    return CommandLine(f"probgen {words}", summary[0].upper() + summary[1:] + ".")


def _leading(command: str, words: list[str]) -> tuple[str, list[str]]:
    """The model or the run, which comes first, and the words after it; "" where help alone is asked for."""
    if words and words[0] in ("-h", "--help"):
        return "", ["--help"]
    takes = COMMANDS[command].takes
    if not words or words[0].startswith("-"):
        example = "vae --data digits" if takes == "MODEL" else "runs/vae"
        raise ProbgenError(f"probgen {command} wants a {takes} first, e.g. `probgen {command} {example}`")
    return words[0], words[1:]


def _model_line(command: str, model: str) -> CommandLine:
    line = _line(f"{command} {model or 'MODEL'}")
    line.add_config()
    line.add("--data", str, "a name (digits, ring, ...), a file, a folder, or hf:NAME")
    line.add("--seed", int, "of the weights, the order of the data and every draw (default: 0)")
    return line


def _add_model_options(line: CommandLine, model: str) -> None:
    if model:
        factory, options = options_of(model)
        line.add_options(f"options of {Path(model).name}", options, help_of(factory))


def _rows_line(command: str, path: str) -> CommandLine:
    line = _line(f"{command} {path or 'RUN'}")
    line.add("--data", str, "other data than the run was fitted on")
    line.add("--split", Literal["train", "valid", "test"], "which rows (default: test)")
    line.add("--seed", int, "of the draws (default: 0)")
    return line


def _data(source: str) -> Data:
    from probgen.data import load_data

    return load_data(source)


def _loaded(model: str, given: dict[str, Any]) -> tuple[Data, Program]:
    """The data that `--data` names, and the program built for them."""
    if "data" not in given:
        raise ProbgenError("say which data with --data, e.g. --data digits, --data ring or --data my.npz")
    data = _data(given["data"])
    return data, load(model, data, seed=given.get("seed", 0), **given["model"])


def _losses(program: Program) -> dict[str, Any]:
    """What `--by` can name: the losses of the program's own backend, and the schedules they may take."""
    backend = backend_of(program)
    public = {name: getattr(backend, name) for name in dir(backend) if not name.startswith("_")}
    return {n: v for n, v in public.items() if hasattr(v, "players")} | _schedules()


def _schedules() -> dict[str, Any]:
    return {"Linear": Linear, "Cosine": Cosine, "Steps": Steps}


def _next_folder(name: str) -> Path:
    """runs/NAME-N for the first N that no folder has."""
    return next(path for n in itertools.count(1) if not (path := Path("runs") / f"{name}-{n}").exists())


def _opened(path: str) -> Run:
    from probgen.run import Run

    return Run.open(Path(path))


def _rows(run: Run, given: dict[str, Any]) -> Any:
    """The rows that `--data` and `--split` name."""
    data = _data(given["data"]) if "data" in given else run.data
    if data is None:
        raise ProbgenError("the data of this run cannot be found again: say where they lie, with --data")
    split = given.get("split", "test")
    rows = getattr(data, split)
    if not len(rows):
        raise ProbgenError(f"the data have no {split} rows: choose others, with --split")
    return rows


def _assignments(text: str) -> dict[str, Any]:
    """`y=3` or `y=3,w=[0.1,0.2]` as a mapping of plain values."""
    try:
        call = ast.parse(f"given({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not call.keywords:
            raise ValueError
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        raise ProbgenError(f"--given must be like 'y=3' or 'y=3, w=[0.1, 0.2]', not {text!r}") from None


def _target(flag: str, text: str | None, ending: str = "") -> Path | None:
    """The file that an option names, which can be written; said before anything is computed."""
    if text is None:
        return None
    path = Path(text).expanduser()
    if ending and path.suffix != ending:
        raise ProbgenError(f"{flag} must be a file that ends in {ending}, not {text}")
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"lies in {path.parent}, which is no folder"
        raise ProbgenError(f"{flag} {text} {what}: name a file in a folder that there is")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ProbgenError(f"{flag} {text} cannot be written: name a file where you may write")
    return path


def _write_samples(run: Run, values: dict[str, Any], out: Path | None) -> list[Path]:
    """The draws as arrays, and beside those in the run's folder a picture of draws; the paths written."""
    import numpy as np

    if out is not None:
        np.savez(out, **values)
        return [out]
    from probgen.pictures import detached, samples

    with run.folder.writer():
        run.folder.write_with("samples.npz", lambda path: np.savez(path, **values))
        with detached():
            figure = samples(run).figure
        run.folder.write_with("pictures/samples.png", lambda path: figure.savefig(path, dpi=200))
    return [run.path / "samples.npz", run.path / "pictures" / "samples.png"]


def _print_numbers(run: Run) -> None:
    from rich.console import Console

    from probgen.summary import summary_table

    Console(highlight=False).print(summary_table(run))


if __name__ == "__main__":
    sys.exit(main())
