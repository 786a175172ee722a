"""Small Pyro programs in every idiom of the PPL's tutorials: what the engine, the run and the verbs are tested on.

`CASES[name]()` builds a fresh `Case`: a program, its arrays (numpy), and how it is fitted and sampled.
"""

import functools
import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import autoguide
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.nn import functional as F

from probgen import Program
from probgen.pyro import ELBO


@dataclass(frozen=True)
class Case:
    program: Program
    arrays: dict[str, np.ndarray]
    batch_size: int | None = None
    given: dict[str, Any] = field(default_factory=dict)
    local_guide: bool = False  # an autoguide that knows only the training rows


CASES = {}


def case(build):
    """A builder whose modules start from the same weights every time."""

    @functools.wraps(build)
    def seeded():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build()

    CASES[build.__name__] = seeded
    return seeded


def bits(n=24, d=6, seed=0):
    return {"x": np.random.default_rng(seed).integers(0, 2, (n, d)).astype(np.uint8)}


def reals(n=24, d=3, seed=0):
    return {"x": np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)}


def classes(n=24, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    return {"x": (rng.normal(size=(n, 2)) + 2 * y[:, None]).astype(np.float32), "y": y}


def network(*sizes):
    torch.manual_seed(sum(sizes))
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


# -- networks -----------------------------------------------------------------------------------------------------


def vae(encoder, decoder, z=2, d=6, by=None):
    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            code = pyro.sample("z", dist.Normal(torch.zeros(z), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(code)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return Program(model, guide, by=by or ELBO())


@case
def vae_modules():
    return Case(vae(network(6, 5, 4), network(2, 5, 6)), bits(), 8)


@case
def vae_batchnorm():
    encoder = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4))
    decoder = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 6))
    return Case(vae(encoder, decoder), bits(), 8)


@case
def vae_dropout():
    encoder = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 4))
    return Case(vae(encoder, network(2, 5, 6)), bits(), 8)


class TutorialVAE(nn.Module):
    """The VAE of Pyro's tutorial: model and guide are methods of one nn.Module."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = network(6, 5, 4), network(2, 5, 6)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, z_scale = x.new_zeros((x.shape[0], 2)), x.new_ones((x.shape[0], 2))
            z = pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))
            loc_img = torch.sigmoid(self.decoder(z))
            pyro.sample("obs", dist.Bernoulli(loc_img).to_event(1), obs=x.reshape(-1, 6))

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = self.encoder(x.reshape(-1, 6)).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))


@case
def vae_bound_methods():
    net = TutorialVAE()
    return Case(Program(net.model, net.guide, by=ELBO()), bits(), 8)


class Decoder(PyroModule):
    """A PyroModule whose scale is a constrained PyroParam and whose layers are PyroModule[nn.Linear]."""

    def __init__(self, name="decoder"):
        super().__init__(name)
        torch.manual_seed(3)
        self.linear = PyroModule[nn.Linear](2, 3)
        self.scale = PyroParam(torch.tensor(0.7), constraint=constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.linear(z), self.scale).to_event(1), obs=x)


class Encoder(PyroModule):
    def __init__(self, name="encoder"):
        super().__init__(name)
        torch.manual_seed(4)
        self.linear = PyroModule[nn.Linear](3, 2)
        self.scale = PyroParam(torch.ones(2), constraint=constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.linear(x), self.scale).to_event(1))


@case
def pyro_modules():
    return Case(Program(Decoder(), Encoder(), by=ELBO()), reals(), 8)


class Both(PyroModule):
    """A PyroModule whose bound methods are model and guide."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.decoder = PyroModule[nn.Linear](2, 3)
        self.encoder = PyroModule[nn.Linear](3, 2)
        self.q_scale = PyroParam(torch.ones(2), constraint=constraints.positive)

    def model(self, x):
        pyro.module("both", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("both", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), self.q_scale).to_event(1))


