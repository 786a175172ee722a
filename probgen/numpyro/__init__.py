"""The NumPyro backend: losses, the engine, the trained program, and a drop-in `SVI`."""

from probgen.numpyro.elbo import ELBO, IWAE
from probgen.numpyro.engine import Engine
from probgen.numpyro.loss import Loss
from probgen.numpyro.structure import inspect
from probgen.numpyro.svi import SVI
from probgen.numpyro.trained import Trained

__all__ = ["ELBO", "IWAE", "SVI", "Engine", "Loss", "Trained", "inspect"]
