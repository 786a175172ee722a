"""The benchmarks compare like with like: the steps written by hand take the same steps, and ratios are what they say.

Nothing here is timed.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.pairs import Ratio, ratio, rounds
from benchmarks.problems import LR, PROBLEMS, setting

TINY = {
    "dense": replace(PROBLEMS["small"], rows=256),
    "conv": replace(PROBLEMS["conv"], side=8, hidden=16, z_dim=4, batch=16, rows=64),
}


def test_a_ratio_is_the_median_of_pairs_and_its_interval_covers_it():
    # 400 tables of 40 pairs with a true median of 1.3: a 95 % interval misses it in 20 of them, a bootstrapped median
    # somewhat more often; 45 or more at a true 7 % has a probability below 1e-3.
    rng, misses = np.random.default_rng(0), 0
    for seed in range(400):
        machine = rng.lognormal(0, 1, 40)  # what slows the machine slows both
        found = ratio(1.3 * machine * rng.lognormal(0, 0.1, 40), machine, resamples=500, seed=seed)
        misses += not found.low <= 1.3 <= found.high
        assert found.low <= found.median <= found.high and found.pairs == 40
    assert misses < 45


def test_an_interval_that_holds_one_is_equal_and_meets_every_upper_bound():
    from benchmarks.__main__ import verdict

    same, slower = Ratio(1.07, 0.99, 1.12, 20), Ratio(1.07, 1.06, 1.12, 20)
    assert same.equal and str(same).startswith("equal") and verdict(same, "≤ 1.05") == "met"
    assert not slower.equal and verdict(slower, "≤ 1.05") == "missed"
    assert verdict(Ratio(6.5, 6.1, 6.9, 20), "≥ 6") == "met" and verdict(Ratio(5.9, 5.5, 6.4, 20), "≥ 6") == "missed"
    with pytest.raises(ValueError, match="equally long"):
        ratio(np.ones(3), np.ones(4))


def test_contenders_take_turns_in_an_order_that_rotates():
    ran, clock = [], iter(range(1000))
    runs = {name: (lambda steps, name=name: ran.append(name), 2) for name in "abc"}
    times = rounds(runs, 3, clock=lambda: next(clock))
    assert "".join(ran) == "aabbcc" + "abcbcacab"
    assert all(np.array_equal(values, [0.5, 0.5, 0.5]) for values in times.values())


@pytest.mark.parametrize("network", TINY)
def test_the_pyro_step_by_hand_is_the_engines_step(network):
    torch = pytest.importorskip("torch")
    from benchmarks.opponents_pyro import gradients
    from benchmarks.pyro_steps import parameters
    from probgen.pyro import ELBO, Engine

    problem = TINY[network]
    made = setting(problem, "pyro", compile=False)
    for closed, loss in ((True, ELBO()), (False, ELBO(kl="sampled"))):
        engine = Engine(made.program, loss, made.feed, made.options)
        state, hand = engine.start(), parameters(problem)
        start = dict(zip(hand.names, hand.views(hand.vector), strict=True))
        own = {name.replace("$$$", "."): name for name in engine.step.trainees["program"].names}
        assert set(own) == set(hand.names)
        named = {own[name]: value for name, value in start.items()}
        state["params/program"] = torch.cat([named[n].reshape(-1) for n in engine.step.trainees["program"].names])
        x = engine._tensors(made.feed.batch(0))
        with engine._scope(), torch.no_grad():
            torch.manual_seed(5)
            value, _, grad, _ = engine.step.gradient(state, "program", torch.tensor(0.0), x)
            grads = engine.step.views(engine.step.trainees["program"].names, grad)
            torch.manual_seed(5)
            by_hand, loss_by_hand = gradients(hand, hand.vector, x["x"], closed)
        assert torch.allclose(value, loss_by_hand, rtol=1e-5)
        for name, gradient in zip(hand.names, hand.views(by_hand), strict=True):
            assert torch.allclose(grads[own[name]], gradient, rtol=1e-3, atol=1e-5), name


def test_the_pyro_opponents_take_adams_steps(monkeypatch):
    torch = pytest.importorskip("torch")
    from benchmarks import opponents_pyro
    from benchmarks.pyro_steps import parameters

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    start, x = parameters(TINY["dense"]), torch.bernoulli(torch.full((16, 8, 8), 0.5))
    fed = opponents_pyro.whole(start, LR, closed=True)
    steps = (
        opponents_pyro.whole(start, LR, closed=True),
        lambda x: fed(torch.cat([x, 1 - x]), torch.arange(16)),  # the same batch, gathered
        opponents_pyro.loss_only(start, LR, closed=True),
    )
    losses = []
    for step in steps:
        torch.manual_seed(1)
        losses.append([step(x).item() for _ in range(20)])
    assert losses[0][-1] < losses[0][0] - 0.5
    np.testing.assert_array_equal(losses[0], losses[1])
    np.testing.assert_allclose(losses[0], losses[2], rtol=1e-4)


def test_the_numpyro_scan_by_hand_takes_the_engines_steps():
    jax = pytest.importorskip("jax")
    import jax.numpy as jnp
    from numpyro import handlers

    from benchmarks.numpyro_steps import networks
    from benchmarks.opponents_numpyro import negative_elbo, scan
    from probgen.numpyro import Engine

    problem = TINY["dense"]
    made = setting(problem, "numpyro")
    engine = Engine(made.program, None, made.feed, made.options)
    state, x = engine.start(), jnp.asarray(made.feed.batch(0)["x"], jnp.float32)
    guide = handlers.seed(engine.program.guide, jax.random.split(engine._key(1, 0))[1])
    values = engine.leaves.constrained(state["params"])
    own = handlers.trace(handlers.substitute(guide, data=values)).get_trace(x=x)["z"]["kwargs"]["rng_key"]
    loss, grads = jax.value_and_grad(negative_elbo)(state["params"], own, x, networks(problem), True)
    share, player = engine.players["program"], engine.by.players(engine.program)["program"]
    with engine._scope():
        value, _, _, theirs = engine._value_and_grad(share, player, state["params"], {}, engine._key(1, 0), {"x": x})
    np.testing.assert_allclose(loss, value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)

    carried, chunk = scan(networks(problem), state["params"], LR)
    _, by_hand = chunk(carried, jax.random.key(0), jnp.asarray(made.feed.resident()["x"], jnp.float32),
                       jnp.asarray(made.feed.indices(0, 200), jnp.int32))  # fmt: skip
    _, metrics = engine.advance(state, 0, 200)
    # Other noise, the same course: the mean of the last 50 losses differs by less than 4 SE ≈ 0.2 nats.
    assert abs(float(by_hand[-50:].mean()) - metrics["loss"][-50:].mean()) < 0.2
    assert metrics["loss"][-50:].mean() < metrics["loss"][0] - 5


def test_the_ddpm_by_hand_takes_the_engines_steps():
    """The same loss at the same steps and noise, and from the same weights the same course."""
    jax = pytest.importorskip("jax")
    import jax.numpy as jnp

    from benchmarks.diffusion_steps import STEPS, engine
    from benchmarks.opponents_diffusion import scan, simple_loss, tabled
    from probgen.diffusion import CosineSchedule
    from probgen.numpyro import Denoiser, DiffusionELBO
    from probgen.numpyro.nn import DenoisingMLP

    ours, net = engine("ddpm_numpyro", hidden=16), DenoisingMLP((2,), 16, 3)
    weights, data = ours.start()["params"]["network$params"], jnp.asarray(ours.feed.resident()["x"], jnp.float32)
    moved = jax.tree.map(lambda w: w + 0.1, weights)
    t, noise, x = jnp.arange(20) % STEPS + 1, jax.random.normal(jax.random.key(1), (20, 2)), data[:20]
    chain = Denoiser(lambda x, t: net.apply({"params": moved}, x, t), CosineSchedule(), steps=STEPS)
    rows, _ = DiffusionELBO("simple").of_step(chain, x, x, noise, t, jnp.full(20, STEPS))
    np.testing.assert_allclose(simple_loss(moved, net, tabled(STEPS), t, noise, x), rows.mean(), rtol=1e-5)
    state, chunk = scan(net, weights, LR, STEPS)
    _, by_hand = chunk(state, jax.random.key(0), data, jnp.asarray(ours.feed.indices(0, 400), jnp.int32))
    _, metrics = ours.advance(ours.start(), 0, 400)
    # Other noise, the same course: 4 SE of the difference of the means of 100 losses are 0.03.
    assert abs(float(by_hand[-100:].mean()) - metrics["loss"][-100:].mean()) < 0.03
    assert by_hand[-100:].mean() < 0.7 * by_hand[0]


def flows_of_peers(family):
    pytest.importorskip("zuko")
    from benchmarks.flow_steps import builders

    return {peer: build() for peer, build in builders(family).items()}


@pytest.mark.parametrize("family", ["realnvp", "maf", "nsf", "nsf-coupling"])
def test_the_peers_have_the_parameters_of_the_zoos_flows(family):
    pytest.importorskip("torch")
    from benchmarks.flow_steps import engine

    ours = sum(p.numel() for p in engine(family, compile=False, rows=256).leaves.params.values())
    for peer, model in flows_of_peers(family).items():
        assert sum(p.numel() for p in model.parameters()) == ours, peer


@pytest.mark.parametrize("family", ["maf", "nsf"])
def test_zukos_step_by_hand_has_the_engines_loss_and_gradient(family):
    torch = pytest.importorskip("torch")
    from torch.func import functional_call, grad_and_value

    from benchmarks.flow_steps import engine
    from benchmarks.opponents_flows import flat

    ours, model = engine(family, compile=False, rows=256, batch=32), flows_of_peers(family)["Zuko"]
    state, names = ours.start(), ours.step.trainees["program"].names
    vector, views = flat(model)
    values = {name.replace("flow.", "flow$$$", 1): value for name, value in views(vector).items()}
    state["params/program"] = torch.cat([values[name].reshape(-1) for name in names])
    x = ours._tensors(ours.feed.batch(0))
    with ours._scope(), torch.no_grad():
        loss, _, gradient, _ = ours.step.gradient(state, "program", torch.tensor(0.0), x)
        grads, by_hand = grad_and_value(lambda v: functional_call(model, v, (x["x"],)))(views(vector))
    assert torch.allclose(loss, by_hand, rtol=1e-5)
    for name, own in ours.step.views(names, gradient).items():
        assert torch.allclose(own, grads[name.replace("$$$", ".")], rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("family", ["realnvp", "nsf-coupling"])
def test_zukos_density_layer_by_layer_is_its_own(family):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model, x = flows_of_peers(family)["Zuko"], torch.randn(8, 16)
    torch.testing.assert_close(model.log_prob(x), model.flow().log_prob(x))


def test_all_forms_of_a_peers_step_take_adams_steps(monkeypatch):
    torch = pytest.importorskip("torch")
    from benchmarks.opponents_flows import FORMS

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    torch.manual_seed(0)
    data, rows = 2 + torch.randn(64, 16), torch.randint(64, (8, 32))  # few steps: rounding grows with them
    models = {form: flows_of_peers("realnvp") for form in FORMS}
    for peer in models["eager"]:
        losses = {}
        for form, make in FORMS.items():
            step = make(models[form][peer], 1e-2)
            losses[form] = [step(data, row).item() for row in rows]
        assert losses["whole"][-1] < losses["whole"][0] - 5, peer
        for form in FORMS:
            np.testing.assert_allclose(losses[form], losses["whole"], rtol=1e-3, err_msg=f"{peer}, {form}")


def diffusions(predicts, case):
    pytest.importorskip("torch")
    from benchmarks import diffusion_pyro_steps as steps

    tiny = replace(steps.CASES[case], hidden=8, batch=8, **({"shape": (8, 8)} if case == "unet" else {}))
    return steps.engine(predicts, tiny, compile=False, rows=64), steps.builders(predicts, tiny)[0], tiny


@pytest.mark.parametrize("predicts", ["noise", "velocity"])
@pytest.mark.parametrize("case", ["unet", "dense"])
def test_diffusions_of_other_packages_take_adams_steps_on_the_zoos_network(case, predicts, monkeypatch):
    """In every form, with as many parameters; what a peer's loss is at the first step, where the network says 0, is known."""
    torch = pytest.importorskip("torch")
    from benchmarks.opponents_flows import FORMS

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    ours, peers, _ = diffusions(predicts, case)
    count = sum(p.numel() for p in ours.leaves.params.values())
    data, rows = torch.as_tensor(ours.feed.resident()["x"], dtype=torch.float32), torch.randint(64, (8, 64))
    floor = float(data.square().mean()) if predicts == "velocity" else 0.0  # E (z − x)², and E ε²
    for peer, build in peers.items():
        assert sum(p.numel() for p in build().parameters()) == count, peer
        losses = {}
        for form, make in FORMS.items():
            step = make(build(), 1e-2)
            torch.manual_seed(1)
            losses[form] = [step(data, row).item() for row in rows]
            np.testing.assert_allclose(losses[form], losses["whole"], rtol=1e-2, err_msg=f"{peer}, {form}")
        assert abs(losses["whole"][0] - 1 - floor) < 0.6 and losses["whole"][-1] < losses["whole"][0], peer


