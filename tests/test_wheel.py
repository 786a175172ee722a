"""The wheel, installed elsewhere: the zoo is found, and no package `models` lies beside probgen."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel of this checkout installed in it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    source.mkdir()
    for name in ("probgen", "models"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = folder.glob("*.whl")
    shutil.unpack_archive(wheel, folder / "site", "zip")  # a wheel of pure Python is installed by unpacking it
    return folder / "site"


def run(installed, tmp_path, code):
    """What `code` prints where only the installed wheel, and the dependencies, can be imported."""
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); " + code
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_is_no_package_models(installed):
    assert sorted(p.name for p in installed.iterdir() if p.suffix != ".dist-info") == ["probgen"]


def test_every_module_is_in_the_wheel(installed):
    for folder, inside in ((ROOT / "probgen", installed / "probgen"), (ROOT / "models", installed / "probgen/models")):
        there = {p.relative_to(folder) for p in folder.rglob("*") if p.suffix in (".py", ".css", ".typed")}
        assert not {str(p) for p in there if not (inside / p).exists()}


def test_the_zoo_is_found(installed, tmp_path):
    told = run(
        installed, tmp_path, "from probgen import zoo; print(zoo.__file__); print(*zoo.list_models(), sep='\\n')"
    )
    assert str(installed) in told.splitlines()[0] and "name='vae'" in told
    code = "from types import SimpleNamespace as S; import numpy as np; from probgen.zoo import load; "
    code += "spec = {'x': S(shape=(4,), range=(0.0, 1.0), dtype='float32', classes=None, mean=np.zeros(4))}; "
    code += "print(load('vae', S(spec=spec), z_dim=2).origin)"
    assert "probgen/models/autoencoders/vae.py" in run(installed, tmp_path, code)
