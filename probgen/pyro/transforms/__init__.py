"""Bijections between data and base space that Pyro lacks: ordinary transforms that are modules and keep no cache."""

from probgen.pyro.transforms.actnorm import ActNorm as ActNorm
from probgen.pyro.transforms.bijection import Bijection as Bijection
from probgen.pyro.transforms.compose import Compose as Compose
from probgen.pyro.transforms.continuous import ContinuousFlow as ContinuousFlow
from probgen.pyro.transforms.convolution import InvertibleConv1x1 as InvertibleConv1x1
from probgen.pyro.transforms.coupling import ChannelCoupling as ChannelCoupling
from probgen.pyro.transforms.coupling import CheckerboardCoupling as CheckerboardCoupling
from probgen.pyro.transforms.multiscale import MultiScale as MultiScale
from probgen.pyro.transforms.planar import Planar as Planar
from probgen.pyro.transforms.planar import PlanarLayer as PlanarLayer
from probgen.pyro.transforms.radial import Radial as Radial
from probgen.pyro.transforms.radial import RadialLayer as RadialLayer
from probgen.pyro.transforms.spline_layers import SplineCoupling as SplineCoupling
from probgen.pyro.transforms.squeeze import ChannelsFirst as ChannelsFirst
from probgen.pyro.transforms.squeeze import Squeeze as Squeeze
