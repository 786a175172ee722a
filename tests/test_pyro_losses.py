"""The bounds are Pyro's own where Pyro has them, with the same draws; what they are where it does not, in closed form."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs_pyro import CASES
from pyro.infer import JitTrace_ELBO, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

from probgen.errors import ProbgenError
from probgen.pyro import ELBO, IWAE
from probgen.pyro.leaves import private_store
from probgen.pyro.loss import as_loss
from probgen.pyro.trace import callables, tensors
from probgen.schedules import Linear


@pytest.fixture(autouse=True)
def double_precision():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with private_store(), torch.random.fork_rng():
        yield
    torch.set_default_dtype(before)


def value_and_gradients(loss, case, seeds=1, rows=8):
    """The loss on a batch, and the gradients of the store's parameters, with a seed of their own each."""
    model, guide = callables(case.program)
    batch = {n: a[:rows] for n, a in tensors(case.arrays, torch.float64, "cpu").items()}
    batch = {n: a.double() if case.arrays[n].dtype == np.uint8 else a for n, a in batch.items()}
    pyro.set_rng_seed(99)
    loss.differentiable_loss(model, guide, **batch) if isinstance(loss, ELBO | IWAE) else loss.loss(
        model, guide, **batch
    )
    for module in {id(m): m for m in _modules(case)}.values():
        module.double()
    pyro.clear_param_store()
    values, gradients = [], []
    for seed in range(seeds):
        pyro.set_rng_seed(seed)
        values.append(loss.loss_and_grads(model, guide, **batch))
        params = pyro.get_param_store()._params
        gradients.append({n: p.grad.clone() for n, p in params.items() if p.grad is not None})
        for p in params.values():
            p.grad = None
    return np.array(values), gradients


def _modules(case):
    for fn in (case.program.model, case.program.guide):
        for cell in getattr(fn, "__closure__", None) or ():
            if isinstance(cell.cell_contents, torch.nn.Module):
                yield cell.cell_contents


def same(a, b, case, tolerance=1e-12):
    mine, theirs = value_and_gradients(a, case), value_and_gradients(b, case)
    assert mine[0] == pytest.approx(theirs[0], rel=tolerance)
    assert set(mine[1][0]) == set(theirs[1][0]) and mine[1][0]
    for name, gradient in theirs[1][0].items():
        scale = gradient.abs().max().item() + 1.0
        assert torch.allclose(mine[1][0][name], gradient, rtol=0, atol=100 * tolerance * scale), name


PAIRS = {
    "Trace": (ELBO(kl="sampled"), Trace_ELBO(), ["vae_modules", "plate_states_rows", "masked_site", "nested_plates"]),
    "Trace-3": (ELBO(3, kl="sampled"), Trace_ELBO(num_particles=3), ["vae_modules", "conditional_vae"]),
    "score": (ELBO(), Trace_ELBO(), ["discrete_guide"]),
    "mean-field": (ELBO(), TraceMeanField_ELBO(), ["vae_modules", "plate_states_rows", "nested_plates", "state_space"]),
    "enumerated": (
        ELBO(kl="sampled"),
        TraceEnum_ELBO(max_plate_nesting=1),
        ["gmm", "hmm", "semi_supervised_mask", "observed_by_mask"],
    ),
    "IWAE": (IWAE(4), RenyiELBO(alpha=0.0, num_particles=4), ["plate_states_rows"]),
    "Renyi": (IWAE(4, alpha=0.5), RenyiELBO(alpha=0.5, num_particles=4), ["plate_states_rows"]),
}


