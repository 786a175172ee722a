"""A model file of your own: Poisson factor analysis of counts, in Pyro.

    z ~ N(0, I)                               z: [z_dim]
    x_d | z ~ Poisson(exp(b_d + w_d · z))     x: [D] counts
    q(z | x) = N(μ_φ(x), diag σ_φ²(x))
    loss = −ELBO

Run it as a script, or give it to the command line, where `program`'s parameters are the options:

    python examples/own_model.py
    probgen show  examples/own_model.py --data digits
    probgen check examples/own_model.py --data digits
    probgen fit   examples/own_model.py --data digits --z_dim 4
"""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from probgen import Program
from probgen.pyro import ELBO


def program(spec, z_dim: int = 8, hidden: int = 128) -> Program:
    """Factor analysis for an array `x` of counts.

    Parameters
    ----------
    z_dim
        Number of factors.
    hidden
        Width of the guide's hidden layer.
    """
    shape = spec["x"].shape
    size = torch.Size(shape).numel()
    mean = torch.as_tensor(spec["x"].mean, dtype=torch.float32).reshape(size)
    loadings = nn.Linear(z_dim, size)
    with torch.no_grad():  # start at the mean count of every pixel
        loadings.weight.mul_(0.1)
        loadings.bias.copy_(mean.clamp(min=0.01).log())
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, 2 * z_dim))

    def model(x):
        pyro.module("loadings", loadings)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(z_dim), 1.0).to_event(1))
            rate = loadings(z).exp().reshape(-1, *shape)
            pyro.sample("x", dist.Poisson(rate).to_event(len(shape)), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            mu, log_sigma = encoder(torch.log1p(x)).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(mu, log_sigma.exp()).to_event(1))

    return Program(model, guide, by=ELBO(), defaults={"epochs": 60, "batch_size": 128, "lr": 1e-3})


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("digits")
    run = probgen.fit(program(data.spec), data)
    numbers = run.evaluate(data.test)
    for name in ("log_likelihood", "bits_per_dim"):
        print(f"{name:15} {numbers[name]:8.3f} ± {numbers[name + '_se']:.3f}")
    print(f"{'k_hat':15} {numbers['k_hat']:8.3f}")
