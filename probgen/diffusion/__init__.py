"""Diffusion on plain array operators: noise schedules, what a denoiser says, and one step of every sampler."""

from probgen.diffusion.schedules import CosineSchedule as CosineSchedule
from probgen.diffusion.schedules import GeometricSchedule as GeometricSchedule
from probgen.diffusion.schedules import LearnedSchedule as LearnedSchedule
from probgen.diffusion.schedules import LinearSchedule as LinearSchedule
from probgen.diffusion.schedules import NoiseSchedule as NoiseSchedule
from probgen.diffusion.schedules import RectifiedSchedule as RectifiedSchedule
from probgen.diffusion.schedules import SubVPSchedule as SubVPSchedule
