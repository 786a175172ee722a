"""The house keeps its order: who may import whom, read off the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "probgen").rglob("*.py"))
MODELS = sorted((ROOT / "models").rglob("*.py"))
BACKENDS = ("pyro", "numpyro")
HEAVY = {
    "torch", "pyro", "jax", "numpyro", "flax", "equinox", "optax", "funsor", "matplotlib", "arviz", "arviz_base",
    "arviz_stats", "arviz_plots", "xarray", "safetensors", "rich", "sklearn", "yaml", "jsonargparse",
}  # fmt: skip
# The pipeline, from what is typed to the nouns: a module imports only modules to its right.
ORDER = (
    ("cli",),
    ("fit",),
    ("run",),
    ("compare",),
    ("sample", "posterior", "evaluate", "check", "show", "report"),
    ("laws", "subject"),
    ("pictures",),
    ("program", "data"),
)
VERBS = ("compare", "sample", "posterior", "evaluate", "check", "laws", "subject", "show", "report", "pictures")


def module(path):
    """`probgen.pyro.engine` for its path."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, top_level=False):
    """The modules that a file imports while it runs, not those for the type checker alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found, pending = set(), list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        if not (top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            pending += list(ast.iter_child_nodes(node))
    return found


def place(name):
    """Where a module of probgen stands in the pipeline, if it does."""
    stage = name.split(".")[1] if name.startswith("probgen.") else None
    return next((i for i, stages in enumerate(ORDER) if stage in stages), None)


def core():
    return [path for path in FILES if module(path).split(".")[1:2] not in ([b] for b in BACKENDS)]


def ids(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", core(), ids=ids)
def test_the_core_imports_nothing_heavy_before_it_is_needed(path):
    assert not {name.split(".")[0] for name in imports(path, top_level=True)} & HEAVY


@pytest.mark.parametrize("path", core(), ids=ids)
def test_the_core_imports_no_backend_by_name(path):
    named = {name for name in imports(path) if name.startswith(("probgen.pyro", "probgen.numpyro"))}
    assert not named, "the loss finds its engine: program.backend_of"


@pytest.mark.parametrize("path", [p for p in FILES if module(p).split(".")[1:2] == ["pyro"]], ids=ids)
def test_pyro_knows_nothing_of_jax(path):
    assert not {n.split(".")[0] for n in imports(path)} & {"jax", "numpyro", "flax", "equinox", "optax", "funsor"}
    assert not [n for n in imports(path) if n.startswith("probgen.numpyro")]


@pytest.mark.parametrize("path", [p for p in FILES if module(p).split(".")[1:2] == ["numpyro"]], ids=ids)
def test_numpyro_knows_nothing_of_torch(path):
    assert not {n.split(".")[0] for n in imports(path)} & {"torch", "pyro"}
    assert not [n for n in imports(path) if n.startswith("probgen.pyro")]


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_imports_run_one_way(path):
    here = place(module(path))
    if here is not None:
        there = {name: place(name) for name in imports(path)}
        backwards = {name for name, at in there.items() if at is not None and at < here}
        assert not backwards


@pytest.mark.parametrize("path", [p for p in FILES if module(p).split(".")[1:2] in [[v] for v in VERBS]], ids=ids)
def test_no_verb_imports_run(path):
    assert not [name for name in imports(path) if name in ("probgen.run", "probgen.Run") or ".run." in name]


@pytest.mark.parametrize("path", FILES + MODELS, ids=ids)
def test_nothing_imports_a_model(path):
    assert not [name for name in imports(path) if name.startswith(("models", "probgen.models"))]
    if path in MODELS:
        names = {other.stem for other in MODELS}
        assert not {name.split(".")[0] for name in imports(path)} & names


@pytest.mark.parametrize("path", MODELS, ids=ids)
def test_a_model_file_has_one_backend_and_is_a_page_long(path):
    backends = {b for b in BACKENDS if any(f"{n}.".startswith((f"{b}.", f"probgen.{b}.")) for n in imports(path))}
    assert len(backends) == 1
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 160


def test_the_tests_see_a_breach(tmp_path):
    """The rules above can fail: an import inside a function is seen, one for the type checker is not."""
    path = tmp_path / "probe.py"
    path.write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import jax\ndef f():\n    import torch\n")
    assert "torch" in imports(path) and "torch" not in imports(path, top_level=True) and "jax" not in imports(path)
    assert place("probgen.run") < place("probgen.sample") < place("probgen.pictures.khat") < place("probgen.data")
