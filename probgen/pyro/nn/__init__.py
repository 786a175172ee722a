"""Networks that Pyro programs are built of."""

from probgen.pyro.nn.causal import MADE as MADE
from probgen.pyro.nn.conditioner import ConvConditioner as ConvConditioner
from probgen.pyro.nn.conditioner import DenseConditioner as DenseConditioner
from probgen.pyro.nn.denoising import DenoisingMLP as DenoisingMLP
from probgen.pyro.nn.denoising import UNet as UNet
