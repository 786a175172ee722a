"""probgen on NumPyro: losses, the engine that compiles them, the trained program, and a drop-in `SVI`."""

from probgen.numpyro.denoiser import Denoiser as Denoiser
from probgen.numpyro.diffusion_elbo import DiffusionELBO as DiffusionELBO
from probgen.numpyro.elbo import ELBO as ELBO
from probgen.numpyro.elbo import IWAE as IWAE
from probgen.numpyro.em import EM as EM
from probgen.numpyro.engine import Engine as Engine
from probgen.numpyro.learners import engine_of as engine_of
from probgen.numpyro.learners import trained_of as trained_of
from probgen.numpyro.loss import Loss as Loss
from probgen.numpyro.loss import as_loss as as_loss
from probgen.numpyro.nuts import NUTS as NUTS
from probgen.numpyro.scope import has_cuda as has_cuda
from probgen.numpyro.score_matching import ContrastiveDivergence as ContrastiveDivergence
from probgen.numpyro.score_matching import DenoisingScoreMatching as DenoisingScoreMatching
from probgen.numpyro.score_matching import ScoreMatching as ScoreMatching
from probgen.numpyro.structure import inspect as inspect
from probgen.numpyro.svi import SVI as SVI
from probgen.numpyro.trained import Trained as Trained
