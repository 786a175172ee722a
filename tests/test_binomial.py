"""Binomial diffusion, on chains so short that every path can be counted: the program is held to sums, not to samples."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine

import probgen
from probgen.diffusion import DDIM, CosineSchedule, GeometricSchedule, LearnedSchedule, RectifiedSchedule
from probgen.errors import ProbgenError
from probgen.pyro import ELBO, BinomialDenoiser, DiffusionELBO

SCHEDULES = ["rectified", "cosine", "linear"]
HEARTBEATS = np.array([[float(d % 5 == phase) for d in range(10)] for phase in range(5)])  # a pulse every five bits


@pytest.fixture(autouse=True)
def doubles():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float32)


def states(bits):
    """All words, [2^D, D]."""
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=bits)))


def random_program(bits, steps, schedule="rectified"):
    """The model file's program, with a network whose answer is not zero, and the network."""
    program = probgen.load("binomial", {"x": states(bits).numpy()}, steps=steps, schedule=schedule, hidden=16, layers=1)
    pyro.clear_param_store()
    network = program.denoiser().network.double()
    with torch.no_grad():
        network.last.weight.normal_(0, 0.5)
        network.last.bias.normal_(0, 0.5)
    return program, network


def numbered(path):
    """x [·], x_1, ..., x_T of a path [T + 1, rows, D], as data and latents."""
    return path[0], {f"x_{t}": x for t, x in enumerate(path) if t}


def log_densities(program, path):
    """log p(x, x_1..x_T) and log q(x_1..x_T | x) of each row of a path [T + 1, rows, D], by the program itself."""
    x, latents = numbered(path)
    found = []
    for fn in (program.model, program.guide):
        trace = poutine.trace(poutine.condition(fn, latents)).get_trace(x)
        trace.compute_log_prob()
        found.append(sum(s["log_prob"] for n, s in trace.nodes.items() if n.startswith("x")))
    return found


def every_path(bits, steps):
    """[T + 1, 2^{D (T + 1)}, D], in the order of an array with an axis for x and each x_t."""
    words = states(bits)
    index = torch.cartesian_prod(*[torch.arange(len(words))] * (steps + 1))
    return words[index.T]


def chain_tables(program, bits, steps):
    """log p and log q of all paths as arrays with an axis for each of x, x_1, ..., x_T."""
    size = (2**bits,) * (steps + 1)
    return [value.reshape(size) for value in log_densities(program, every_path(bits, steps))]


def elbo_of(log_p, log_q):
    """E_q[log p − log q] of each x, [S]; a path that the guide never takes counts nothing."""
    taken = torch.where(log_q > -torch.inf, log_p - log_q, 0.0)
    return (log_q.exp() * taken).flatten(1).sum(1)


def over(table, *kept):
    """The sum over all other axes."""
    others = [axis for axis in range(table.dim()) if axis not in kept]
    return table.sum(others) if others else table


def transitions(model, words, steps):
    """log p(x_T) [S] and the matrices log p(x_{t−1} | x_t), from t = T to 1, [S, S] in x_t, x_{t−1}, off one trace."""
    path = words.expand(steps + 1, *words.shape)
    x, latents = numbered(path)
    nodes = poutine.trace(poutine.condition(model, latents)).get_trace(x).nodes
    names = [f"x_{t}" for t in range(steps - 1, 0, -1)] + ["x"]
    matrices = [torch.cat([nodes[name]["fn"].log_prob(w[:, None]) for w in words.split(32)]).T for name in names]
    return nodes[f"x_{steps}"]["fn"].log_prob(words), matrices


def exact_log_p(model, words, steps):
    """log p(x) of every word, the latents summed out step by step."""
    log_p, matrices = transitions(model, words, steps)
    for matrix in matrices:
        log_p = torch.logsumexp(log_p[:, None] + matrix, 0)
    return log_p


