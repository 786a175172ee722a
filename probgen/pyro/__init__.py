"""probgen on Pyro: losses, the engine that compiles them, and a drop-in `SVI`."""

from probgen.pyro.binomial_denoiser import BinomialDenoiser as BinomialDenoiser
from probgen.pyro.denoiser import Denoiser as Denoiser
from probgen.pyro.device import has_cuda as has_cuda
from probgen.pyro.diffusion_elbo import DiffusionELBO as DiffusionELBO
from probgen.pyro.elbo import ELBO as ELBO
from probgen.pyro.elbo import IWAE as IWAE
from probgen.pyro.em import EM as EM
from probgen.pyro.engine import Engine as Engine
from probgen.pyro.flow_matching import FlowMatching as FlowMatching
from probgen.pyro.learners import engine_of as engine_of
from probgen.pyro.learners import trained_of as trained_of
from probgen.pyro.loss import Loss as Loss
from probgen.pyro.loss import as_loss as as_loss
from probgen.pyro.nuts import NUTS as NUTS
from probgen.pyro.score_matching import ContrastiveDivergence as ContrastiveDivergence
from probgen.pyro.score_matching import DenoisingScoreMatching as DenoisingScoreMatching
from probgen.pyro.score_matching import ScoreMatching as ScoreMatching
from probgen.pyro.svi import SVI as SVI
from probgen.pyro.trained import Trained as Trained
from probgen.pyro.trained import inspect as inspect
