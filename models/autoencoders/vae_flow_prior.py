"""VAE whose prior is learned: a neural spline flow (Chen et al., Variational lossy autoencoder, arXiv:1611.02731).

    z: f(z) ~ N(0, I)                    p(z) = N(f(z) | 0, I) |det ∂f/∂z|,  f a spline flow (arXiv:1906.04032)
    x | z ~ Bernoulli(σ(f_θ(z)))         or  N(f_θ(z), s²), one learned s for all of x
    q(z | x) = N(μ_φ(x), diag σ_φ²(x))
    loss = −ELBO = E_q[log q(z | x) − log p(z) − log p(x | z)]

Where N(0, I) is not what the codes of the data look like, as a whole, this prior follows them.
"""

from __future__ import annotations

from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from probgen import Binarize, Program, Standardize
from probgen.pyro import ELBO
from probgen.pyro.distributions import Zuko, zuko_flows


def program(
    spec,
    z_dim: int = 16,
    hidden: int = 256,
    transforms: int = 2,
    likelihood: Literal["bernoulli", "gaussian"] | None = None,
) -> Program:
    """A VAE with a spline flow as its prior, for any array `x`; the likelihood follows the data unless it is named.

    Parameters
    ----------
    z_dim
        Dimensions of the latent code.
    hidden
        Width of the hidden layers.
    transforms
        Layers of splines of the prior, in which one half of z tells the splines of the other.
    likelihood
        "bernoulli" for pixels and bits, "gaussian" for real numbers.
    """
    shape, low = spec["x"].shape, spec["x"].range[0]
    likelihood = likelihood or ("bernoulli" if low >= 0 else "gaussian")
    size = torch.Size(shape).numel()
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, 2 * z_dim))
    decoder = nn.Sequential(nn.Linear(z_dim, hidden), nn.ReLU(), nn.Linear(hidden, size))
    prior = zuko_flows().NSF(z_dim, transforms=transforms, hidden_features=(64, 64), passes=2)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        pyro.module("prior", prior)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Zuko(prior))
            theta = decoder(z).reshape(-1, *shape)
            if likelihood == "bernoulli":
                x_given_z = dist.Bernoulli(logits=theta)
            else:
                x_given_z = dist.Normal(theta, pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive))
            pyro.sample("x", x_given_z.to_event(len(shape)), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            mean, log_scale = encoder(x).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(mean, log_scale.exp()).to_event(1))

    return Program(
        model,
        guide,
        by=ELBO(),
        prepare={"x": Binarize() if likelihood == "bernoulli" else Standardize()},
        defaults={"epochs": 100, "batch_size": 128, "lr": 1e-3},
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("digits")
    print(probgen.fit(program(data.spec, z_dim=2), data).evaluate(data.test))
