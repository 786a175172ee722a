"""A fit keeps to itself, means what its options say, and refuses in one sentence what it cannot do right."""

import functools
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs_pyro import CASES, BayesianRegression, Decoder, Encoder, bits, network, normal_mean, reals, vae
from pyro.infer import autoguide
from pyro.nn import PyroModule, PyroParam

import probgen
from probgen import Program
from probgen.errors import ProbgenError
from probgen.pyro import ELBO
from probgen.schedules import Linear, Steps

QUIET = dict(compile=False, progress=False)


def fit(case, steps=5, **options):
    options = {"batch_size": case.batch_size, **QUIET, **options}
    return probgen.fit(case.program, case.arrays, steps=steps, **options)


def same(a, b):
    return set(a) == set(b) and all(np.array_equal(a[n], b[n]) for n in a)


def snapshot(program):
    """All that a fit must leave alone."""
    modules = {
        id(cell.cell_contents): cell.cell_contents
        for fn in (program.model, program.guide)
        for cell in getattr(fn, "__closure__", None) or ()
        if isinstance(cell.cell_contents, torch.nn.Module)
    }
    weights = [t.clone() for m in modules.values() for t in (*m.parameters(), *m.buffers())]
    modes = [part.training for m in modules.values() for part in m.modules()]
    places = [id(t) for m in modules.values() for t in (*m.parameters(), *m.buffers())]
    store = pyro.get_param_store()
    return (
        [w.detach().numpy().tobytes() for w in weights], modes, places, dict(store._params), dict(store._constraints),
        torch.get_default_dtype(), torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes(),
        random.getstate(), len(pyro.poutine.runtime._PYRO_STACK), torch.is_grad_enabled(),
        torch.distributions.Distribution._validate_args, torch.nn.Module.named_parameters,
        pyro.poutine.subsample_messenger.SubsampleMessenger._subsample, torch.distributions.Distribution._validate_sample,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["vae_batchnorm", "global_params", "state_space", "hmm", "self_subsampling"])
@pytest.mark.parametrize("precision", ["32", "64"])
def test_everything_else_is_left_as_it_was(name, precision):
    case = CASES[name]()
    pyro.clear_param_store()
    pyro.param("loc", torch.tensor(123.0))  # a name that the program uses too
    before = snapshot(case.program)
    run = fit(case, precision=precision)
    assert snapshot(case.program) == before
    run.sample(3), run.evaluate(case.arrays, k=5)
    assert snapshot(case.program) == before
    if run.structure.latents:
        run.posterior(case.arrays, draws=2)
    with pytest.raises(ProbgenError):
        run.sample(3, given={"nothing": 1})
    assert snapshot(case.program) == before
    pyro.clear_param_store()


def test_two_fits_share_nothing():
    """Parameters of one name, random numbers, weights: a fit ends where it ends alone, whatever runs between chunks."""
    alone = fit(CASES["plate_states_rows"](), steps=30).params
    other = []

    def between(run, metrics):
        other.append(fit(CASES["regression_auto_normal"](), steps=2, seed=7).params)
        torch.manual_seed(3), np.random.seed(3), pyro.param("loc", torch.tensor(9.0))

    state = torch.get_rng_state()
    together = probgen.fit(
        CASES["plate_states_rows"]().program, CASES["plate_states_rows"]().arrays, steps=30, batch_size=8,
        on_chunk=between, **QUIET,
    )  # fmt: skip
    torch.set_rng_state(state)
    pyro.clear_param_store()
    assert same(alone, together.params) and other


@pytest.mark.parametrize("name", ["vae_batchnorm", "regression_auto_multivariate_normal", "vae_dropout"])
def test_fitting_twice_is_fitting_once(name):
    case = CASES[name]()
    first, second = fit(case, steps=20), fit(case, steps=20)
    assert same(first.params, second.params) and first.metrics["loss"] == second.metrics["loss"]
    assert same(first.params, fit(CASES[name](), steps=20).params)
    assert not same(first.params, fit(case, steps=20, seed=1).params)


def test_the_same_steps_in_any_pieces():
    """Random numbers are of (seed, step): chunks of another length change nothing."""
    from test_pyro_graph import engine

    fitted = engine(CASES["vae_dropout"]())
    whole, _ = fitted.advance(fitted.start(), 0, 12)
    state = fitted.start()
    for first, last in ((0, 1), (1, 6), (6, 12)):
        torch.manual_seed(first)
        state, _ = fitted.advance(fitted.restore(fitted.export(state)), first, last)
    assert all(torch.equal(whole[name], state[name]) for name in whole)