@case
def pyro_module_methods():
    both = Both()
    return Case(Program(both.model, both.guide, by=ELBO()), reals(), 8)


# -- global parameters and global latents -------------------------------------------------------------------------


@case
def global_params():
    """An exact program: a marginal mixture with a simplex and positive scales in the parameter store."""

    def model(x):
        weights = pyro.param("weights", torch.tensor([0.3, 0.7]), constraint=constraints.simplex)
        loc = pyro.param("loc", lambda: torch.tensor([-1.0, 1.0]))
        scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            mixture = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(loc, scale))
            pyro.sample("x", mixture, obs=x)

    return Case(Program(model, by=ELBO()), {"x": reals()["x"][:, 0]}, 8)


def regression_data(n=24):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(n, 2)).astype(np.float32)
    return {"x": x, "y": (x @ [1.0, -2.0] + 0.5 + 0.3 * rng.normal(size=n)).astype(np.float32)}


class BayesianRegression(PyroModule):
    """Pyro's Bayesian regression tutorial."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("y", dist.Normal(mean, sigma), obs=y)
        return mean


def _regression(guide):
    model = BayesianRegression()
    return Case(Program(model, guide(model), by=ELBO()), regression_data(), 8, {"x": np.zeros(2, np.float32)})


@case
def regression_auto_normal():
    return _regression(autoguide.AutoNormal)


@case
def regression_auto_multivariate_normal():
    return _regression(autoguide.AutoMultivariateNormal)


@case
def regression_auto_delta():
    return _regression(autoguide.AutoDelta)


@case
def regression_auto_low_rank():
    return _regression(lambda model: autoguide.AutoLowRankMultivariateNormal(model, rank=1))


@case
def regression_auto_list():
    def guide(model):
        parts = autoguide.AutoGuideList(model)
        parts.append(autoguide.AutoNormal(poutine.block(model, expose=["linear.weight", "linear.bias"])))
        parts.append(autoguide.AutoDelta(poutine.block(model, expose=["sigma"])))
        return parts

    return _regression(guide)


@case
def local_autoguide():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    return Case(Program(model, autoguide.AutoNormal(model), by=ELBO()), {"x": reals()["x"][:, 0]}, local_guide=True)


def normal_mean(plate, start=1.0):
    """θ ~ N(0, 10²), x_n ~ N(θ, 1), with q(θ) = N(m, s²)."""

    def model(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 10.0))
        with plate(x):
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(start), constraint=constraints.positive)
        pyro.sample("theta", dist.Normal(loc, scale))

    return Program(model, guide, by=ELBO())


@case
def plate_states_rows():
    return Case(normal_mean(lambda x: pyro.plate("data", 24, subsample_size=len(x))), {"x": 2 + reals()["x"][:, 0]}, 8)


@case
def self_subsampling():
    def model(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x), subsample_size=5) as rows:
            pyro.sample("x", dist.Normal(theta, 1.0), obs=x[rows])

    guide = normal_mean(None).guide
    return Case(Program(model, guide, by=ELBO()), {"x": 2 + reals()["x"][:, 0]})


@case
def nested_plates():
    """Data × features, both vectorized, with a latent in either plate and in both."""

    def model(x):
        rows, features = pyro.plate("data", len(x), dim=-2), pyro.plate("features", 3, dim=-1)
        with features:
            mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with rows:
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            with features:
                pyro.sample("x", dist.Normal(mean + shift, 0.5), obs=x)

    def guide(x):
        rows, features = pyro.plate("data", len(x), dim=-2), pyro.plate("features", 3, dim=-1)
        with features:
            loc = pyro.param("loc", torch.zeros(3))
            scale = pyro.param("scale", 0.5 * torch.ones(3), constraint=constraints.positive)
            mean = pyro.sample("mean", dist.Normal(loc, scale))
        slope = pyro.param("slope", torch.tensor(0.5))
        with rows:
            pyro.sample("shift", dist.Normal(slope * (x - mean).mean(-1, keepdim=True), 0.3))

    return Case(Program(model, guide, by=ELBO()), reals(), 8)


@case
def masked_site():
    """Gaussian data with missing entries, told by a mask array; a masked row has density one."""

    def model(x, observed):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=observed.bool()):
                pyro.sample("x", dist.Normal(z, scale), obs=x)

    def guide(x, observed):
        slope = pyro.param("slope", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x * observed, 0.8))

    arrays = {"x": reals()["x"][:, 0], "observed": (np.arange(24) % 3 > 0).astype(np.int64)}
    return Case(Program(model, guide, by=ELBO()), arrays, 8)


# -- enumeration --------------------------------------------------------------------------------------------------


@case
def gmm():
    """A mixture whose assignments are enumerated; exact, no guide."""

    def model(x):
        weights = pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
        loc = pyro.param("loc", torch.tensor([[-1.0, 0.0], [1.0, 0.5], [3.0, 4.0]]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc[z], 1.0).to_event(1), obs=x)

    return Case(Program(model, by=ELBO()), {"x": classes()["x"]}, 8)


@case
def gmm_tutorial():
    """Pyro's GMM tutorial: global weights, means and scale under an AutoDelta, assignments enumerated."""

    def model(x):
        weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
        with pyro.plate("components", 2):
            locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            assignment = pyro.sample("assignment", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=x)

    exposed = poutine.block(model, expose=["weights", "scale", "locs"])
    guide = autoguide.AutoNormal(exposed)
    return Case(Program(model, guide, by=ELBO()), {"x": classes()["x"][:, 0]}, 8)