class Placed(BinomialDenoiser):
    """A denoiser whose noise puts x_t where it is told."""

    place = None

    def noised(self, x, t, noise):
        return self.place


def counted_loss(chain, data):
    """`DiffusionELBO`'s loss of each row, [B], its step and x_t counted out: L_T + Σ_i E_{q(x_i | x)}[L_{i−1}]."""
    words, loss, steps = states(data.shape[1]), DiffusionELBO(), chain.steps
    placed = Placed(chain.network, chain.schedule, steps)
    x, placed.place = data.repeat_interleave(len(words), 0), words.repeat(len(data), 1)
    total = 0.0
    for i in range(1, steps + 1):
        losses, terms = loss.at_step(placed, x, x, torch.full((len(x),), float(i)), torch.ones(len(x)))
        assert torch.allclose(losses, -sum(terms.values()))
        one, zero = chain.chances(x, 0.0, i / steps)
        reached = torch.where(placed.place > 0, one, zero).prod(1).reshape(len(data), -1)
        ends = -terms[f"x_{steps}"].reshape(reached.shape)
        total = total + (reached * (losses.reshape(reached.shape) - ends)).sum(1) + ends[:, 0] / steps
    return total


# -- the program, counted out -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_program_sums_to_one():
    """Length 10: p(x) of all 1,024 words, by chained 1024 × 1024 matrices of the program's own steps."""
    program, _ = random_program(10, 3)
    log_p = exact_log_p(program.model, states(10), 3)
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-9)
    assert float(log_p.max() - log_p.min()) > 1  # and it is not flat


@torch.no_grad()
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_elbo_stays_below_the_evidence(schedule):
    """Both over all 4,096 paths of D = 3, T = 3; log p(x) by its matrices too."""
    program, _ = random_program(3, 3, schedule)
    log_p, log_q = chain_tables(program, 3, 3)
    assert torch.allclose(over(log_q.exp(), 0), torch.ones(8), atol=1e-9)
    evidence = torch.logsumexp(log_p, (1, 2, 3))
    assert torch.allclose(exact_log_p(program.model, states(3), 3), evidence, atol=1e-9)
    assert (evidence - elbo_of(log_p, log_q) > 1e-3).all()


@torch.no_grad()
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_step_in_expectation_is_the_whole_chain(schedule):
    """`DiffusionELBO`, its step and x_t counted out, = −ELBO over all 65,536 paths: D = 4, T = 3, ≤1e-9."""
    program, _ = random_program(4, 3, schedule)
    whole = -elbo_of(*chain_tables(program, 4, 3))
    assert torch.allclose(counted_loss(program.denoiser(), states(4)), whole, rtol=0, atol=1e-9)


@torch.no_grad()
def test_noise_puts_as_many_bits_as_the_guide():
    """`noised` compares its noise to q(x_t = 1 | x): over an even grid of noise the mean is that, to one in the grid."""
    program, _ = random_program(1, 4, "cosine")
    chain, grid = program.denoiser(), torch.linspace(0, 1, 10001)[:, None]
    table = chain_tables(program, 1, 4)[1].exp()
    for i in range(1, 5):
        for bit in (0, 1):
            share = chain.noised(torch.full_like(grid, float(bit)), torch.tensor([i / 4]), grid).mean()
            assert float(share) == pytest.approx(float(over(table, 0, i)[bit, 1]), abs=2e-4)


def test_elbo_on_the_chain_trains_the_network():
    """ELBO()'s gradient, through bits that carry none, is that of the exact bound: 20 estimates, 5 SE (t: 1 in 10⁴)."""
    program, network = random_program(3, 3)
    exact = counted_loss(program.denoiser(), states(3)).sum()  # which does not run the chain
    weights = list(network.parameters())
    truth = torch.autograd.grad(exact, weights)
    assert all(float(g.abs().max()) > 0 for g in truth)
    loss, rows, estimates = ELBO(), states(3).repeat(200, 1), []
    for _ in range(20):
        value = loss.differentiable_loss(program.model, program.guide, rows) / 200
        found = torch.autograd.grad(value, weights)
        along = sum((a * b).sum() for a, b in zip(found, truth, strict=True)) / sum((g**2).sum() for g in truth)
        estimates.append((float(value.detach() / exact.detach()), float(along)))
    estimates = np.array(estimates)
    error = estimates.std(0, ddof=1) / math.sqrt(20)
    assert (error < 0.02).all() and (np.abs(estimates.mean(0) - 1) < 5 * error).all()


