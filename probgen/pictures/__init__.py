"""Pictures of a run: every one is `NAME(run, data=None, ax=None, ...) -> matplotlib Axes`.

`data` is anything `load_data` takes rows from; without it a picture uses the test rows of the run's own data.
`calibration` is of what `probgen.calibration` returns. Values are shown in the data's own units. A picture that a program cannot have is refused in one sentence.
"""

from probgen.pictures.calibration import calibration
from probgen.pictures.canvas import detached
from probgen.pictures.curves import curves, terms
from probgen.pictures.decoded import manifold, traversal
from probgen.pictures.diagram import diagram
from probgen.pictures.diffusion import chain_terms, denoising, filmstrip, noising
from probgen.pictures.forest import forest
from probgen.pictures.interpolation import arithmetic, interpolation
from probgen.pictures.khat import khat
from probgen.pictures.latents import latents
from probgen.pictures.samples import data, nearest, reconstructions, samples

__all__ = [
    "arithmetic",
    "calibration",
    "chain_terms",
    "curves",
    "data",
    "denoising",
    "detached",
    "diagram",
    "filmstrip",
    "forest",
    "interpolation",
    "khat",
    "latents",
    "manifold",
    "nearest",
    "noising",
    "reconstructions",
    "samples",
    "terms",
    "traversal",
]