@pytest.mark.parametrize("name, program", [(name, p) for name, (_, _, programs) in PAIRS.items() for p in programs])
def test_the_same_number_and_gradients_as_pyro(name, program):
    mine, theirs, _ = PAIRS[name]
    same(mine, theirs, CASES[program]())


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_renyi_per_datum(alpha):
    """Where rows have latents of their own the draws come in another order (k rows of one long batch): in the mean.

    40 seeds a side, 4.5 standard errors of the difference on the loss: a false alarm in 10⁵.
    """
    case = CASES["vae_modules"]()
    mine = value_and_gradients(IWAE(5, alpha=alpha), case, 40)
    theirs = value_and_gradients(RenyiELBO(alpha=alpha, num_particles=5), case, 40)
    error = np.hypot(mine[0].std() / 40**0.5, theirs[0].std() / 40**0.5)
    assert abs(mine[0].mean() - theirs[0].mean()) < 4.5 * error
    joint = value_and_gradients(ELBO(5, kl="sampled"), case, 40)[0]  # it would show: the ELBO is far looser
    assert joint.mean() - mine[0].mean() > 3.5 * error
    for name in mine[1][0]:
        a, b = (torch.stack([g[name] for g in side[1]]) for side in (mine, theirs))
        spread = (a.var(0) / 40 + b.var(0) / 40).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() <= 6 * spread + 1e-9).all(), name


def test_stock_losses_that_stand_in_are_equal():
    """What `by=` makes of each of Pyro's own."""
    for stock, kind in ((Trace_ELBO(), "Stock"), (JitTrace_ELBO(), "Stock"), (TraceGraph_ELBO(), "StockGradients")):
        assert type(as_loss(stock)).__name__ == kind
    assert isinstance(as_loss(TraceEnum_ELBO()), ELBO) and as_loss(TraceEnum_ELBO()).kl == "sampled"
    renyi = as_loss(RenyiELBO(alpha=0.5, num_particles=7))
    assert isinstance(renyi, IWAE) and (renyi.alpha, renyi.num_particles) == (0.5, 7)
    with pytest.raises(ProbgenError, match="ReweightedWakeSleep has no differentiable loss"):
        as_loss(pyro.infer.ReweightedWakeSleep())
    with pytest.raises(ProbgenError, match="`by` must be a loss"):
        as_loss(3)


def test_trace_graph_keeps_value_and_gradients():
    """The surrogate read off `loss_and_grads` has its value, and leaves the gradients that it leaves."""
    case = CASES["discrete_guide"]()
    theirs = value_and_gradients(TraceGraph_ELBO(), case)

    class Read:
        def loss(self, *args, **kwargs):
            with torch.no_grad():
                return float(as_loss(TraceGraph_ELBO()).objective(*args, **kwargs))

        def loss_and_grads(self, *args, **kwargs):
            loss = as_loss(TraceGraph_ELBO()).objective(*args, **kwargs)
            loss.backward()
            return loss.item()

    mine = value_and_gradients(Read(), case)
    assert mine[0] == pytest.approx(theirs[0], rel=1e-12)
    assert all(torch.allclose(mine[1][0][n], g, rtol=1e-12) for n, g in theirs[1][0].items())