def test_precisions():
    case = CASES["vae_modules"]()
    runs = {p: fit(case, steps=40, precision=p, lr=1e-2) for p in ("32", "64", "bf16-mixed")}
    loss = {p: run.metrics["loss"][-1] for p, run in runs.items()}
    assert loss["32"] == pytest.approx(loss["bf16-mixed"], rel=0.02) and loss["32"] != loss["bf16-mixed"]
    dtypes = {p: next(iter(run.params.values())).dtype for p, run in runs.items()}
    assert dtypes == {"32": np.float32, "64": np.float64, "bf16-mixed": np.float32}
    for wrong in ("16", "double"):
        with pytest.raises(ProbgenError, match="precision"):
            fit(case, precision=wrong)


def test_double_precision_modules_of_the_users():
    """Modules that are float64 already, with precision="64"."""
    program = vae(network(6, 5, 4).double(), network(2, 5, 6).double())
    run = probgen.fit(program, bits(), steps=3, precision="64", **QUIET)
    assert next(iter(run.params.values())).dtype == np.float64
    assert np.isfinite(run.evaluate(bits(), k=5)["elbo"])


def test_devices():
    case = CASES["vae_modules"]()
    assert fit(case, device="cpu").config["device"] == "cpu"
    with pytest.raises(ProbgenError, match="device must be"):
        fit(case, device="tpux")
    if not torch.cuda.is_available():
        with pytest.raises(ProbgenError, match="'cuda:0' is not on this machine"):
            fit(case, device="cuda:0")


def gradient_case():
    """One parameter, loss −θ · mean(x) per datum: every update is known."""

    def model(x):
        theta = pyro.param("theta", torch.tensor(0.0, dtype=torch.get_default_dtype()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
            pyro.factor("pull", theta.expand(len(x)))

    return Program(model, by=ELBO()), {"x": np.linspace(-1, 1, 10)}


def test_rates_schedules_clipping_and_averages():
    program, arrays = gradient_case()  # the gradient of the loss is −1
    go = functools.partial(probgen.fit, program, arrays, precision="64", optimizer="sgd", lr=0.1, **QUIET)
    assert go(steps=10).params["theta"] == pytest.approx(1.0)
    assert go(steps=10, clip=0.25).params["theta"] == pytest.approx(0.25)
    assert go(steps=10, schedule=Linear(1.0, 0.0, 10)).params["theta"] == pytest.approx(
        0.1 * sum(1 - t / 10 for t in range(10))
    )
    assert go(steps=10, schedule=Steps(1.0, 0.1, (5,))).params["theta"] == pytest.approx(0.55)
    run, average = go(steps=10, ema=0.9), 0.0
    for t in range(10):
        average = 0.9 * average + 0.1 * (0.1 * (t + 1))
    assert run.params["theta"] == pytest.approx(average)
    assert run.metrics["grad_norm"] == pytest.approx([1.0] * len(run.metrics["grad_norm"]))
    assert run.metrics["lr"] == [0.1] * len(run.metrics["lr"])


@pytest.mark.parametrize("choice", ["adam", "adamw", "sgd", "adagrad", "rmsprop", "clippedadam"])
def test_optimizers_are_torchs_own(choice):
    constructors = {c.__name__.lower(): c for c in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD,
                                                     torch.optim.Adagrad, torch.optim.RMSprop)}  # fmt: skip
    constructors["clippedadam"] = pyro.optim.clipped_adam.ClippedAdam
    theta = torch.tensor([0.7, -1.3], dtype=torch.float64, requires_grad=True)
    theirs = constructors[choice]([theta], lr=0.05)

    def model(x):
        p = pyro.param("p", torch.tensor([0.7, -1.3]).to(torch.get_default_dtype()))
        with pyro.plate("data", len(x)):
            pyro.factor("f", -(p.pow(4).sum() + (p[0] * p[1] + 1).square()).expand(len(x)))

    run = probgen.fit(
        Program(model, by=ELBO()), {"x": np.zeros(3)}, steps=20, lr=0.05, optimizer=choice, precision="64", **QUIET
    )
    with torch.no_grad():
        theta.copy_(torch.tensor([0.7, -1.3]).double())
    for _ in range(20):
        theirs.zero_grad()
        (theta.pow(4).sum() + (theta[0] * theta[1] + 1).square()).backward()
        theirs.step()
    assert run.params["p"] == pytest.approx(theta.detach().numpy(), rel=1e-6)


def test_the_validation_loss_is_that_of_the_end():
    """During warm-up the KL counts in full on validation rows: early stopping compares like with like."""
    from test_pyro_graph import engine

    case = CASES["vae_modules"]()
    warm, full = engine(case, ELBO(beta=Linear(0.0, 1.0, 20))), engine(case, ELBO())
    rows = [{"x": np.asarray(case.arrays["x"], dtype=np.float64)}]
    assert warm.loss_on(warm.start(), rows, 0) == pytest.approx(full.loss_on(full.start(), rows, 0), rel=1e-12)


# -- refusals: one sentence each -------------------------------------------------------------------------------------


def refused(program, arrays, match, **options):
    with pytest.raises(ProbgenError, match=match) as caught:
        probgen.fit(program, arrays, **{"steps": 2, **QUIET, **options})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_latent_without_guide_or_enumeration():
    refused(Program(vae(network(6, 4), network(2, 6)).model, by=ELBO()), bits(), "latent 'z' has neither a guide nor")
    refused(Program(CASES["discrete_guide"]().program.model, by=ELBO()), bits(), "latent 'b'")


@pytest.mark.parametrize("row", [0, 23])
@pytest.mark.parametrize("form", ["as it is", "reshaped", "computed", "in slices"])
def test_a_value_outside_the_support(row, form):
    def model(x):
        logits = pyro.param("logits", torch.zeros(6))
        with pyro.plate("data", len(x)):
            if form == "in slices":
                for t in range(3):
                    pyro.sample(f"x_{t}", dist.Bernoulli(logits=logits[:2]).to_event(1), obs=x[:, 2 * t : 2 * t + 2])
                return
            value = {"as it is": x, "reshaped": x.reshape(-1, 2, 3), "computed": x * 1.0}[form]
            fn = dist.Bernoulli(logits=logits.reshape(value.shape[1:]))
            pyro.sample("x", fn.to_event(value.dim() - 1), obs=value)

    x = bits()["x"].astype(np.float32)
    x[row, 3] = 1.5
    refused(Program(model, by=ELBO()), {"x": x}, r"holds 1\.5, outside the support", batch_size=8)


def test_a_masked_value_may_be_anything():
    def model(x, seen):
        p = pyro.param("p", torch.tensor(0.5))
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=seen.bool()):
            pyro.sample("x", dist.Bernoulli(p), obs=x)

    arrays = {"x": np.array([0.0, 1, 7, 1]), "seen": np.array([1, 1, 0, 1])}
    probgen.fit(Program(model, by=ELBO()), arrays, steps=2, **QUIET)
    refused(Program(model, by=ELBO()), {**arrays, "seen": np.ones(4, int)}, "holds 7")


