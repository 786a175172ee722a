"""Networks that NumPyro programs are built of."""

from probgen.numpyro.nn.causal import MADE as MADE
from probgen.numpyro.nn.conditioner import ConvConditioner as ConvConditioner
from probgen.numpyro.nn.conditioner import DenseConditioner as DenseConditioner
from probgen.numpyro.nn.conditioner import MaskedConditioner as MaskedConditioner
from probgen.numpyro.nn.denoising import DenoisingMLP as DenoisingMLP
from probgen.numpyro.nn.denoising import UNet as UNet
