"""GANs by other packages, around the zoo's own networks, so that parameters are equal; and a whole GAN step by hand.

A step is one update of the critic and one of the generator, each with fresh draws of z, by the peer's own losses; the
penalty of a WGAN-GP has λ = 10. `FORMS` are the ways to run it: `whole` is every loss, gradient and Adam of both players
in one `torch.compile`d function with its state changed in place; `loss_only` compiles each loss, with a fused Adam
outside, which fails where a package takes its penalty's slope by `torch.autograd.grad`; `eager` is the training step that
the package ships, with a fused Adam, nothing compiled.

torchgan and torch-mimicry import torchvision and TensorBoard (and ask for TensorFlow) for their metrics and loggers, which
no loss needs: their modules are imported one by one, without the package's `__init__`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional as F

from benchmarks.opponents_flows import Step, flat
from benchmarks.opponents_pyro import B1, B2, EPS

PENALTY = 10.0
PLAYERS = ("critic", "generator")


class Opponent(nn.Module):
    """A peer's two players; (play, x) → the loss of that play.

    `plays` are the updates of a step, in order: whose, and by which loss. z → [B, *shape] is the generator, and the critic
    is given [B, *seen] and gives [B, 1].
    """

    plays: tuple[tuple[str, str], ...] = (("critic", "tell"), ("generator", "fool"))

    def __init__(
        self, generator: nn.Module, critic: nn.Module, objective: str, shape: tuple[int, ...], z_dim: int
    ) -> None:
        super().__init__()
        self.generator, self.critic, self.penalised = generator, critic, objective == "wgan-gp"
        self.shape, self.z_dim = shape, z_dim

    def forward(self, play: str, x: Tensor) -> Tensor:
        return getattr(self, play)(x)

    def tell(self, x: Tensor) -> Tensor:
        """The critic's loss at real rows and fresh fake ones."""
        raise NotImplementedError

    def fool(self, x: Tensor) -> Tensor:
        """The generator's loss at as many fresh fakes."""
        raise NotImplementedError

    def shipped(self, adams: dict[str, torch.optim.Adam]) -> Callable[[Tensor], Any] | None:
        """The package's own training step on a batch, if it has one."""
        return None


# -- by hand ----------------------------------------------------------------------------------------------------------