@pytest.mark.parametrize("schedule", [RectifiedSchedule(), CosineSchedule()], ids=["rectified", "cosine"])
def test_importance_knows_what_each_step_costs(schedule):
    """Of tossed coins with the best network, b̂ = ½ + κ_t (x_t − ½), the costs are the loss of each step, counted out."""
    chain = Placed(lambda x, t: 2 * torch.atanh(schedule.alpha(t)[:, None] * x), schedule, 4)
    costs, x, chain.place = chain.expected_costs(), states(2).repeat_interleave(4, 0), states(2).repeat(4, 1)
    for i in range(1, 5):
        losses, terms = DiffusionELBO().at_step(chain, x, x, torch.full((16,), float(i)), torch.ones(16))
        one, zero = chain.chances(x, 0.0, i / 4)
        reached = torch.where(chain.place > 0, one, zero).prod(1)
        assert float((reached * (losses + terms["x_4"])).sum() / 4) == pytest.approx(2 * costs[i - 1], abs=1e-9)


# -- what the chain is ----------------------------------------------------------------------------------------------


def test_the_papers_schedule_is_a_straight_line():
    """κ_t = 1 − t has β_i = 1 / (T − i + 1), and each step of Bernoulli(x (1 − β) + β / 2) is the guide's."""
    chain, x = BinomialDenoiser(None, RectifiedSchedule(), 7), torch.tensor([[0.0], [1.0]])
    for i in range(1, 8):
        beta = 1 / (7 - i + 1)
        assert torch.allclose(chain.forward(x, i / 7).base_dist.probs, x * (1 - beta) + beta / 2)


def test_the_posterior_is_bayes():
    chain = BinomialDenoiser(None, CosineSchedule(), 10)
    s, t, x_s = 0.4, 0.5, torch.tensor([[0.0], [1.0]])
    for x_t, x in itertools.product([0.0, 1.0], repeat=2):
        joint = chain.forward(x_s, t, s).log_prob(torch.tensor([[x_t]])).exp()
        joint = joint * chain.forward(torch.tensor([[x]]), s, 0.0).log_prob(x_s).exp()
        zero, one = joint / joint.sum()
        found = chain.posterior(torch.tensor([[x_t]]), torch.tensor([[x]]), t, s)
        assert torch.allclose(torch.stack(found).flatten(), torch.stack([one, zero]), atol=1e-12)


@torch.no_grad()
def test_the_reverse_step_to_the_data_is_the_decoder():
    """At s = 0 the posterior is the bit itself, and the reverse step Bernoulli(b̂)."""
    program, _ = random_program(3, 4)
    chain, words = program.denoiser(), states(3)
    assert torch.allclose(chain.reverse(words, 1 / 4).log_prob(words), chain.decoder(words).log_prob(words), atol=1e-9)


@torch.no_grad()
def test_a_large_answer_stays_finite():
    """Of a network that is sure, and wrong, the loss is large but a number, in single precision too."""
    for dtype in (torch.float32, torch.float64):
        x = states(2).to(dtype)
        for size in (60.0, -60.0):
            chain = BinomialDenoiser(lambda x_t, t, size=size: 0 * x_t + size, CosineSchedule(), 1000)
            for step in (1.0, 2.0, 500.0, 1000.0):
                rows = torch.full((4,), step, dtype=dtype)
                assert torch.isfinite(DiffusionELBO().at_step(chain, x, x, rows, 0 * rows + 1)[0]).all()


