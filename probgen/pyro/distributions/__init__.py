"""Distributions that Pyro lacks, under the names they have in NumPyro."""

from probgen.pyro.distributions.autoregressive import Autoregressive as Autoregressive
from probgen.pyro.distributions.discretized import DiscretizedGaussian as DiscretizedGaussian
from probgen.pyro.distributions.flow import Flow as Flow
from probgen.pyro.distributions.wishart import WishartCholesky as WishartCholesky
from probgen.pyro.distributions.zuko import Zuko as Zuko
from probgen.pyro.distributions.zuko import zuko_flows as zuko_flows
