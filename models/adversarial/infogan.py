"""InfoGAN (Chen et al., arXiv:1606.03657): a GAN whose codes can be read off its draws.

    c ~ Categorical(1/K, …, 1/K)         one of K kinds, given to G as a one-hot vector
    u ~ N(0, I)                          u: [codes], if there are any
    z ~ N(0, I)                          z: [z_dim], noise
    x = G(z, c, u)                       a point mass
    Q(c, u | x) = Categorical(π(x)) N(μ(x), diag σ²(x))            the guide
    min_{G, Q} max_D  E log D(x) + E log(1 − D(G)) − λ E[log Q(c | x) − log p(c)] − λ_u E[log Q(u | x) − log p(u)]

The last terms are lower bounds of the mutual information I(c; x) ≤ log K and I(u; x), taken at draws of the model alone: no
label is ever seen. G, D and Q are dense, and Q has layers of its own. The paper draws u from U(−1, 1).
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probgen import Program, Scale, Standardize
from probgen.pyro import R1, Adversarial, MutualInformation


def dense(sizes: list[int], slope: float = 0.0) -> nn.Sequential:
    """[B, sizes[0]] → [B, sizes[-1]]: linear layers with (leaky) rectifiers between them."""
    layers = []
    for size, following in pairwise(sizes):
        layers += [nn.Linear(size, following), nn.LeakyReLU(slope)]
    return nn.Sequential(*layers[:-1])


def program(
    spec,
    kinds: int | None = None,
    codes: int = 0,
    z_dim: int | None = None,
    hidden: int = 128,
    layers: int = 2,
    information: float = 1.0,
    information_codes: float = 0.1,
    r1: float = 0.1,
) -> Program:
    """An InfoGAN of any array `x` of real or whole numbers.

    Parameters
    ----------
    kinds
        K, values of the code c; as many as there are classes `y`, else 8 for vectors of two numbers and 10 for others.
    codes
        Dimensions of the code u; 0 leaves it out.
    z_dim
        Dimensions of the noise; 2 for vectors of two numbers, 32 for others, unless it is named.
    hidden
        Units of a layer, of all networks.
    layers
        Hidden layers of all networks.
    information
        λ, the weight of the bound of I(c; x).
    information_codes
        λ_u, the weight of the bound of I(u; x).
    r1
        γ of the penalty γ/2 ‖∇ d(x)‖² on the critic at real rows; 0 leaves it out.
    """
    shape, whole, (low, high) = spec["x"].shape, spec["x"].dtype[:1] in "ui", spec["x"].range
    size = torch.Size(shape).numel()
    kinds = kinds or ("y" in spec and spec["y"].classes) or (8 if size == 2 else 10)
    z_dim = z_dim or (2 if size == 2 else 32)
    generator = dense([z_dim + kinds + codes, *[hidden] * layers, size])
    if whole:
        generator.append(nn.Tanh())  # pixels lie in [−1, 1]
    critic = nn.Sequential(nn.Flatten(), *dense([size, *[hidden] * layers, 1], slope=0.2))
    reader = nn.Sequential(nn.Flatten(), *dense([size, *[hidden] * layers, kinds + 2 * codes], slope=0.2))

    def model(x: Tensor) -> None:
        pyro.module("generator", generator)
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=torch.zeros(kinds)))
            parts = [nn.functional.one_hot(c, kinds).to(x.dtype)]
            if codes:
                parts.append(pyro.sample("u", dist.Normal(torch.zeros(codes), 1.0).to_event(1)))
            parts.append(pyro.sample("z", dist.Normal(torch.zeros(z_dim), 1.0).to_event(1)))
            mean = generator(torch.cat(parts, dim=-1)).reshape(-1, *shape)
            pyro.sample("x", dist.Delta(mean, event_dim=len(shape)), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("reader", reader)
        with pyro.plate("data", len(x)):
            logits, mean, log_scale = reader(x).split([kinds, codes, codes], dim=-1)
            pyro.sample("c", dist.Categorical(logits=logits))
            if codes:
                pyro.sample("u", dist.Normal(mean, log_scale.exp()).to_event(1))

    loss = Adversarial(critic, penalties=[R1(r1)] if r1 else []) + information * MutualInformation("c")
    return Program(
        model,
        guide,
        by=loss + information_codes * MutualInformation("u") if codes else loss,
        prepare={"x": Scale((low + high) / 2, high) if whole else Standardize()},
        defaults={
            "epochs": 200,
            "batch_size": 128,
            "lr": 1e-3,
            "optimizer": partial(torch.optim.Adam, betas=(0.0, 0.99)),
            "ema": 0.995,
        },
    )


if __name__ == "__main__":
    import probgen

    data = probgen.load_data("digits")
    print(probgen.fit(program(data.spec), data).sample(8))