@torch.no_grad()
def test_the_reverse_chain_is_markov():
    """q(x_{t−1} | x_t, x_{t+1}, ..., x_T) = q(x_{t−1} | x_t), by all 4,096 paths of the guide: D = 3, T = 3."""
    chances = torch.softmax(torch.randn(8) * 1.5, 0)
    joint = chances.reshape(8, 1, 1, 1) * chain_tables(random_program(3, 3, "linear")[0], 3, 3)[1].exp()
    for t in (1, 2):
        past = over(joint, *range(t - 1, 4))  # x_{t−1}, x_t, ..., x_T
        pair = over(past, 0, 1)
        given_next = pair / pair.sum(0)
        given_all = past / past.sum(0)
        assert float((given_all - given_next.reshape(8, 8, *[1] * (3 - t))).abs().max()) < 1e-12
        assert float((given_next - given_next.mean(1, keepdim=True)).abs().max()) > 0.05  # it does depend on x_t


def best(words, chances, schedule):
    """The network that is right of data that are these words with these chances: b̂ = q(x = 1 | x_t), by Bayes."""

    def log_odds(x, t, y=None):
        kept = schedule.alpha(t)[:, None, None] * (2 * words - 1) * x[:, None]  # [B, S, D]
        weights = torch.softmax(torch.log1p(kept).sum(-1) + chances.log(), 1)
        return (weights @ words).log() - (weights @ (1 - words)).log()

    return log_odds


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 4])
def test_with_the_best_network_independent_bits_are_modelled_exactly(steps):
    """p(x) = the data's chances and ELBO = −entropy, through the file's own program: no gap at any T, ≤1e-12."""
    words, one = states(3), torch.tensor([0.9, 0.3, 0.5])
    chances = (words * one + (1 - words) * (1 - one)).prod(1)
    program, network = random_program(3, steps)
    network.forward = best(words, chances, RectifiedSchedule())
    assert torch.allclose(exact_log_p(program.model, words, steps), chances.log(), atol=1e-12)
    bound = float((chances * elbo_of(*chain_tables(program, 3, steps))).sum())
    assert bound == pytest.approx(float((chances * chances.log()).sum()), abs=1e-12)


@torch.no_grad()
def test_the_best_network_gives_each_bit_its_true_chance():
    """At b̂ = q(x = 1 | x_t) the reverse step has the marginals of q(x_s | x_t), whatever the bits' dependence."""
    words, chances = states(3), torch.softmax(torch.randn(8) * 1.5, 0)
    program, network = random_program(3, 3)
    network.forward = best(words, chances, RectifiedSchedule())
    joint = over(chances.reshape(8, 1, 1, 1) * chain_tables(program, 3, 3)[1].exp(), 1, 2)
    truth = (joint / joint.sum(0)).T @ words
    assert torch.allclose(program.denoiser().reverse(words, 2 / 3).base_dist.mean, truth, atol=1e-12)


