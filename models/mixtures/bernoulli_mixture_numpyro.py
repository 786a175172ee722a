"""Mixture of products of Bernoullis, latent class analysis (Bishop, 2006, section 9.3.3), on bits, in NumPyro.

    z ~ Categorical(π)                   z: one of K components, summed out
    x_d | z ~ Bernoulli(p_zd)            p(x) = Σ_k π_k Π_d p_kd^x_d (1 − p_kd)^(1 − x_d)

Within a component the bits are independent; the mixture is what correlates them. Learned by EM, in closed form.

The twin of `bernoulli_mixture.py`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

from probgen import Binarize, Flatten, ProbgenError, Program
from probgen.numpyro import EM


def program(spec, components: int = 10) -> Program:
    """A mixture of Bernoullis on the binarized elements of `x`.

    Parameters
    ----------
    components
        How many products of Bernoullis, K.
    """
    if components < 1:
        raise ProbgenError(
            f"bernoulli_mixture_numpyro: components={components} leaves no component; ask for at least 1"
        )
    K, D = components, math.prod(spec["x"].shape)

    def model(x: jax.Array) -> None:
        pi = numpyro.param("weights", jnp.full(K, 1 / K), constraint=constraints.simplex)
        p = numpyro.param(
            "probs", lambda key: 0.25 + jax.random.uniform(key, (K, D)) / 2, constraint=constraints.unit_interval
        )
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Categorical(pi), infer={"enumerate": "parallel"})
            numpyro.sample("x", dist.Bernoulli(p[z]).to_event(1), obs=x)

    return Program(
        model,
        by=EM(),
        prepare={"x": (Flatten(), Binarize())},
        defaults={"epochs": 100, "batch_size": 128, "lr": 1e-2},
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("digits")
    print(probgen.fit(program(data.spec), data).evaluate(data.test))