class ByHand(Opponent):
    """The losses as a script of one's own would have them."""

    def _fake(self, x: Tensor) -> Tensor:
        return self.generator(torch.randn(len(x), self.z_dim)).reshape(x.shape)

    def tell(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            fake = self._fake(x)
        real, false = self._logits(x, fake)
        if not self.penalised:
            return F.softplus(-real).mean() + F.softplus(false).mean()
        place = torch.rand(len(x)).reshape(-1, *[1] * len(self.shape))
        slope = grad(lambda between: self.critic(between).sum())(torch.lerp(fake, x, place))
        return false.mean() - real.mean() + PENALTY * (slope.flatten(1).norm(dim=1) - 1).square().mean()

    def _logits(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        return self.critic(real), self.critic(fake)

    def fool(self, x: Tensor) -> Tensor:
        d = self.critic(self._fake(x))
        return -d.mean() if self.penalised else F.softplus(-d).mean()


class Joined(ByHand):
    """The same with real and fake rows in one call of the critic, which BatchNorm would mix."""

    def __init__(self, generator: nn.Module, critic: nn.Module, *told: Any) -> None:
        super().__init__(generator, critic, *told)
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in critic.modules()):
            raise RuntimeError("another loss where the critic has BatchNorm")

    def _logits(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        return self.critic(torch.cat([real, fake])).chunk(2)


# -- torchgan ---------------------------------------------------------------------------------------------------------


class TorchGAN(Opponent):
    """`torchgan.losses`; eager is their `train_ops`, as its `Trainer` calls them.

    Its gradient penalty is an update of its own: fresh fakes, an Adam step by the penalty alone, one ε for the whole batch,
    and one norm over all rows' gradients together. In `whole` and `loss_only` ε is a tensor (`train_ops` reads it as a
    number, which would break the graph) and no gradient reaches the generator, which has no use for it.
    """

    def __init__(self, generator: nn.Module, critic: nn.Module, *told: Any) -> None:
        super().__init__(generator, critic, *told)
        losses, models = imported("torchgan", "losses"), imported("torchgan", "models.model")
        sized = {"label_type": "none"}
        self.generator = as_player(models.Generator, generator, self.shape, encoding_dims=self.z_dim, **sized)
        self.critic = as_player(models.Discriminator, critic, (1,), input_dims=len(self.shape), **sized)
        kind = "Wasserstein" if self.penalised else "Minimax"
        self.of_critic = getattr(losses, f"{kind}DiscriminatorLoss")()
        self.of_generator = getattr(losses, f"{kind}GeneratorLoss")()
        if self.penalised:
            self.of_slope = losses.WassersteinGradientPenalty(lambd=PENALTY)
            self.plays = (("critic", "tell"), ("critic", "smooth"), ("generator", "fool"))

    def _fake(self, x: Tensor) -> Tensor:
        return self.generator(torch.randn(len(x), self.z_dim))

    def tell(self, x: Tensor) -> Tensor:
        noise = torch.randn(len(x), self.z_dim)  # drawn where `train_ops` draws it
        real = self.critic(x)
        return self.of_critic(real, self.critic(self.generator(noise).detach()))

    def smooth(self, x: Tensor) -> Tensor:
        """The penalty, as an update by itself."""
        fake, place = self._fake(x).detach(), torch.rand(1)
        between = (place * x + (1 - place) * fake).requires_grad_()
        return self.of_slope.lambd * self.of_slope(between, self.critic(between))

    def fool(self, x: Tensor) -> Tensor:
        return self.of_generator(self.critic(self._fake(x)))

    def shipped(self, adams: dict[str, torch.optim.Adam]) -> Callable[[Tensor], Any]:
        of_critic = [self.of_critic, self.of_slope] if self.penalised else [self.of_critic]

        def step(x: Tensor) -> list[float]:
            told = [loss.train_ops(self.generator, self.critic, adams["critic"], x, "cpu") for loss in of_critic]
            fooled = self.of_generator.train_ops(self.generator, self.critic, adams["generator"], "cpu", len(x))
            return [told[0], *(PENALTY * slope for slope in told[1:]), fooled]  # the penalty is told without λ

        return step


# -- torch-mimicry ----------------------------------------------------------------------------------------------------


class Mimicry(Opponent):
    """`BaseGenerator` and `BaseDiscriminator` of torch-mimicry, their WGAN-GP kin where there is a penalty.

    Eager is their `train_step`, as its `Trainer` calls them; it also reads the mean probabilities of real and fake rows. The
    generator's loss is −log(D + 1e-8). The penalty has one ε a row, as Gulrajani's, and takes images of three channels only.
    """

    def __init__(self, generator: nn.Module, critic: nn.Module, *told: Any) -> None:
        super().__init__(generator, critic, *told)
        self.log = imported("torch_mimicry", "training.metric_log", "training").MetricLog()
        if self.penalised:
            if len(self.shape) != 3 or self.shape[-1] != 3:
                raise RuntimeError("its penalty reshapes ε to three channels")
            base = imported("torch_mimicry", "nets.wgan_gp.wgan_gp_base")
            bases, more = (base.WGANGPBaseGenerator, base.WGANGPBaseDiscriminator), {"gp_scale": PENALTY}
        else:
            base = imported("torch_mimicry", "nets.gan.gan")
            bases, more = (base.BaseGenerator, base.BaseDiscriminator), {}
        kind = {"loss_type": "wasserstein" if self.penalised else "ns"}
        self.generator = as_player(bases[0], generator, self._images, nz=self.z_dim, ngf=0, bottom_width=0, **kind)
        self.critic = as_player(bases[1], critic, (1,), ndf=0, **kind, **more)

    @property
    def _images(self) -> tuple[int, ...]:
        """The shape of a row to the package: channels first. Rows keep their order in memory: nothing looks at it."""
        return (self.shape[-1], *self.shape[:-1]) if len(self.shape) == 3 else self.shape

    def tell(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, *self._images)
        real, fake = self.critic(x), self.generator.generate_images(len(x), device="cpu").detach()
        loss = self.critic.compute_gan_loss(output_real=real, output_fake=self.critic(fake))
        if not self.penalised:
            return loss
        return loss + self.critic.compute_gradient_penalty_loss(real_images=x, fake_images=fake, gp_scale=PENALTY)

    def fool(self, x: Tensor) -> Tensor:
        return self.generator.compute_gan_loss(self.critic(self.generator.generate_images(len(x), device="cpu")))

    def shipped(self, adams: dict[str, torch.optim.Adam]) -> Callable[[Tensor], Any]:
        def step(x: Tensor) -> list[float]:
            batch = (x.reshape(-1, *self._images), None)
            self.critic.train_step(batch, self.generator, adams["critic"], self.log, device="cpu")
            self.generator.train_step(batch, self.critic, adams["generator"], self.log, device="cpu")
            return [self.log.metrics_dict[name]["value"] for name in ("errD", "errG")]

        return step


def as_player(base: type[nn.Module], network: nn.Module, shape: tuple[int, ...], **settings: Any) -> nn.Module:
    """A network as a package's generator or discriminator; its rows are given out in that shape."""

    class Player(base):
        def __init__(self) -> None:
            super().__init__(**settings)
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x).reshape(-1, *shape)

    return Player()


def imported(package: str, module: str, *bare: str) -> Any:
    """A module, without the `__init__` of its package and of the packages in it that are named."""
    for name in (package, *(f"{package}.{inner}" for inner in bare)):
        if name not in sys.modules:
            spec = find_spec(name)
            if spec is None:
                raise ModuleNotFoundError(f"No module named {name!r}")
            sys.modules[name] = module_from_spec(spec)
    return import_module(f"{package}.{module}")


PEERS: dict[str, type[Opponent]] = {
    "by hand": ByHand,
    "by hand, real and fake joined": Joined,
    "torchgan": TorchGAN,
    "torch-mimicry": Mimicry,
}


# -- the step ---------------------------------------------------------------------------------------------------------


def whole(model: Opponent, lr: float) -> Step:
    """The batch, and every play's loss, gradient and Adam, in one graph; the losses of the plays."""
    vectors, views = {}, {}
    for player in PLAYERS:
        vectors[player], views[player] = flat(getattr(model, player))
    slots = {player: (torch.zeros_like(v), torch.zeros_like(v), torch.zeros(())) for player, v in vectors.items()}

    def values(player: str, vector: Tensor) -> dict[str, Tensor]:
        return {f"{player}.{name}": value for name, value in views[player](vector).items()}

    def advance(vectors: dict[str, Tensor], slots: dict[str, tuple[Tensor, ...]], data: Tensor, rows: Tensor) -> Tensor:
        x, losses = data[rows], []
        for player, play in model.plays:
            p, (m, v, t) = vectors[player], slots[player]
            with torch.enable_grad():
                own = p.detach().requires_grad_()
                held = {k: value for name in PLAYERS for k, value in values(name, own if name == player else vectors[name]).items()}  # fmt: skip
                loss = functional_call(model, held, (play, x))
                (g,) = torch.autograd.grad(loss, own)
            t += 1
            m.lerp_(g, 1 - B1)
            v.lerp_(g * g, 1 - B2)
            p.sub_(lr * (m / (1 - B1**t)) / ((v / (1 - B2**t)).sqrt() + EPS))
            losses.append(loss.detach())
        return torch.stack(losses)

    compiled = in_one_graph(advance)

    @torch.no_grad()
    def step(data: Tensor, rows: Tensor) -> Tensor:
        return compiled(vectors, slots, data, rows)

    return step


def loss_only(model: Opponent, lr: float) -> Step:
    """The batch and a play's loss in a graph each, a fused Adam of each player outside."""

    def loss_of(player: str, play: str, data: Tensor, rows: Tensor) -> Tensor:
        held = {name: p.detach() for name, p in model.named_parameters() if not name.startswith(f"{player}.")}
        return functional_call(model, held, (play, data[rows]))

    return _outside(model, in_one_graph(loss_of), lr)


def in_one_graph(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiled, calls of `torch.autograd.grad` within it too; with eager's random stream, also the faster one."""
    torch._dynamo.config.trace_autograd_ops = True
    return torch.compile(function, fullgraph=True, options={"fallback_random": True})


def eager(model: Opponent, lr: float) -> Step:
    """The package's own training step; the losses by hand, uncompiled, where there is no package."""
    shipped = model.shipped(_adams(model, lr))
    if shipped is None:
        return _outside(model, lambda player, play, data, rows: model(play, data[rows]), lr)
    return lambda data, rows: torch.tensor(shipped(data[rows]))


def _outside(model: Opponent, loss_of: Callable[..., Tensor], lr: float) -> Step:
    adams = _adams(model, lr)

    def step(data: Tensor, rows: Tensor) -> Tensor:
        losses = []
        for player, play in model.plays:
            adams[player].zero_grad()
            loss = loss_of(player, play, data, rows)
            loss.backward()
            adams[player].step()
            losses.append(loss.detach())
        return torch.stack(losses)

    return step


def _adams(model: Opponent, lr: float) -> dict[str, torch.optim.Adam]:
    return {name: torch.optim.Adam(getattr(model, name).parameters(), lr, fused=True) for name in PLAYERS}


FORMS = {"whole": whole, "loss only": loss_only, "eager": eager}