# -- the identities of the notes ------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_consistency_term_is_no_kl():
    """The notes' (44) and Theorem 8 are the ELBO; (45) is not, on all 4,096 paths of D = 2, T = 5.

    (45) writes E_q[log p(x_t | x_{t+1}) / q(x_t | x_{t−1})] as −E_{q(x_{t−1}, x_{t+1} | x)} KL(q(x_t | x_{t−1}) ‖
    p(x_t | x_{t+1})): it draws x_t anew where x_{t+1} came from another, as if the two were independent given x_{t−1}.
    Where the reverse steps are exact, as here, it lies below by what x_t and x_{t+1} tell of each other given x_{t−1}, the
    KLs between dependent and independent, both ways: −entropy = ELBO = −0.936 nats, (45) = −1.821.
    """
    bits, steps, words = 2, 5, states(2)
    one = torch.tensor([0.9, 0.3])
    chances = (words * one + (1 - words) * (1 - one)).prod(1)
    program, network = random_program(bits, steps, "cosine")
    network.forward = best(words, chances, CosineSchedule())
    log_p, log_q = chain_tables(program, bits, steps)
    elbo, path = elbo_of(log_p, log_q), log_q.exp()  # q(x_1, ..., x_T | x), [x, x_1, ..., x_T]
    prior, matrices = transitions(program.model, words, steps)
    p = dict(enumerate(reversed(matrices)))  # log p(x_t | x_{t+1}), [x_{t+1}, x_t]
    chain, times = program.denoiser(), range(1, steps + 1)
    q = {t: chain.forward(words, t / steps).log_prob(words[:, None]).T for t in times}  # [x_{t−1}, x_t]
    pairs = {1: torch.eye(4)[:, :, None] * over(path, 0, 1)[:, None]}  # q(x_{t−1}, x_t | x), [x, x_{t−1}, x_t]
    pairs |= {t: over(path, 0, t - 1, t) for t in times if t > 1}

    reconstruction = (over(path, 0, 1) * p[0].T).sum(1)
    matching = (pairs[steps] * (prior - q[steps])).sum((1, 2))  # in both
    ratios, kls, told = torch.zeros(4), torch.zeros(4), torch.zeros(4)
    for t in range(1, steps):
        triple = pairs[t][:, :, :, None] * q[t + 1].exp()  # q(x_{t−1}, x_t, x_{t+1} | x)
        ratio = p[t].T[None] - q[t][:, :, None]  # [x_{t−1}, x_t, x_{t+1}]
        ratios += (triple * ratio).sum((1, 2, 3))
        kl = -(q[t].exp()[:, :, None] * ratio).sum(1)  # [x_{t−1}, x_{t+1}]
        kls += (triple.sum(2) * kl).sum((1, 2))
        apart = triple.sum(2)[:, :, None] * q[t].exp()[:, :, None]  # as if x_t and x_{t+1} were independent
        known = q[t + 1] - (q[t].exp() @ q[t + 1].exp()).log()[:, None]  # log q(x_{t+1} | x_t) / q(x_{t+1} | x_{t−1})
        told += ((triple - apart) * known).sum((1, 2, 3))
    assert torch.allclose(reconstruction + matching + ratios, elbo, atol=1e-9)  # (44)
    false = reconstruction + matching - kls  # (45)
    assert (elbo - false > 0.5).all() and torch.allclose(elbo - false, told, atol=1e-9)

    last = over(path, 0, steps)
    theorem = reconstruction - (last * (last.log() - prior)).sum(1)
    for t in range(2, steps + 1):
        posterior = pairs[t] / pairs[t].sum(1, keepdim=True)  # q(x_{t−1} | x_t, x), [x, x_{t−1}, x_t]
        theorem -= (pairs[t] * (posterior.log() - p[t - 1].T)).sum((1, 2))
    assert torch.allclose(theorem, elbo, atol=1e-9)  # Theorem 8
    means = [float((chances * value).sum()) for value in (chances.log(), elbo, false)]
    assert means == pytest.approx([-0.936, -0.936, -1.821], abs=1e-3)


# -- the heartbeat --------------------------------------------------------------------------------------------------


def bits_of(values):
    """The mean in bits."""
    return float(values.detach().double().mean()) / math.log(2)