@case
def hmm():
    """Sequences with a hidden chain under pyro.markov, enumerated: Pyro's HMM tutorial, model 1."""

    def model(x):
        start = pyro.param("start", torch.tensor([0.5, 0.5]), constraint=constraints.simplex)
        move = pyro.param("move", torch.tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=constraints.simplex)
        emit = pyro.param("emit", torch.tensor([0.2, 0.9]), constraint=constraints.unit_interval)
        with pyro.plate("data", len(x)):
            state = None
            for t in pyro.markov(range(x.shape[1])):
                probs = start if state is None else move[state]
                state = pyro.sample(f"z_{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
                pyro.sample(f"x_{t}", dist.Bernoulli(emit[state]), obs=x[:, t])

    return Case(Program(model, by=ELBO()), bits(24, 5), 8)


def semi_supervised(observed):
    """M2 (Kingma et al. 2014): the guide enumerates the labels that are missing, and holds the others."""
    decoder, encode_y, encode_z = network(5, 6, 2), network(2, 6, 3), network(5, 6, 4)

    def model(x, y=None, seen=None):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            y = pyro.sample("label", dist.Categorical(torch.ones(3) / 3))
            y = F.one_hot(y, 3).to(z).expand(*torch.broadcast_shapes(y.shape, z.shape[:-1]), 3)
            pyro.sample(
                "x", dist.Normal(decoder(torch.cat([z.expand(*y.shape[:-1], 2), y], -1)), 1.0).to_event(1), obs=x
            )

    def guide(x, y, seen=None):
        pyro.module("encode_y", encode_y), pyro.module("encode_z", encode_z)
        known = observed(y, seen)
        with pyro.plate("data", len(x)):
            held = torch.log(F.one_hot(y.clamp(min=0), 3).to(x) * (1 - 3e-6) + 1e-6)
            logits = torch.where(known[:, None], held, encode_y(x))
            label = pyro.sample("label", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            one_hot = F.one_hot(label, 3).to(x)
            one_hot, data = torch.broadcast_tensors(one_hot, torch.cat([x, x[:, :1]], -1))
            loc, log_scale = encode_z(torch.cat([data[..., :2], one_hot], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return Program(model, guide, by=ELBO())


@case
def semi_supervised_minus_one():
    arrays = classes()
    arrays["y"] = np.where(np.arange(24) % 2 == 0, arrays["y"], -1)
    return Case(semi_supervised(lambda y, seen: y >= 0), arrays, 8)


@case
def semi_supervised_mask():
    arrays = {**classes(), "seen": np.arange(24) % 2}
    return Case(semi_supervised(lambda y, seen: seen.bool()), arrays, 8)


@case
def observed_by_mask():
    """Pyro's own `obs_mask`: labels where they are known, enumerated where they are not."""
    classify = network(2, 6, 3)

    def model(x, y, seen):
        loc = pyro.param("loc", torch.tensor([[0.0, 0.0], [2.0, 2.0], [4.0, 4.0]]))
        with pyro.plate("data", len(x)):
            label = pyro.sample("y", dist.Categorical(torch.ones(3) / 3), obs=y.clamp(min=0), obs_mask=seen.bool())
            pyro.sample("x", dist.Normal(loc[label], 1.0).to_event(1), obs=x)

    def guide(x, y, seen):
        pyro.module("classify", classify)
        with pyro.plate("data", len(x)), poutine.mask(mask=~seen.bool()):
            logits = classify(x)
            pyro.sample("y_unobserved", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})

    arrays = {**classes(), "seen": np.arange(24) % 2}
    arrays["y"] = np.where(arrays["seen"], arrays["y"], -1)
    return Case(Program(model, guide, by=ELBO()), arrays, 8, {"seen": 1})


# -- sequences ----------------------------------------------------------------------------------------------------


@case
def state_space():
    """A deep Markov model: z_t ~ N(f(z_{t−1}), 1) under pyro.markov, with a GRU that reads x backwards as guide."""
    torch.manual_seed(7)
    emit, move = nn.Linear(2, 3), nn.Linear(2, 2)
    gru, combine = nn.GRU(3, 4, batch_first=True), nn.Linear(6, 4)

    def model(x):
        pyro.module("emit", emit), pyro.module("move", move)
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x), 2)
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t + 1}", dist.Normal(torch.tanh(move(z)), 1.0).to_event(1))
                pyro.sample(f"x_{t + 1}", dist.Bernoulli(logits=emit(z)).to_event(1), obs=x[:, t])

    def guide(x):
        pyro.module("gru", gru), pyro.module("combine", combine)
        hidden = gru(x.flip(1))[0].flip(1)
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x), 2)
            for t in pyro.markov(range(x.shape[1])):
                loc, log_scale = combine(torch.cat([z, hidden[:, t]], -1)).chunk(2, -1)
                z = pyro.sample(f"z_{t + 1}", dist.Normal(loc, log_scale.exp()).to_event(1))

    x = np.random.default_rng(2).integers(0, 2, (24, 4, 3)).astype(np.uint8)
    return Case(Program(model, guide, by=ELBO()), {"x": x}, 8)


# -- draws without a reparametrisation ----------------------------------------------------------------------------


@case
def discrete_guide():
    """A Bernoulli code drawn in the guide: score-function gradients, baselines with TraceGraph_ELBO."""
    encoder, decoder = network(6, 5, 2), network(2, 5, 6)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(0.5 * torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(b)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Bernoulli(logits=encoder(x)).to_event(1))

    return Case(Program(model, guide, by=ELBO()), bits(), 8)


@case
def conditional_vae():
    """Labels are given: the model reads them and never draws them."""
    encoder, decoder = network(9, 5, 4), network(5, 5, 6)

    def model(x, y):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample(
                "x", dist.Bernoulli(logits=decoder(torch.cat([z, F.one_hot(y, 3).to(z)], -1))).to_event(1), obs=x
            )

    def guide(x, y):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(torch.cat([x, F.one_hot(y, 3).to(x)], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return Case(Program(model, guide, by=ELBO()), {**bits(), "y": classes()["y"]}, 8, {"y": 2})
