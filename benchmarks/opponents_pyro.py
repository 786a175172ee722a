"""The same VAE step written by hand in PyTorch, as one would write it for speed: the opponents of the Pyro engine.

`whole` is gradients and Adam in one `torch.compile`d function with its state changed in place; `loss_only` is the
common idiom, a compiled loss with `torch.optim.Adam(fused=True)` outside. Both draw eager's random stream
(`fallback_random`), which is also the faster setting on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B1, B2, EPS = 0.9, 0.999, 1e-8


class Parameters:
    """The weights of the zoo's encoder and decoder as one flat vector, in the order of their layers, and the way back."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, inner: tuple[int, ...] | None = None) -> None:
        named = [(f"encoder.{n}", p) for n, p in encoder.named_parameters()]
        named += [(f"decoder.{n}", p) for n, p in decoder.named_parameters()]
        self.names, self.shapes = [n for n, _ in named], [p.shape for _, p in named]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.vector = torch.cat([p.detach().reshape(-1) for _, p in named])
        self.inner = inner

    def views(self, vector: Tensor) -> list[Tensor]:
        return [piece.view(shape) for piece, shape in zip(vector.split(self.sizes), self.shapes, strict=True)]


def dense(weights: Sequence[Tensor], x: Tensor, noise: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """(mean, log scale, noise, z, logits) of the dense VAE."""
    w1, b1, w2, b2, w3, b3, w4, b4 = weights
    mean, log_scale = F.linear(F.relu(F.linear(x.flatten(1), w1, b1)), w2, b2).chunk(2, -1)
    e = noise(mean)
    z = mean + log_scale.exp() * e
    return mean, log_scale, e, z, F.linear(F.relu(F.linear(z, w3, b3)), w4, b4)


def convolutional(
    weights: Sequence[Tensor], x: Tensor, noise: Callable[[Tensor], Tensor], inner: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """The same of the convolutional one."""
    k1, c1, k2, c2, w1, b1, w2, b2, k3, c3, k4, c4 = weights
    h = F.relu(F.conv2d(x[:, None], k1, c1, stride=2, padding=1))
    h = F.relu(F.conv2d(h, k2, c2, stride=2, padding=1)).flatten(1)
    mean, log_scale = F.linear(h, w1, b1).chunk(2, -1)
    e = noise(mean)
    z = mean + log_scale.exp() * e
    h = F.relu(F.linear(z, w2, b2)).view(-1, *inner)
    h = F.relu(F.conv_transpose2d(h, k3, c3, stride=2, padding=1))
    return mean, log_scale, e, z, F.conv_transpose2d(h, k4, c4, stride=2, padding=1).flatten(1)


def negative_elbo(weights: Sequence[Tensor], x: Tensor, closed: bool, inner: tuple[int, ...] | None) -> Tensor:
    """−ELBO in nats per datum; the KL in closed form, or at the draw of z as `Trace_ELBO` takes it."""
    run = dense(weights, x, torch.randn_like) if inner is None else convolutional(weights, x, torch.randn_like, inner)
    mean, log_scale, noise, z, logits = run
    nll = F.binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="sum")
    if closed:
        kl = (0.5 * ((2 * log_scale).exp() + mean**2 - 1) - log_scale).sum()
    else:
        kl = (0.5 * (z**2 - noise**2) - log_scale).sum()
    return (nll + kl) / len(x)


def gradients(parameters: Parameters, vector: Tensor, x: Tensor, closed: bool) -> tuple[Tensor, Tensor]:
    """The gradient with respect to the flat vector, and the loss."""
    return torch.func.grad_and_value(lambda v: negative_elbo(parameters.views(v), x, closed, parameters.inner))(vector)


def whole(
    parameters: Parameters, lr: float, closed: bool, device: str = "cpu", cudagraphs: bool = True
) -> Callable[..., Tensor]:
    """`step(x)` or `step(data, rows)`, the batch then gathered in the graph: one step, its loss."""
    vector = parameters.vector.to(device, copy=True)
    first, second, t = torch.zeros_like(vector), torch.zeros_like(vector), torch.zeros((), device=device)

    def advance(p: Tensor, m: Tensor, v: Tensor, t: Tensor, x: Tensor, rows: Tensor | None) -> Tensor:
        x = x if rows is None else x[rows]
        g, loss = gradients(parameters, p, x, closed)
        t += 1
        m.lerp_(g, 1 - B1)
        v.lerp_(g * g, 1 - B2)
        p.sub_(lr * (m / (1 - B1**t)) / ((v / (1 - B2**t)).sqrt() + EPS))
        return loss

    compiled = torch.compile(advance, fullgraph=True, **_how(device, cudagraphs))

    @torch.no_grad()
    def step(x: Tensor, rows: Tensor | None = None) -> Tensor:
        return compiled(vector, first, second, t, x, rows)

    return step


def loss_only(parameters: Parameters, lr: float, closed: bool, device: str = "cpu") -> Callable[[Tensor], Tensor]:
    """`step(x)` with a compiled loss and a fused Adam outside."""
    weights = [nn.Parameter(w.to(device, copy=True)) for w in parameters.views(parameters.vector)]
    adam = torch.optim.Adam(weights, lr, fused=True)

    def loss_of(weights: list[Tensor], x: Tensor) -> Tensor:
        return negative_elbo(weights, x, closed, parameters.inner)

    compiled = torch.compile(loss_of, fullgraph=True, **_how(device))

    def step(x: Tensor) -> Tensor:
        adam.zero_grad()
        loss = compiled(weights, x)
        loss.backward()
        adam.step()
        return loss.detach()

    return step


def _how(device: str, cudagraphs: bool = True) -> dict:
    replayed = cudagraphs and device.startswith("cuda")
    return {"options": {"fallback_random": True, "triton.cudagraphs": replayed}}
