"""`check`: sound programs pass every law that applies, and each law catches a program that breaks it."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from probgen.check import check, judge, laws
from probgen.check.densities import _grid
from probgen.check.subject import Subject
from probgen.program import Program

ROWS = np.random.default_rng(0).normal(size=(96, 2)).astype("float32")


def pair(seed=0):
    """A sound VAE on two numbers."""
    torch.manual_seed(seed)
    encoder, decoder = nn.Linear(2, 2), nn.Linear(2, 2)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    return model, guide


def verdict(law, model, guide=None, data=ROWS):
    return judge(law, Subject(Program(model, guide), data if isinstance(data, dict) else {"x": data}))


def refused(law, model, guide, *words, data=ROWS):
    found = verdict(law, model, guide, data)
    assert found.passed is False, found
    assert all(word in found.sentence for word in words) and "\n" not in found.sentence, found


def test_a_sound_program_passes_every_law_that_applies():
    found = {v.law: v for v in check(Program(*pair()), {"x": ROWS})}
    assert {v.passed for v in found.values()} == {True, None}, [str(v) for v in found.values()]
    assert [law for law, v in found.items() if v.passed is None] == ["fast loss", "density"]
    assert len(found) == len(laws.LAWS)


def test_a_program_that_does_not_run_is_told_once():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(5), 1.0).to_event(1), obs=x)

    found = check(Program(model), {"x": ROWS})
    assert found[0].passed is False and {v.passed for v in found[1:]} == {None}
    assert "not looked at" in found[1].sentence


def test_a_forgotten_plate():
    def model(x):
        scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
        pyro.sample("x", dist.Normal(0.0, scale).expand([len(x), 2]).to_event(1), obs=x)

    refused(laws.law_data_plate, model, None, "no plate holds the rows of 'x'", 'plate("data", len(x))')


def test_a_latent_that_the_guide_forgets():
    model, _ = pair()
    refused(laws.law_runs, model, lambda x: None, "'z' has neither a guide nor enumeration")


def test_a_site_that_the_model_does_not_have():
    model, guide = pair()

    def more(x):
        guide(x)
        pyro.sample("extra", dist.Normal(0.0, 1.0))

    refused(laws.law_guide, model, more, "'extra'", "no latent of the model")


def test_a_parameter_that_no_gradient_reaches():
    model, guide = pair()
    idle = nn.Linear(2, 2)

    def guide_with_idle_layer(x):
        pyro.module("idle", idle)
        guide(x)

    refused(laws.law_gradients, model, guide_with_idle_layer, "no gradient reaches the parameter", "idle")


def test_a_guide_outside_the_support_of_the_prior():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.ones(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    _, guide = pair()
    assert verdict(laws.law_guide, model, guide).passed is False


def test_a_latent_of_another_shape_in_the_guide():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * torch.ones(2), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(1)), 1.0).expand([len(x), 1]).to_event(1))

    refused(laws.law_guide, model, guide, "'z' has shape (32, 1) in the guide and (32, 2) in the model")


def test_data_of_another_shape_than_the_distribution():
    def model(x):
        with pyro.plate("data", len(x)):
            mean = pyro.param("m", torch.zeros(1))
            pyro.sample("x", dist.Normal(mean, 1.0).expand([len(x), 1]).to_event(1), obs=x)

    refused(laws.law_shapes, model, None, "'x'", "[32, 2]", "[32, 1]")


def test_an_observation_read_as_its_own_input():
    def model(x):
        weight = pyro.param("weight", torch.zeros(()))
        with pyro.plate("data", len(x)):
            first = pyro.sample(
                "x", dist.Normal(weight * x.roll(1, 1) + x.sum(1, keepdim=True), 1.0).to_event(1), obs=x
            )
        return first

    refused(laws.law_runs, model, None, "'x' is read as input to its own site")


def test_a_plate_that_misstates_n():
    encoder = nn.Linear(2, 2)

    def model(x):
        with pyro.plate("data", 1000, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", 1000, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    assert verdict(laws.law_scaling, model, guide).passed is False


def test_rows_that_see_one_another():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("m", torch.zeros(2)), 1.0).to_event(1), obs=x - x.mean(0))

    refused(laws.law_rows, model, None, "changes with another row")


def test_a_missing_value_that_goes_unnoticed():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("m", torch.zeros(2)), 1.0).to_event(1), obs=torch.nan_to_num(x))

    refused(laws.law_missing_values, model, None, "a NaN in 'x' goes unnoticed")


class Untracked(dist.TorchDistribution):
    """A Normal whose density is not that of its draws: e^mass times too large."""

    support, has_rsample, arg_constraints = dist.constraints.real, True, {}

    def __init__(self, base, mass):
        self.base, self.mass = base, mass
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def rsample(self, sample_shape=()):
        return self.base.rsample(sample_shape)

    def log_prob(self, value):
        return self.base.log_prob(value) + self.mass

    def expand(self, batch_shape, _instance=None):
        return Untracked(self.base.expand(batch_shape), self.mass)


@pytest.mark.parametrize(("mass", "passed"), [(0.0, True), (0.1, False)])
@pytest.mark.parametrize("dims", [1, 2])
def test_a_density_that_does_not_integrate_to_one(mass, passed, dims):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", Untracked(dist.StudentT(3.0, torch.ones(dims), 0.3), mass / dims).to_event(1), obs=x)

    assert verdict(laws.law_density, model, data=ROWS[:, :dims]).passed is passed


@pytest.mark.parametrize(("extra", "passed"), [(0.0, True), (0.5, False)])
def test_bits_whose_probabilities_do_not_sum_to_one(extra, passed):
    bits = (ROWS > 0).astype("float32")

    class Bits(dist.Bernoulli):
        def log_prob(self, value):
            return super().log_prob(value) + extra

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            pyro.sample("x", Bits(torch.tensor([0.2, 0.7])[y][..., None].expand(*y.shape, 2)).to_event(1), obs=x)

    assert verdict(laws.law_density, model, data=bits).passed is passed


def test_the_quadrature_reaches_every_tail():
    rows = np.random.default_rng(0).standard_cauchy((500, 1))
    points, log_volume = _grid(rows)
    assert abs(np.exp(-np.log(np.pi * (1 + points[:, 0] ** 2)) + log_volume).sum() - 1) < 1e-3


def test_bounds_catch_a_program_that_changes_from_call_to_call():
    _, guide = pair()

    def model(x):
        shift = 9.0 if len(x) > 7000 else 0.0  # 300 draws of 32 rows are one long batch, 200 are shorter
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + shift, 1.0).to_event(1), obs=x)

    refused(laws.law_bounds, model, guide, "ELBO", "lies above IWAE-5", "not the same at every call")


def test_hidden_state_is_caught_when_the_program_is_built_again(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import pyro, torch\n"
        "import pyro.distributions as dist\n"
        "from probgen.program import Program\n"
        "def program(spec):\n"
        "    hidden = torch.randn(2)\n"
        "    def model(x):\n"
        "        m = pyro.param('m', torch.zeros(2))\n"
        "        with pyro.plate('data', len(x)):\n"
        "            pyro.sample('x', dist.Normal(m + HIDDEN, 1.0).to_event(1), obs=x)\n"
        "    return Program(model)\n"
    )
    from probgen.data import load_data
    from probgen.zoo import load

    data, text = load_data({"x": ROWS}), path.read_text()
    for source, passed in (("hidden", False), ("0.0", True)):
        path.write_text(text.replace("HIDDEN", source))
        found = judge(laws.law_save_and_open, Subject(load(path, data), data))
        assert found.passed is passed, found


def test_kinds_without_a_density_say_so():
    def implicit(x):
        scale = pyro.param("scale", torch.ones(2))
        with pyro.plate("data", len(x)):
            noise = pyro.sample("noise", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Delta(noise * scale, event_dim=1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("noise", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    for law in (laws.law_rows, laws.law_scaling, laws.law_missing_values):
        found = verdict(law, implicit, guide)
        assert found.passed is None and "implicit" in found.sentence
