"""Networks that NumPyro programs are built of."""

from probgen.numpyro.nn.causal import MADE as MADE
