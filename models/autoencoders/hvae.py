"""Markovian hierarchical VAE (Kingma et al., arXiv:1606.04934; Luo, Understanding diffusion models, arXiv:2208.11970).

    z_T ~ N(0, I)                                              z_t: [z_dim]
    z_{t−1} | z_t ~ N(μ_θ,t(z_t), diag σ²_θ,t(z_t))            t = T, ..., 2
    x | z_1 ~ Bernoulli(σ(f_θ(z_1)))                           or  N(f_θ(z_1), s²), one learned s for all of x
    q(z_1, ..., z_T | x) = q(z_1 | x) Π_{t≥2} q(z_t | z_{t−1}),   each N(μ_φ,t, diag σ²_φ,t) of what lies below it
    loss = −ELBO = E_q[−log p(x | z_1) + β Σ_t (log q(z_t | z_{t−1}) − log p(z_t | z_{t+1}))],   z_0 = x, β = 1

The guide runs against the model: the prior of z_t depends on z_{t+1}, drawn after it. A KL site by site would be wrong
there, so these terms are taken at the draw; that of z_T, whose prior depends on nothing, is in closed form. T = 1 is the
plain VAE. With warm-up β rises from 0 to 1, against upper layers that die early (Sønderby et al., arXiv:1602.02282).

Every network is dense with one hidden layer: of rectifiers at x, of tanh between latents, so that no log σ is driven off
by a latent drawn far away: chains of rectifiers, each of whose outputs is exponentiated, overflow.
"""

from __future__ import annotations

from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from probgen import Binarize, ProbgenError, Program, Standardize
from probgen.pyro import ELBO
from probgen.schedules import Linear


def dense(inputs: int, hidden: int, outputs: int, activation: nn.Module) -> nn.Module:
    """[B, inputs] → [B, outputs], with one hidden layer."""
    return nn.Sequential(nn.Linear(inputs, hidden), activation, nn.Linear(hidden, outputs))


def normal(parameters: Tensor) -> dist.TorchDistribution:
    """N(μ, diag σ²) of (μ, log σ) [B, 2 z_dim]."""
    mean, log_scale = parameters.chunk(2, dim=-1)
    return dist.Normal(mean, log_scale.exp()).to_event(1)


def program(
    spec,
    z_dim: int = 16,
    hidden: int = 256,
    depth: int = 2,
    warmup: int = 0,
    likelihood: Literal["bernoulli", "gaussian"] | None = None,
) -> Program:
    """A chain of latents over any array `x`; the likelihood follows the data unless it is named.

    Parameters
    ----------
    z_dim
        Dimensions of each latent.
    hidden
        Width of the hidden layer of every network.
    depth
        T, how many latents stand above each other; 1 is the plain VAE.
    warmup
        Steps in which β, the weight of the latents' terms, rises from 0 to 1; 0 for none.
    likelihood
        "bernoulli" for pixels and bits, "gaussian" for real numbers.
    """
    if min(depth, z_dim) < 1:
        raise ProbgenError(f"hvae: depth={depth} with z_dim={z_dim} leaves no latent; ask for at least 1 of each")
    if warmup < 0:
        raise ProbgenError(f"hvae: warmup={warmup} is no number of steps; ask for 0, which is none, or more")
    shape, low = spec["x"].shape, spec["x"].range[0]
    likelihood = likelihood or ("bernoulli" if low >= 0 else "gaussian")
    size, layers, inner = torch.Size(shape).numel(), range(1, depth + 1), range(2, depth + 1)
    # encoder_t gives z_t from z_{t−1}, decoder_t z_{t−1} from z_t, where z_0 is x
    encoders = {1: dense(size, hidden, 2 * z_dim, nn.ReLU())}
    encoders |= {t: dense(z_dim, hidden, 2 * z_dim, nn.Tanh()) for t in inner}
    decoders = {1: dense(z_dim, hidden, size, nn.ReLU())}
    decoders |= {t: dense(z_dim, hidden, 2 * z_dim, nn.Tanh()) for t in inner}

    def model(x: Tensor) -> None:
        for t in layers:
            pyro.module(f"decoder_{t}", decoders[t])
        with pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{depth}", dist.Normal(torch.zeros(z_dim), 1.0).to_event(1))
            for t in reversed(inner):
                z = pyro.sample(f"z_{t - 1}", normal(decoders[t](z)))
            theta = decoders[1](z).reshape(-1, *shape)
            if likelihood == "bernoulli":
                x_given_z = dist.Bernoulli(logits=theta)
            else:
                x_given_z = dist.Normal(theta, pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive))
            pyro.sample("x", x_given_z.to_event(len(shape)), obs=x)

    def guide(x: Tensor) -> None:
        for t in layers:
            pyro.module(f"encoder_{t}", encoders[t])
        with pyro.plate("data", len(x)):
            z = x.flatten(1)
            for t in layers:
                z = pyro.sample(f"z_{t}", normal(encoders[t](z)))

    return Program(
        model,
        guide,
        by=ELBO(beta=Linear(0, 1, warmup)) if warmup else ELBO(),
        prepare={"x": Binarize() if likelihood == "bernoulli" else Standardize()},
        defaults={"epochs": 100, "batch_size": 128, "lr": 1e-3},
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("digits")
    print(probgen.fit(program(data.spec, z_dim=8), data).evaluate(data.test))
