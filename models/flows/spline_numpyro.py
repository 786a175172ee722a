"""Neural spline flow (Durkan et al., arXiv:1906.04032), in NumPyro.

    z = f(x) ~ N(0, I)                    log p(x) = log N(f(x) | 0, I) + log |det ∂f/∂x|
    f = f_K ∘ … ∘ f_1                     f_k: z_d = spline(x_d; θ_d(x_<d)),  log |det| = Σ_d log spline′(x_d)

A spline is monotone, made of `bins` rational quadratics on [−5, 5], and the identity outside. θ_d is a masked network's
output, of the x before it in an order that alternates from layer to layer, and a draw takes D passes of each network.
With coupling=True a layer moves one half of the dimensions by splines that the other half tells, in turn, and a draw is
one pass. x: [D], other shapes as one vector. The loss is −log p(x), one pass. The twin of `spline.py`, which goes through
Zuko: the same splines, networks and masks, here written out.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.module import flax_module

from probgen import Dequantize, Flatten, Logit, Program, Scale, Standardize
from probgen.numpyro import ELBO
from probgen.numpyro.distributions import Flow
from probgen.numpyro.nn import DenseConditioner, MaskedConditioner
from probgen.numpyro.transforms import Bijection, Compose, SplineAutoregressive, SplineCoupling


def autoregressive(k: int, size: int, outputs: int, hidden: int, layers: int) -> Bijection:
    """Splines of every dimension, told by those before it; by those after it in every other layer."""
    conditioner = MaskedConditioner(size, outputs, (hidden,) * layers, reverse=k % 2 == 1)
    return SplineAutoregressive(flax_module(f"spline_{k}", conditioner, input_shape=(1, size)), (size,))


def coupled(k: int, size: int, outputs: int, hidden: int, layers: int) -> Bijection:
    """Splines of one half of the dimensions, told by the other; of the other half in every other layer."""
    kept, changed = SplineCoupling.sizes(size, flip=k % 2 == 1)
    conditioner = DenseConditioner(changed * outputs, hidden, layers)
    network = flax_module(f"coupling_{k}", conditioner, input_shape=(1, kept))
    return SplineCoupling(network, (size,), flip=k % 2 == 1)


def program(
    spec, transforms: int = 3, bins: int = 8, hidden: int = 64, layers: int = 2, coupling: bool = False
) -> Program:
    """A neural spline flow for an array `x` of real or whole numbers.

    Parameters
    ----------
    transforms
        K, how many layers of splines.
    bins
        Pieces of a spline.
    hidden
        Units of a hidden layer of the networks.
    layers
        Hidden layers.
    coupling
        Whether one half of the dimensions tells the other's splines, instead of each dimension those after it.
    """
    size = math.prod(spec["x"].shape)
    layer = coupled if coupling else autoregressive
    prepare = (Dequantize(), Scale(), Logit(0.05)) if spec["x"].dtype[:1] in "ui" else ()

    def model(x: jax.Array) -> None:
        flow = Compose(*[layer(k, size, 3 * bins - 1, hidden, layers) for k in range(transforms)])
        with numpyro.plate("data", len(x)):
            base = dist.Normal(jnp.zeros(size), 1.0).to_event(1)
            numpyro.sample("x", Flow(flow, base), obs=x)

    return Program(
        model,
        by=ELBO(),
        prepare={"x": (*prepare, Standardize(), Flatten())},
        defaults={"epochs": 50, "batch_size": 128, "lr": 1e-3, "clip": 50.0},
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("two-moons")
    print(probgen.fit(program(data.spec), data).evaluate(data.test))