def test_an_autoguide_over_a_local_latent_under_minibatches():
    case = CASES["local_autoguide"]()
    refused(case.program, case.arrays, "AutoNormal keeps one value per row for the local latent 'z'", batch_size=8)
    run = probgen.fit(case.program, case.arrays, steps=2, batch_size=None, **QUIET)
    with pytest.raises(ProbgenError, match="keeps one value of 'z' for each training row"):
        run.evaluate({"x": case.arrays["x"][:5]}, k=3)
    joint = Program(case.program.model, autoguide.AutoMultivariateNormal(case.program.model), by=ELBO())
    run = probgen.fit(joint, case.arrays, steps=2, batch_size=None, **QUIET)
    numbers = run.evaluate(case.arrays, k=3)  # `loc` is global: its guide is shared by all rows as it is
    assert np.isfinite(numbers["elbo"])


def test_an_array_read_as_input_to_its_own_site():
    def shifted(x):
        w = pyro.param("w", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            before = torch.cat([torch.zeros(len(x), 1), x[:, :-1]], -1)
            pyro.sample("x", dist.Normal(w * before, 1.0).to_event(1), obs=x)

    def slices(x):
        w = pyro.param("w", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            for t in range(3):
                pyro.sample(f"x_{t}", dist.Normal(w * x[:, t - 1] if t else torch.zeros(len(x)), 1.0), obs=x[:, t])

    def copies(x):
        w = pyro.param("w", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x.sum(-1, keepdim=True), 1.0).expand([len(x), 3]).to_event(1), obs=x + 0)

    for model in (shifted, slices, copies):
        refused(Program(model, by=ELBO()), reals(), "'x' is read as input to its own site", batch_size=8)


def test_subsampling_and_scaling_under_minibatches():
    case = CASES["self_subsampling"]()
    refused(case.program, case.arrays, "subsamples 5 of the 8 rows .* batch_size=None", batch_size=8)

    def no_plate(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(theta, 1.0).expand([len(x)]).to_event(1), obs=x)

    program = Program(no_plate, normal_mean(None).guide, by=ELBO())
    refused(program, {"x": reals()["x"][:, 0]}, "global latents and no plate", batch_size=8)
    probgen.fit(program, {"x": reals()["x"][:, 0]}, steps=2, batch_size=None, **QUIET)


def test_a_missing_array():
    refused(BayesianRegressionProgram(), reals(), "needs the array 'y', and the data has 'x'")


def BayesianRegressionProgram():
    module = BayesianRegression()

    def model(x, y):
        return module(x, y)

    return Program(model, autoguide.AutoNormal(model), by=ELBO())


def test_two_modules_with_one_name():
    """Pyro's store would give the guide the model's weights."""
    decoder, encoder = Decoder(name=""), Encoder(name="")
    decoder.linear, encoder.linear = PyroModule[torch.nn.Linear](2, 2), PyroModule[torch.nn.Linear](2, 2)
    encoder.scale = PyroParam(torch.ones(2))
    program = Program(decoder, encoder, by=ELBO())
    refused(program, {"x": reals()["x"][:, :2]}, "two modules both name a parameter 'linear.weight'")


def test_losses_that_cannot_take_the_program():
    case = CASES["discrete_guide"]()
    from probgen.pyro import IWAE

    refused(case.program, case.arrays, "IWAE needs reparametrised draws, but the guide's 'b'", by=IWAE(3))
    for by, match in ((IWAE, "num_particles must be"), (ELBO, "num_particles must be")):
        with pytest.raises(ProbgenError, match=match):
            by(0)
    with pytest.raises(ProbgenError, match="alpha = 1 is the ELBO"):
        IWAE(3, alpha=1.0)
    with pytest.raises(ProbgenError, match="kl must be"):
        ELBO(kl="closed")


def test_options_of_optimizers():
    case = CASES["vae_modules"]()
    refused(case.program, case.arrays, "no optimizer 'adamm'; did you mean 'adam'", optimizer="adamm")
    wrong = functools.partial(torch.optim.Adam, amsgrad=True)
    refused(case.program, case.arrays, "adam takes no option 'amsgrad'", optimizer=wrong)


def test_a_nan_names_site_parameter_and_step():
    def model(x):
        log_scale = pyro.param("log_scale", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, (log_scale - 2).exp() - 0.1353), obs=x)

    x = np.zeros(8)
    with pytest.raises(ProbgenError) as caught:
        probgen.fit(Program(model, by=ELBO()), {"x": x}, steps=200, lr=0.01, **QUIET)
    words = str(caught.value)
    assert "\n" not in words and "step " in words and "'x'" in words and "training stopped" in words


