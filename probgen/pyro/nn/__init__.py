"""Networks that Pyro programs are built of."""

from probgen.pyro.nn.causal import MADE as MADE
from probgen.pyro.nn.conditioner import ConvConditioner as ConvConditioner
from probgen.pyro.nn.conditioner import DenseConditioner as DenseConditioner
