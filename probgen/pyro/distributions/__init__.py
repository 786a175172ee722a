"""Distributions that Pyro lacks, under the names they have in NumPyro."""

from probgen.pyro.distributions.autoregressive import Autoregressive as Autoregressive
from probgen.pyro.distributions.wishart import WishartCholesky as WishartCholesky
