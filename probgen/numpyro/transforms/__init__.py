"""Bijections between data and base space that NumPyro lacks: ordinary transforms, pytrees of their networks' weights."""

from probgen.numpyro.transforms.actnorm import ActNorm as ActNorm
from probgen.numpyro.transforms.actnorm import FirstRows as FirstRows
from probgen.numpyro.transforms.actnorm import actnorm as actnorm
from probgen.numpyro.transforms.bijection import Bijection as Bijection
from probgen.numpyro.transforms.compose import Compose as Compose
from probgen.numpyro.transforms.coupling import ChannelCoupling as ChannelCoupling
from probgen.numpyro.transforms.coupling import CheckerboardCoupling as CheckerboardCoupling
from probgen.numpyro.transforms.multiscale import MultiScale as MultiScale
from probgen.numpyro.transforms.spline_layers import SplineAutoregressive as SplineAutoregressive
from probgen.numpyro.transforms.spline_layers import SplineCoupling as SplineCoupling
from probgen.numpyro.transforms.squeeze import ChannelsFirst as ChannelsFirst
from probgen.numpyro.transforms.squeeze import Squeeze as Squeeze