def test_beta_and_free_bits():
    """beta · KL, and max(KL, λN), on a KL known in closed form; log p(x | z) is left alone."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0 * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(1.0 + 0 * x, 1.0))

    x = torch.randn(6)
    fit, kl = -dist.Normal(0.0, 1.0).log_prob(x).sum().item(), 6 * 0.5
    assert ELBO().loss(model, guide, x) == pytest.approx(fit + kl)
    assert ELBO(beta=0.25).loss(model, guide, x) == pytest.approx(fit + 0.25 * kl)
    assert ELBO(free_bits=0.4).loss(model, guide, x) == pytest.approx(fit + kl)
    assert ELBO(free_bits=0.7).loss(model, guide, x) == pytest.approx(fit + 6 * 0.7)
    warm = ELBO(beta=Linear(0.0, 1.0, 10))
    assert [warm.at(t).loss(model, guide, x) for t in (0, 5, 10, 99)] == pytest.approx(
        [fit, fit + kl / 2, fit + kl, fit + kl]
    )
    assert warm.at(3)._plans is warm._plans  # what was seen of the program is not looked at anew each step
    assert (ELBO() + 0.5 * ELBO(beta=0.0))(model, guide, x).item() == pytest.approx(1.5 * fit + kl)
    terms = ELBO().terms(model, guide, x)
    assert terms["x"].item() == pytest.approx(-fit) and terms["z"].item() == pytest.approx(-kl)


def test_labels_that_come_and_go_in_one_svi():
    """Pyro's semi-supervised idiom: one loss, called with labels and without."""

    def model(x, y=None):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(0.3), obs=y, infer={"enumerate": "parallel"} if y is None else None)
            pyro.sample("x", dist.Normal(2.0 * y, 1.0), obs=x)

    def guide(x, y=None):
        pass

    x, y = torch.randn(5), torch.tensor([0.0, 1, 1, 0, 1])
    joint = dist.Bernoulli(0.3).log_prob(y) + dist.Normal(2 * y, 1.0).log_prob(x)
    marginal = torch.logaddexp(
        np.log(0.7) + dist.Normal(0.0, 1.0).log_prob(x), np.log(0.3) + dist.Normal(2.0, 1.0).log_prob(x)
    )
    loss = ELBO()
    for _ in range(2):
        assert loss.loss(model, guide, x, y) == pytest.approx(-joint.sum().item())
        assert loss.loss(model, guide, x) == pytest.approx(-marginal.sum().item())


def test_hmm_against_the_forward_algorithm():
    case = CASES["hmm"]()
    x = torch.as_tensor(case.arrays["x"]).double()
    start, move = torch.tensor([0.5, 0.5]), torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    emit = torch.tensor([0.2, 0.9])
    total = 0.0
    for row in x:
        alpha = start * torch.where(row[0] > 0, emit, 1 - emit)
        for value in row[1:]:
            alpha = (alpha @ move) * torch.where(value > 0, emit, 1 - emit)
        total += alpha.sum().log().item()
    assert ELBO().loss(case.program.model, lambda x: None, x) == pytest.approx(-total, rel=1e-6)


def test_enumeration_in_the_guide_is_the_exact_expectation():
    """E_q over a discrete guide, with a weight of zero too, against a sum written out."""
    logits = torch.tensor([[0.0, 1.0, -40.0], [2.0, -1.0, 0.5]])

    def model(x):
        with pyro.plate("data", 2):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
            pyro.sample("x", dist.Normal(y.double(), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 2):
            pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})

    x = torch.tensor([0.3, 1.7])
    q, p = dist.Categorical(logits=logits), torch.tensor([0.2, 0.3, 0.5]).log()
    cost = p + dist.Normal(torch.arange(3.0), 1.0).log_prob(x[:, None]) - q.logits
    assert ELBO().loss(model, guide, x) == pytest.approx(-(q.probs * cost).sum().item(), rel=1e-10)


@pytest.mark.parametrize("loss", [ELBO(), IWAE(3)], ids=["ELBO", "IWAE"])
def test_stock_svi_takes_them(loss):
    case = CASES["vae_modules"]()
    for module in _modules(case):
        module.double()
    x = torch.as_tensor(case.arrays["x"]).double()
    svi = pyro.infer.SVI(case.program.model, case.program.guide, pyro.optim.Adam({"lr": 1e-2}), loss)
    losses = [svi.step(x) for _ in range(60)]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    assert np.isfinite(svi.evaluate_loss(x))


def test_a_scale_of_the_programs_own_counts_in_training():
    """`poutine.scale` on a likelihood tempers IWAE as it does the ELBO, per datum and under any data plate."""
    x = torch.randn(4)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.poutine.scale(scale=0.5):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    torch.manual_seed(0)
    z = torch.randn(3 * 4).view(3, 4)
    weights = 0.5 * dist.Normal(z, 1.0).log_prob(x)
    expected = (torch.logsumexp(weights, 0) - np.log(3)).sum().item()
    torch.manual_seed(0)
    assert -IWAE(3).loss(model, guide, x) == pytest.approx(expected, rel=1e-10)
