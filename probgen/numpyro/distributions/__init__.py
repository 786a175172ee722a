"""Distributions that NumPyro lacks, or whose draws it does not know to be differentiable."""

from probgen.numpyro.distributions.autoregressive import Autoregressive as Autoregressive
from probgen.numpyro.distributions.discretized import DiscretizedGaussian as DiscretizedGaussian
from probgen.numpyro.distributions.flow import Flow as Flow
from probgen.numpyro.distributions.wishart import WishartCholesky as WishartCholesky
