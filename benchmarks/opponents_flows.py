"""RealNVP, MAF and neural spline flows of other packages, and a training step of theirs written by hand for speed.

Every peer gets the layers of the zoo's flows: as many of them, two hidden layers of 64 ReLU units, 8 bins on [−5, 5], and as
many parameters. What a peer does otherwise stands beside it. `FORMS` are the ways to run the step: `whole` is gradients and Adam
in one `torch.compile`d function with its state changed in place; `loss_only` compiles the loss in as many graphs as it
takes, with `torch.optim.Adam(fused=True)` outside; `eager` is the same step uncompiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from benchmarks.opponents_pyro import B1, B2, EPS

SIZE, HIDDEN, BINS, BOUND = 16, 64, 8, 5.0
LAYERS = {"realnvp": 8, "maf": 5, "nsf": 3, "nsf-coupling": 3}
Step = Callable[[Tensor, Tensor], Tensor]  # all rows and the numbers of a batch's → the loss


class Opponent(nn.Module):
    """A peer's flow: x [N, D] → its mean negative log-likelihood, in nats; `draw(n)` → x [n, D]."""

    def __init__(self, flow: nn.Module, log_prob: Callable[..., Tensor], draw: Callable[..., Tensor]) -> None:
        super().__init__()
        self.flow, self.log_prob, self.draw = flow, partial(log_prob, flow), partial(draw, flow)

    def forward(self, x: Tensor) -> Tensor:
        return -self.log_prob(x).mean()


# -- Zuko -------------------------------------------------------------------------------------------------------------


def zuko(family: str) -> Opponent:
    """Flows of `zuko.flows`; RealNVP has an affine layer of its own parameters before each coupling, as ActNorm is later on.

    Couplings split even and odd dimensions. Scales lie between 1/1000 and 1000.
    """
    from probgen.pyro.distributions import zuko_flows

    flows, count = zuko_flows(), LAYERS[family]
    hidden: dict[str, Any] = {"hidden_features": (HIDDEN, HIDDEN)}
    if family == "maf":
        flow = flows.MAF(SIZE, transforms=count, **hidden)
    elif family == "nsf":
        flow = flows.NSF(SIZE, transforms=count, bins=BINS, **hidden)
    else:
        flow = _zuko_couplings(family, count, hidden)
    return Opponent(flow, _zuko_log_prob, lambda flow, n: flow().sample((n,)))


def _zuko_log_prob(flow: nn.Module, x: Tensor) -> Tensor:
    """What `flow().log_prob(x)` computes, layer by layer: `torch.compile` does not get through its own composition."""
    total = torch.zeros(len(x))
    for layer in flow.transform.transforms:
        x, ladj = layer().call_and_ladj(x)
        total = total + ladj
    return total - 0.5 * (x.square() + math.log(2 * math.pi)).sum(-1)


def _zuko_couplings(family: str, count: int, hidden: dict[str, Any]) -> nn.Module:
    from zuko import distributions, lazy, transforms
    from zuko.flows.coupling import GeneralCouplingTransform
    from zuko.flows.gaussianization import ElementWiseTransform

    spline = {"univariate": transforms.MonotonicRQSTransform, "shapes": [(BINS,), (BINS,), (BINS - 1,)]}
    layers: list[nn.Module] = []
    for k in range(count):
        layers += [_zeroed(ElementWiseTransform(SIZE))] if family == "realnvp" else []
        more = {} if family == "realnvp" else spline
        layers.append(GeneralCouplingTransform(SIZE, mask=torch.arange(SIZE) % 2 == k % 2, **more, **hidden))
    normal = distributions.DiagNormal, torch.zeros(SIZE), torch.ones(SIZE)
    return lazy.Flow(layers, lazy.UnconditionalDistribution(*normal, buffer=True))


