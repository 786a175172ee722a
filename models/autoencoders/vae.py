"""Variational autoencoder (Kingma & Welling, arXiv:1312.6114; Rezende et al., arXiv:1401.4082).

    z ~ N(0, I)                          z: [z_dim]
    x | z ~ Bernoulli(σ(f_θ(z)))         or  N(f_θ(z), s²), one learned s for all of x
    q(z | x) = N(μ_φ(x), diag σ_φ²(x))
    loss = −ELBO = KL(q(z | x) ‖ p(z)) − E_q[log p(x | z)]

f_θ and (μ_φ, log σ_φ) are a dense network with one hidden layer, or a small convolutional one.
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


def dense(size: int, z_dim: int, hidden: int) -> tuple[nn.Module, nn.Module]:
    """x [B, *shape] → (μ, log σ) [B, 2 z_dim], and z [B, z_dim] → the parameters of x [B, size]."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, 2 * z_dim))
    decoder = nn.Sequential(nn.Linear(z_dim, hidden), nn.ReLU(), nn.Linear(hidden, size))
    return encoder, decoder


def convolutional(shape: tuple[int, ...], z_dim: int, hidden: int) -> tuple[nn.Module, nn.Module]:
    """The same for images [H, W] or [H, W, C] whose sides are multiples of four."""
    height, width, channels = (*shape, 1)[:3]
    wide, inner = hidden // 8, (hidden // 4, height // 4, width // 4)
    encoder = nn.Sequential(
        nn.Flatten(),
        nn.Unflatten(1, (height * width, channels)),
        Transposed((channels, height, width)),
        nn.Conv2d(channels, wide, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(wide, inner[0], 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(torch.Size(inner).numel(), 2 * z_dim),
    )
    decoder = nn.Sequential(
        nn.Linear(z_dim, torch.Size(inner).numel()),
        nn.ReLU(),
        nn.Unflatten(1, inner),
        nn.ConvTranspose2d(inner[0], wide, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(wide, channels, 4, stride=2, padding=1),
        nn.Flatten(2),
        Transposed((height * width * channels,)),
    )
    return encoder, decoder


class Transposed(nn.Module):
    """Swap the two axes of a datum and give it a new shape: between [H W, C] and [C, H W]."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(-1, *self.shape)


def program(
    spec,
    z_dim: int = 16,
    hidden: int = 256,
    likelihood: Literal["bernoulli", "gaussian"] | None = None,
    network: Literal["dense", "conv"] = "dense",
) -> Program:
    """A VAE for any array `x`; the likelihood follows the data unless it is named.

    Parameters
    ----------
    z_dim
        Dimensions of the latent code.
    hidden
        Width of the hidden layer (dense) or of the code before the latent (conv).
    likelihood
        "bernoulli" for pixels and bits, "gaussian" for real numbers.
    network
        "dense", or "conv" for images whose sides are multiples of four.
    """
    shape, low = spec["x"].shape, spec["x"].range[0]
    likelihood = likelihood or ("bernoulli" if low >= 0 else "gaussian")
    size = torch.Size(shape).numel()
    encoder, decoder = dense(size, z_dim, hidden) if network == "dense" else convolutional(shape, z_dim, hidden)

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
