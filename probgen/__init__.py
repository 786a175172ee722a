"""probgen: deep generative models written as probabilistic programs, on Pyro and NumPyro.

data = probgen.load_data("digits")
program = probgen.load("vae", data, z_dim=2)
run = probgen.fit(program, data, epochs=50)
run.sample(64)["x"], run.posterior(data.test), run.evaluate(data.test)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Functions named like their modules are bound here: importing such a module later would hide its function.
from probgen.calibration import calibration as calibration
from probgen.compare import compare as compare
from probgen.components.relabel import relabel as relabel
from probgen.fit import fit as fit

__version__ = "0.1.0"

_HOMES = {
    "load": "zoo",
    "list_models": "zoo",
    "load_data": "data",
    "Calibration": "calibration.uniformity",
    "Data": "data",
    "Options": "fit.recipe",
    "Run": "run",
    "Program": "program",
    "Player": "program",
    "ProbgenError": "errors",
    "Binarize": "data.steps",
    "Dequantize": "data.steps",
    "Flatten": "data.steps",
    "Scale": "data.steps",
    "Standardize": "data.steps",
    "Logit": "data.steps",
    "quality": "evaluate.quality",
    "reflow": "sample.reflow",
    "mode_coverage": "evaluate.modes",
    "Extragradient": "play",
    "Optimistic": "play",
    "Simultaneous": "play",
    "Linear": "schedules",
    "Cosine": "schedules",
    "Steps": "schedules",
}
_MODULES = {"pictures": "pictures", "pyro": "pyro", "numpyro": "numpyro", "divergences": "evaluate.divergences"}

if TYPE_CHECKING:
    from probgen.calibration.uniformity import Calibration as Calibration
    from probgen.data import Data as Data
    from probgen.data import load_data as load_data
    from probgen.data.steps import Binarize as Binarize
    from probgen.data.steps import Dequantize as Dequantize
    from probgen.data.steps import Flatten as Flatten
    from probgen.data.steps import Logit as Logit
    from probgen.data.steps import Scale as Scale
    from probgen.data.steps import Standardize as Standardize
    from probgen.errors import ProbgenError as ProbgenError
    from probgen.evaluate.modes import mode_coverage as mode_coverage
    from probgen.evaluate.quality import quality as quality
    from probgen.fit.recipe import Options as Options
    from probgen.play import Extragradient as Extragradient
    from probgen.play import Optimistic as Optimistic
    from probgen.play import Simultaneous as Simultaneous
    from probgen.program import Player as Player
    from probgen.program import Program as Program
    from probgen.run import Run as Run
    from probgen.sample.reflow import reflow as reflow
    from probgen.schedules import Cosine as Cosine
    from probgen.schedules import Linear as Linear
    from probgen.schedules import Steps as Steps
    from probgen.zoo import list_models as list_models
    from probgen.zoo import load as load

__all__ = [*_HOMES, "__version__", "calibration", "compare", "fit", "relabel"]


def __getattr__(name: str) -> Any:
    """Names are loaded when they are first used, so that `import probgen` and the command line start at once."""
    if name in _HOMES:
        value = getattr(importlib.import_module(f"probgen.{_HOMES[name]}"), name)
        globals()[name] = value  # also where a module of that name would shadow it
        return value
    if name in _MODULES:
        return importlib.import_module(f"probgen.{_MODULES[name]}")
    raise AttributeError(f"module 'probgen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
