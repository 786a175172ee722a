"""The same VAE step written by hand in PyTorch, as one would write it for speed: the opponents of the Pyro engine.

`whole` is gradients and Adam in one `torch.compile`d function with its state changed in place; `loss_only` is the
common idiom, a compiled loss with `torch.optim.Adam(fused=True)` outside. Both draw eager's random stream
(`fallback_random`), which is also the faster setting on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B1, B2, EPS = 0.9, 0.999, 1e-8


class Parameters:
    """The weights of encoder and decoder as one flat vector, and the way back."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        self.encoder, self.decoder = encoder, decoder
        named = [(f"encoder.{n}", p) for n, p in encoder.named_parameters()]
        named += [(f"decoder.{n}", p) for n, p in decoder.named_parameters()]
        self.names, self.shapes = [n for n, _ in named], [p.shape for _, p in named]
        self.vector = torch.cat([p.detach().reshape(-1) for _, p in named])

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        pieces = vector.split([shape.numel() for shape in self.shapes])
        return {n: piece.view(shape) for n, piece, shape in zip(self.names, pieces, self.shapes, strict=True)}

    def called(self, part: str, weights: Mapping[str, Tensor], value: Tensor) -> Tensor:
        own = {name.removeprefix(f"{part}."): w for name, w in weights.items() if name.startswith(f"{part}.")}
        return torch.func.functional_call(getattr(self, part), own, value)


def negative_elbo(parameters: Parameters, weights: Mapping[str, Tensor], x: Tensor, closed: bool) -> Tensor:
    """−ELBO in nats per datum; the KL in closed form, or at the draw of z as `Trace_ELBO` takes it."""
    mean, log_scale = parameters.called("encoder", weights, x).chunk(2, -1)
    noise = torch.randn_like(mean)
    z = mean + log_scale.exp() * noise
    logits = parameters.called("decoder", weights, z)
    nll = F.binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="sum")
    if closed:
        kl = (0.5 * ((2 * log_scale).exp() + mean**2 - 1) - log_scale).sum()
    else:
        kl = (0.5 * (z**2 - noise**2) - log_scale).sum()
    return (nll + kl) / len(x)


def gradients(parameters: Parameters, vector: Tensor, x: Tensor, closed: bool) -> tuple[Tensor, Tensor]:
    """The gradient with respect to the flat vector, and the loss."""
    return torch.func.grad_and_value(lambda v: negative_elbo(parameters, parameters.views(v), x, closed))(vector)


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
    weights = {n: nn.Parameter(w.to(device, copy=True)) for n, w in parameters.views(parameters.vector).items()}
    adam = torch.optim.Adam(weights.values(), lr, fused=True)

    def loss_of(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return negative_elbo(parameters, weights, x, closed)

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