def row_of(words):
    """Where words lie among all states."""
    return (words.long() * 2 ** torch.arange(words.shape[1] - 1, -1, -1)).sum(1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("schedule", "steps", "bound", "exact"), [("rectified", 5, 3.520, 2.892), ("cosine", 5, 3.237, 2.544)]
)
def test_what_the_best_network_makes_of_heartbeats(schedule, steps, bound, exact):
    """A pulse every five bits, entropy log₂ 5 = 2.322: with b̂ = q(x = 1 | x_t) what is lost is the bits' independence.

    Bound and −log₂ p, in bits, by T, with the paper's α_t = 1 − t and with the cosine:

        T              5      10      20      50
        1 − t       3.520   2.865   2.574   2.417      −log₂ p:  2.892   2.504   2.376   2.332
        cosine      3.237   2.765   2.539   2.408                2.544   2.359   2.326   2.322
    """
    words = torch.tensor(HEARTBEATS)
    program, network = random_program(10, steps, schedule)
    chain = program.denoiser()
    network.forward = best(words, torch.full((5,), 0.2), chain.schedule)
    log_p = exact_log_p(program.model, states(10), steps)[row_of(words)]
    found = bits_of(counted_loss(chain, words)), bits_of(-log_p)
    assert found == pytest.approx((bound, exact), abs=1e-3)
    assert found[0] > found[1] > math.log2(5)


def test_training_reaches_the_floor_and_does_not_beat_it():
    """300 steps, T = 10: a bound of 2.98 bits (measured; the best network's is 2.865) and −log₂ p of 2.52 (2.322)."""
    torch.set_default_dtype(torch.float32)
    data, words = {"x": np.repeat(HEARTBEATS, 100, 0)}, torch.tensor(HEARTBEATS, dtype=torch.float32)
    program = probgen.load("binomial", data, steps=10, hidden=32, layers=2)
    recipe = {"steps": 300, "lr": 1e-2, "batch_size": 500, "ema": 0.97}
    run = probgen.fit(program, data, compile=False, progress=False, **recipe)
    with torch.no_grad():
        log_p = exact_log_p(run.model, states(10), 10)
        chain = BinomialDenoiser(run.modules["network"], RectifiedSchedule(), 10)
        bound, exact = bits_of(counted_loss(chain, words)), bits_of(-log_p[row_of(words)])
    assert 2.864 < bound < 2.865 + 0.25
    assert math.log2(5) < exact < math.log2(5) + 0.3


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(message, make):
    with pytest.raises(ProbgenError, match=message) as error:
        make()
    assert str(error.value).count(". ") == 0


def test_bad_input_is_refused_in_one_sentence():
    words = {"x": states(3).numpy()}
    refused("steps=0 has no latents", lambda: BinomialDenoiser(None, steps=0))
    refused("does not end in noise: 100%", lambda: BinomialDenoiser(None, GeometricSchedule()))
    learned = LearnedSchedule(torch.tensor([-8.0, 8.0]), torch.zeros(4))
    refused("cannot be learned with bits", lambda: BinomialDenoiser(None, learned))
    chain = BinomialDenoiser(lambda x, t: x[:, :2])
    refused("the network gives \\(8, 2\\)", lambda: chain(states(3), 0.5))
    refused("time has the shape \\(2,\\)", lambda: chain(states(3), torch.ones(2)))
    for weighting in ("simple", "snr", "min-snr"):
        program = probgen.load("binomial", words, steps=2)
        refused(
            "which a BinomialDenoiser has none of",
            lambda p=program, w=weighting: probgen.fit(p, words, by=DiffusionELBO(w), steps=1, progress=False),
        )


@pytest.mark.parametrize("values", [[0.0, 0.3], [0.0, 5.0], [-1.0, 1.0]])
def test_data_that_are_no_bits_are_refused(values):
    data = {"x": np.random.default_rng(0).choice(np.array(values, np.float32), (64, 4))}
    program = dataclasses.replace(probgen.load("binomial", data, steps=2), prepare={})
    refused("outside the support .* \\(Binarize", lambda: probgen.fit(program, data, steps=1, progress=False))


def test_a_sampler_of_gaussian_noise_is_refused():
    data = probgen.load_data("digits")
    run = probgen.fit(probgen.load("binomial", data, steps=3, hidden=8), data, steps=1, progress=False)
    with pytest.raises(
        ProbgenError, match="DDIM takes steps through Gaussian noise, and this program has a BinomialDenoiser"
    ):
        run.sample(2, sampler=DDIM(5))