@pytest.mark.parametrize("case", ["unet", "dense"])
def test_diffusions_of_other_packages_draw_what_ddim_draws(case):
    """From the same start and network; their grids of times are others, so to a few hundredths."""
    torch = pytest.importorskip("torch")
    from probgen.diffusion import DDIM, CosineSchedule
    from probgen.pyro import Denoiser
    from probgen.pyro.samplers import sampled

    _, peers, tiny = diffusions("noise", case)

    schedule = CosineSchedule()

    def network(x, t):  # of data N(0, ¼)
        alpha, sigma = (v.reshape(-1, *[1] * len(tiny.shape)) for v in (schedule.alpha(t), schedule.sigma(t)))
        return sigma * x / (0.25 * alpha**2 + sigma**2)

    chain = Denoiser(network, schedule, steps=1000)
    for peer, build in peers.items():
        model = build()
        torch.manual_seed(0)
        start = torch.randn(6, *tiny.shape)
        torch.manual_seed(0)
        with torch.no_grad():
            found = model.draw(network, 6)
        expected = sampled(chain, DDIM(50), start)
        assert found.shape == expected.shape, peer
        if peer == "denoising-diffusion-pytorch":
            expected = expected.clamp(-1, 1)
        assert float((found - expected).abs().mean()) < 0.05, peer
        assert float(expected.std()) > 0.3


