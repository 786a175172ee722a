"""VAE whose guide is a planar flow (Rezende & Mohamed, Variational inference with normalizing flows, arXiv:1505.05770).

    z ~ N(0, I)                                  z: [z_dim]
    x | z ~ Bernoulli(σ(f_θ(z)))                 or  N(f_θ(z), s²), one learned s for all of x
    z_0 ~ N(μ_φ(x), diag σ_φ²(x)),   z_k = z_{k−1} + û_k tanh(w_k·z_{k−1} + b_k),   q(z | x): that of z = z_K
    loss = −ELBO = E_q[log q(z | x) − log p(z) − log p(x | z)],   log q(z | x) = log q(z_0 | x) − Σ_k log |det_k|

As in the paper the flow is amortised: û_k, w_k and b_k come from x by the same network as μ and σ. K = 0 is the plain
VAE. What has just been drawn knows its density, so that no step inverts the flow.
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
from probgen.pyro.distributions import Flow
from probgen.pyro.transforms import Compose, Planar


def planar(theta: Tensor, length: int) -> Compose:
    """K planar flows for each row, of the parameters θ [B, K (2 z_dim + 1)]."""
    each = theta.unflatten(-1, (length, -1)).unbind(-2)
    size = each[0].shape[-1] // 2
    return Compose(*[Planar(k[..., :size], k[..., size:-1], k[..., -1]) for k in each])


def program(
    spec,
    z_dim: int = 16,
    hidden: int = 256,
    flow_length: int = 10,
    likelihood: Literal["bernoulli", "gaussian"] | None = None,
) -> Program:
    """A VAE with a planar flow as its guide, for any array `x`; the likelihood follows the data unless it is named.

    Parameters
    ----------
    z_dim
        Dimensions of the latent code.
    hidden
        Width of the hidden layers.
    flow_length
        K, how many planar flows stand between z_0 and z; 0 is the plain VAE.
    likelihood
        "bernoulli" for pixels and bits, "gaussian" for real numbers.
    """
    shape, low = spec["x"].shape, spec["x"].range[0]
    likelihood = likelihood or ("bernoulli" if low >= 0 else "gaussian")
    size, flow_size = torch.Size(shape).numel(), flow_length * (2 * z_dim + 1)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, 2 * z_dim + flow_size))
    decoder = nn.Sequential(nn.Linear(z_dim, hidden), nn.ReLU(), nn.Linear(hidden, size))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(z_dim), 1.0).to_event(1))
            theta = decoder(z).reshape(-1, *shape)
            if likelihood == "bernoulli":
                x_given_z = dist.Bernoulli(logits=theta)
            else:
                x_given_z = dist.Normal(theta, pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive))
            pyro.sample("x", x_given_z.to_event(len(shape)), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            mean, log_scale, theta = encoder(x).split((z_dim, z_dim, flow_size), dim=-1)
            z_0 = dist.Normal(mean, log_scale.exp()).to_event(1)
            pyro.sample("z", Flow(planar(theta, flow_length).inv, z_0) if flow_length else z_0)

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
