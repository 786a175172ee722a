"""Networks that Pyro programs are built of."""

from probgen.pyro.nn.causal import MADE as MADE