# By how much the generator's losses may differ: the last bias of a Wasserstein critic has the slope zero up to rounding, of
# which Adam makes any part of a step.
BIAS = {"non-saturating": 1e-4, "wgan-gp": 5e-2}


def adversaries(objective, case):
    pytest.importorskip("torch")
    from benchmarks import adversarial_steps as steps

    tiny = replace(steps.CASES[case], hidden=8, batch=16, **({"shape": (8, 8, 3)} if case == "images" else {}))
    return steps.engine(objective, tiny, compile=False, rows=64), steps.builders(objective, tiny)[0]


@pytest.mark.parametrize("objective", ["non-saturating", "wgan-gp"])
@pytest.mark.parametrize("case", ["dense", "images"])
def test_the_gan_step_by_hand_takes_the_engines_steps(case, objective, monkeypatch):
    """From the same weights, on the same batches and draws: the losses of both players, step after step."""
    torch = pytest.importorskip("torch")
    from benchmarks import opponents_adversarial

    monkeypatch.setattr(opponents_adversarial, "in_one_graph", lambda function: function)
    ours, peers = adversaries(objective, case)
    data = torch.as_tensor(ours.feed.resident()["x"], dtype=torch.float32)
    rows = torch.from_numpy(ours.feed.indices(0, 10)).unflatten(0, (5, 2))  # the generator's batch is only counted
    hands = {name: build() for name, build in peers.items() if name.startswith("by hand")}
    assert len(hands) == (1 if case == "images" and objective == "non-saturating" else 2)  # BatchNorm mixes rows
    for name, model in hands.items():
        state, expected = ours.start(), []
        assert {n.replace("$$$", ".") for n in ours.leaves.params} == {n for n, _ in model.named_parameters()}
        for own, value in ours.step.values(state).items():
            if own in ours.leaves.params:
                model.get_parameter(own.replace("$$$", ".")).data = value.clone()
        step, found, rates = opponents_adversarial.whole(model, 1e-2), [], torch.full((2,), 1e-2)
        with ours._scope(), torch.no_grad():
            for i, (of_critic, of_generator) in enumerate(rows):
                torch.manual_seed(i)
                batches = [{"x": data[of_critic]}, {"x": data[of_generator]}]
                state, metrics = ours.step(state, torch.tensor(float(i)), rates, batches)
                expected.append([metrics["loss/critic"].item(), metrics["loss/program"].item()])
                torch.manual_seed(i)
                found.append(step(data, of_critic).tolist())
        constant = np.log(2) if objective == "non-saturating" else 0.0  # the program's loss at real rows, where d = 0
        (tells, fools), (told, fooled) = np.transpose(found), np.transpose(expected)
        np.testing.assert_allclose(tells, told, rtol=1e-3, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(fools, fooled - constant, rtol=1e-3, atol=BIAS[objective], err_msg=name)
        assert np.ptp(tells) > 1e-2 and np.ptp(fools) > 1e-2


@pytest.mark.parametrize("objective", ["non-saturating", "wgan-gp"])
@pytest.mark.parametrize("case", ["dense", "images"])
def test_all_forms_of_a_gan_step_are_the_packages_own(case, objective, monkeypatch):
    """With as many parameters: losses agree over steps of the package's training step and of its losses in the other forms."""
    torch = pytest.importorskip("torch")
    from benchmarks import opponents_adversarial

    monkeypatch.setattr(opponents_adversarial, "in_one_graph", lambda function: function)
    ours, peers = adversaries(objective, case)
    count = sum(p.numel() for p in ours.leaves.params.values())
    data, rows = torch.as_tensor(ours.feed.resident()["x"], dtype=torch.float32), torch.randint(64, (5, 16))
    for peer, build in peers.items():
        assert sum(p.numel() for p in build().parameters()) == count, peer
        losses, place = {}, -1 if peer == "torch-mimicry" else 0  # whose critic's loss is told without its penalty
        atol = 1e-4 if place == 0 else BIAS[objective]
        for form, make in opponents_adversarial.FORMS.items():
            step = make(build(), 1e-2)
            torch.manual_seed(1)
            losses[form] = [step(data, row)[place].item() for row in rows]
            np.testing.assert_allclose(losses[form], losses["whole"], rtol=1e-3, atol=atol, err_msg=f"{peer}, {form}")


@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_the_loops_by_hand_draw_the_same_images(backend, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip(backend)
    from benchmarks import pixels

    monkeypatch.setattr(pixels, "SPREAD", 1e5)  # every pixel is certain, given those before it
    run = pixels.trained(backend, side=6)
    image = run.sample(2)["x"].reshape(2, -1)
    assert 0 < image.mean() < 1
    for loop in (pixels.plain, pixels.masked_once, pixels.careful):
        np.testing.assert_array_equal(loop(*pixels.parts(run.params), 2).numpy(), image, err_msg=loop.__name__)
