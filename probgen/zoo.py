"""Model files: found by name or by path, run as Python, and turned into a `Program`.

A model file holds a function `program(spec, ...) -> Program`, whose signature is its options, or just `model`
(and `guide`, `by`, `prepare`, `defaults`, `denoiser`) at top level. There is no registry: a name is
the name of a file. This module alone knows where the zoo lies.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import itertools
import random
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from probgen.errors import ProbgenError, did_you_mean
from probgen.options import Option, bound, refuse_unknown, signature_options
from probgen.program import Origin, Program

_ORDER = itertools.count(1)
_TOP_LEVEL = tuple(f.name for f in fields(Program) if f.name != "origin")
_EXTRAS = {"torch": "pyro", "pyro": "pyro", "numpyro": "numpyro", "jax": "numpyro", "flax": "numpyro"}


@dataclass(frozen=True)
class ModelFile:
    """A file of the zoo: its name, the family (folder) it lies in, its first docstring line, its path."""

    name: str
    family: str
    summary: str
    path: Path


def load(name_or_path: str | Path, data: Any = None, seed: int = 0, **options: Any) -> Program:
    """The program of a zoo file by name, or of any `.py` file by path, built for the arrays of `data`.

    `options` are the parameters of the file's `program` function. The weights are drawn from `seed` under
    forked generators: those of torch, NumPy and `random` are left as they were, and two loads share nothing.

    Raises:
        ProbgenError: an unknown name or option, a value of the wrong type, a file that does not run.
    """
    spec = getattr(data, "spec", None)
    if spec is None and data is not None:
        from probgen.data import load_data

        spec = load_data(data).spec
    return build(name_or_path, spec, seed, options)


def build(name_or_path: str | Path, spec: Any, seed: int = 0, options: Mapping[str, Any] | None = None) -> Program:
    """What `load` does, from the `spec` of the arrays instead of the arrays."""
    path, options = find(name_or_path), dict(options or {})
    with _forked_generators(seed, path), _beside(path):
        module = _module(path)
        factory = getattr(module, "program", None)
        if isinstance(factory, Program) or factory is None:
            refuse_unknown(path.stem, options, ())
            program = factory or _from_top_level(module, path)
        else:
            options = bound(path.stem, factory, options)
            given = {"spec": spec} if _wants_spec(path, factory, spec) else {}
            program = _call(path, factory, given | options)
    if not isinstance(program, Program):
        raise ProbgenError(f"{path}: `program` must return a probgen.Program, not {type(program).__name__}")
    kept = {k: v for k, v in options.items() if _plain(v)}
    return replace(program, origin=Origin(path.stem, str(path), kept, seed))


def options_of(name_or_path: str | Path) -> tuple[Callable[..., Any] | None, tuple[Option, ...]]:
    """The `program` function of a model file, and its options with their annotations resolved."""
    path = find(name_or_path)
    with _forked_generators(0, path), _beside(path):
        factory = getattr(_module(path), "program", None)
    if factory is None or isinstance(factory, Program):
        return None, ()
    return factory, signature_options(factory)


def list_models() -> list[ModelFile]:
    """The files of the zoo, by family and name; they are parsed, never run."""
    paths = (p for p in sorted(_folder().glob("*/*.py")) if not p.stem.startswith("_"))
    return [ModelFile(p.stem, p.parent.name, _summary(p), p) for p in paths]


def find(name_or_path: str | Path) -> Path:
    """The file that a name or a path means."""
    text = str(name_or_path)
    if text.endswith(".py") or "/" in text or "\\" in text:
        path = Path(text).expanduser()
        if path.suffix != ".py":
            raise ProbgenError(f"{text} is not a Python file: a model file ends in .py")
        if not path.is_file():
            raise ProbgenError(f"there is no model file {text}")
        return path.resolve()
    zoo = {path.stem: path for path in sorted(_folder().glob("*/*.py")) if not path.stem.startswith("_")}
    if text not in zoo:
        hint = f"; a file of your own is given by its path, {text}.py" if Path(f"{text}.py").is_file() else ""
        raise ProbgenError(f"the zoo has no model {text!r}{hint or did_you_mean(text, zoo)}")
    return zoo[text].resolve()


def _folder() -> Path:
    """`probgen/models` where probgen is installed, `models/` at the top of a checkout."""
    here = Path(__file__).resolve().parent
    return here / "models" if (here / "models").is_dir() else here.parent / "models"


def _summary(path: Path) -> str:
    try:
        doc = ast.get_docstring(ast.parse(path.read_bytes()))
    except (SyntaxError, ValueError):
        return "(does not parse)"
    return (doc or "").strip().partition("\n")[0]


# Running a file


def _module(path: Path) -> types.ModuleType:
    """The file run as a fresh module, under a name of its own, so that two loads share no network."""
    name = f"probgen_model_{path.stem}_{next(_ORDER)}"
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses and annotations look their module up here
    try:
        code = compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        where = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
        raise ProbgenError(f"{path}{where}: {getattr(error, 'msg', None) or error}") from error
    _run(path, lambda: exec(code, module.__dict__))
    return module


def _call(path: Path, factory: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    return _run(path, lambda: factory(**arguments))


def _run(path: Path, action: Callable[[], Any]) -> Any:
    """Do it; an error of the file's own becomes one sentence with the file and the line."""
    try:
        return action()
    except ProbgenError:
        raise
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        cure = f"pip install 'probgen[{extra}]'" if extra else f"install it, or mend {_where(path, error)}"
        raise ProbgenError(f"{path.name} needs `{error.name}`, which is not installed: {cure}") from error
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split()) or "no message"
        raise ProbgenError(f"{_where(path, error)}: {type(error).__name__}: {said}") from error


def _where(path: Path, error: BaseException) -> str:
    """The last place in the file itself that the error passed through."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f"{path}, line {lines[-1]}" if lines else str(path)


def _from_top_level(module: types.ModuleType, path: Path) -> Program:
    parts = {name: getattr(module, name) for name in _TOP_LEVEL if hasattr(module, name)}
    if "model" not in parts:
        raise ProbgenError(f"{path} holds no model: define `program(spec, ...) -> Program`, or `model` (and `guide`)")
    return Program(**parts)


@contextlib.contextmanager
def _forked_generators(seed: int, path: Path) -> Iterator[None]:
    """Draw the file's weights from `seed`, and leave every global generator as it was."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        with _forked_torch(seed) if _imports_torch(path) else contextlib.nullcontext():
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@contextlib.contextmanager
def _forked_torch(seed: int) -> Iterator[None]:
    try:
        import torch
    except ModuleNotFoundError:  # the file's own import says so, with its line
        yield
        return
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield


def _imports_torch(path: Path) -> bool:
    """Whether torch will be there once the file has run: it is already, or the file imports it."""
    if "torch" in sys.modules:
        return True
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError):
        return False
    names = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return any(f"{name}.".startswith(("torch.", "pyro.", "probgen.pyro.")) for name in names)


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[None]:
    """Let the file import what lies beside it, as `python FILE` would; the zoo's files import no one."""
    folder = str(path.parent)
    if path.is_relative_to(_folder()):
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _wants_spec(path: Path, factory: Callable[..., Any], spec: Any) -> bool:
    parameter = inspect.signature(factory).parameters.get("spec")
    if parameter is None:
        return False
    if spec is None and parameter.default is parameter.empty:
        raise ProbgenError(f"{path.stem} is built for its data: say load({path.stem!r}, data)")
    return spec is not None


def _plain(value: Any) -> bool:
    """Whether a YAML file can hold it."""
    if isinstance(value, tuple | list):
        return all(_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)
