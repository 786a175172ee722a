"""Mixture of products of Bernoullis, latent class analysis (Bishop, 2006, section 9.3.3), on bits.

    z ~ Categorical(π)                   z: one of K components, summed out
    x_d | z ~ Bernoulli(p_zd)            p(x) = Σ_k π_k Π_d p_kd^x_d (1 − p_kd)^(1 − x_d)

Within a component the bits are independent; the mixture is what correlates them. Learned by EM, in closed form.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from probgen import Binarize, Flatten, ProbgenError, Program
from probgen.pyro import EM


def program(spec, components: int = 10) -> Program:
    """A mixture of Bernoullis on the binarized elements of `x`.

    Parameters
    ----------
    components
        How many products of Bernoullis, K.
    """
    if components < 1:
        raise ProbgenError(f"bernoulli_mixture: components={components} leaves no component; ask for at least 1")
    K, D = components, math.prod(spec["x"].shape)

    def model(x: Tensor) -> None:
        pi = pyro.param("weights", torch.full((K,), 1 / K), constraint=constraints.simplex)
        p = pyro.param("probs", lambda: 0.25 + torch.rand(K, D) / 2, constraint=constraints.unit_interval)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(pi), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Bernoulli(p[z]).to_event(1), obs=x)

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
