"""Diffusion on plain array operators: noise schedules, what a denoiser says, and one step of every sampler."""

from probgen.diffusion.samplers import DDIM as DDIM
from probgen.diffusion.samplers import Ancestral as Ancestral
from probgen.diffusion.samplers import AnnealedLangevin as AnnealedLangevin
from probgen.diffusion.samplers import DPMSolver as DPMSolver
from probgen.diffusion.samplers import Euler as Euler
from probgen.diffusion.samplers import Heun as Heun
from probgen.diffusion.samplers import PredictorCorrector as PredictorCorrector
from probgen.diffusion.samplers import StochasticHeun as StochasticHeun
from probgen.diffusion.schedules import CosineSchedule as CosineSchedule
from probgen.diffusion.schedules import GeometricSchedule as GeometricSchedule
from probgen.diffusion.schedules import LearnedSchedule as LearnedSchedule
from probgen.diffusion.schedules import LinearSchedule as LinearSchedule
from probgen.diffusion.schedules import NoiseSchedule as NoiseSchedule
from probgen.diffusion.schedules import RectifiedSchedule as RectifiedSchedule
from probgen.diffusion.schedules import SubVPSchedule as SubVPSchedule