def test_a_fit_starts_without_running_its_program_on_all_rows(tmp_path):
    """What a long chain costs before its first step: a few batches through the network, however many rows are held out."""
    seen = []

    def model(x):
        seen.append(len(x))
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x))
            for t in range(40):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            for t in range(40):
                pyro.sample(f"z_{t}", dist.Normal(loc * x, 1.0))

    np.savez(tmp_path / "rows.npz", x=reals(20_000, 1)["x"][:, 0])
    data = probgen.load_data(tmp_path / "rows.npz")
    run = probgen.fit(Program(model, guide, by=ELBO()), data, steps=1, batch_size=64, **QUIET)
    held = len(run.data.valid)
    assert held > 1500
    assert 64 < sum(seen) - held < 9 * 64  # the held-out rows once, for their loss after the step


def test_held_out_rows_outside_bounds_that_are_tensors(tmp_path):
    """The bounds of a mixture's parts lie two constraints deep, and are judged anew for held-out rows."""

    def model(x):
        weights = pyro.param("w", torch.zeros(2))
        parts = dist.Uniform(torch.zeros(len(x), 2, 1), torch.ones(len(x), 2, 1)).to_event(1)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(logits=weights), parts), obs=x)

    inside = np.full((40, 1), 0.5, np.float32)
    np.savez(tmp_path / "rows.npz", x_train=inside, x_valid=np.full((5, 1), -5, np.float32), x_test=inside[:8])
    with pytest.raises(ProbgenError, match=r"\(valid\): the array 'x' holds -5, outside the support"):
        probgen.fit(Program(model, by=ELBO()), probgen.load_data(tmp_path / "rows.npz"), steps=1, batch_size=8, **QUIET)