def _zeroed(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


# -- normflows --------------------------------------------------------------------------------------------------------


def normflows(family: str) -> Opponent:
    """Flows of `normflows.flows`; RealNVP has `AffineConstFlow`, which its ActNorm is after the first batch.

    Masked layers are reversed, so that a density is one pass as in a MAF; as they stand a draw is. Their networks have no
    activation after the first layer. A draw brings its density along.
    """
    import normflows

    flows, layers = normflows.flows, []  # from the base to the data
    for k in range(LAYERS[family]):
        if family == "realnvp":
            network = normflows.nets.MLP([SIZE // 2, HIDDEN, HIDDEN, SIZE], init_zeros=True)
            coupling = flows.AffineCouplingBlock(network, split_mode="channel_inv" if k % 2 else "channel")
            layers += [coupling, flows.AffineConstFlow(SIZE)]
        elif family == "maf":
            made = flows.MaskedAffineAutoregressive(SIZE, HIDDEN, num_blocks=1, use_residual_blocks=False)
            layers += [flows.Reverse(made), flows.Permute(SIZE, mode="swap")]
        else:
            layers.append(flows.Reverse(_normflows_spline(family, k)))
    base = normflows.distributions.DiagGaussian(SIZE, trainable=False)
    base.d = int(base.d)  # a NumPy integer, which `torch.compile` would follow as a tensor
    flow = normflows.NormalizingFlow(base, layers)
    return Opponent(flow, lambda flow, x: flow.log_prob(x), lambda flow, n: flow.sample(n)[0])


def _normflows_spline(family: str, k: int) -> nn.Module:
    """What its wrappers hold, which take residual networks only."""
    from normflows.flows.neural_spline import autoregressive, coupling

    how = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
    if family == "nsf":
        return autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive(
            SIZE, HIDDEN, num_blocks=1, use_residual_blocks=False, permute_mask=True, **how
        )
    return coupling.PiecewiseRationalQuadraticCoupling(_mask(k), Dense, **how)


# -- nflows -----------------------------------------------------------------------------------------------------------


def nflows(family: str) -> Opponent:
    """Flows of `nflows.transforms`; its ActNorm counts as having seen its first batch.

    Couplings split even and odd dimensions, with scales between 0.001 and 1.001 in RealNVP.
    """
    from nflows import distributions, flows, transforms

    layers: list[nn.Module] = []
    spline = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
    made = {"features": SIZE, "hidden_features": HIDDEN, "num_blocks": 1, "use_residual_blocks": False}
    for k in range(LAYERS[family]):
        if family == "realnvp":
            layers += [transforms.ActNorm(SIZE), transforms.AffineCouplingTransform(_mask(k), Dense)]
        elif family == "nsf-coupling":
            layers.append(transforms.PiecewiseRationalQuadraticCouplingTransform(_mask(k), Dense, **spline))
        elif family == "maf":
            layers += [transforms.ReversePermutation(SIZE), transforms.MaskedAffineAutoregressiveTransform(**made)]
        else:
            masked = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(**made, **spline)
            layers += [transforms.ReversePermutation(SIZE), masked]
    flow = flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([SIZE]))
    return Opponent(flow.eval(), lambda flow, x: flow.log_prob(x), lambda flow, n: flow.sample(n))


class Dense(nn.Sequential):
    """The network of a coupling, as nflows and normflows call it; splines warn at every call unless it tells its units."""

    hidden_features = HIDDEN

    def __init__(self, size: int, outputs: int) -> None:
        inner = [part for pair in pairwise((size, HIDDEN, HIDDEN)) for part in (nn.Linear(*pair), nn.ReLU())]
        super().__init__(*inner, nn.Linear(HIDDEN, outputs))

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        return super().forward(x)


def _mask(k: int) -> Tensor:
    """Which dimensions the k-th coupling changes: those where it is positive."""
    return (torch.arange(SIZE) % 2 == k % 2).int()


# -- the step ---------------------------------------------------------------------------------------------------------


def flat(model: nn.Module) -> tuple[Tensor, Callable[[Tensor], dict[str, Tensor]]]:
    """All parameters as one vector, and the way back to names."""
    named = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [p.numel() for p in named.values()]

    def views(vector: Tensor) -> dict[str, Tensor]:
        return {n: piece.view(p.shape) for (n, p), piece in zip(named.items(), vector.split(sizes), strict=True)}

    return torch.cat([p.reshape(-1) for p in named.values()]), views


def whole(model: nn.Module, lr: float) -> Step:
    """Batch, loss, gradient and Adam in one graph."""
    vector, views = flat(model)
    first, second, t = torch.zeros_like(vector), torch.zeros_like(vector), torch.zeros(())

    def advance(p: Tensor, m: Tensor, v: Tensor, t: Tensor, data: Tensor, rows: Tensor) -> Tensor:
        x = data[rows]
        g, loss = grad_and_value(lambda p: functional_call(model, views(p), (x,)))(p)
        t += 1
        m.lerp_(g, 1 - B1)
        v.lerp_(g * g, 1 - B2)
        p.sub_(lr * (m / (1 - B1**t)) / ((v / (1 - B2**t)).sqrt() + EPS))
        return loss

    compiled = torch.compile(advance, fullgraph=True)

    @torch.no_grad()
    def step(data: Tensor, rows: Tensor) -> Tensor:
        return compiled(vector, first, second, t, data, rows)

    return step


def loss_only(model: nn.Module, lr: float) -> Step:
    """The batch and the loss in as many graphs as it takes, a fused Adam outside."""
    compiled = torch.compile(lambda data, rows: model(data[rows]))
    return _outside(model, compiled, lr)


def eager(model: nn.Module, lr: float) -> Step:
    """Nothing compiled."""
    return _outside(model, lambda data, rows: model(data[rows]), lr)


def _outside(model: nn.Module, loss_of: Step, lr: float) -> Step:
    adam = torch.optim.Adam(model.parameters(), lr, fused=True)

    def step(data: Tensor, rows: Tensor) -> Tensor:
        adam.zero_grad()
        loss = loss_of(data, rows)
        loss.backward()
        adam.step()
        return loss.detach()

    return step


FORMS = {"whole": whole, "loss only": loss_only, "eager": eager}
