"""Any way to write a Pyro program: each is fitted, sampled, evaluated, and its trained callables are the PPL's own."""

import numpy as np
import pyro
import pytest
import torch
from programs_pyro import CASES
from pyro import poutine
from pyro.infer import Predictive

import probgen
from probgen.program import arguments


def fitted(case, steps=3, **options):
    return probgen.fit(
        case.program, case.arrays, steps=steps, batch_size=case.batch_size, compile=False, progress=False, **options
    )


def tensors(run, case):
    rows = len(next(iter(case.arrays.values()))) if case.local_guide else 6
    arrays = {name: np.asarray(value)[:rows] for name, value in case.arrays.items()}
    arrays = {n: a.astype(np.float32) if a.dtype == np.uint8 else a for n, a in arrays.items()}
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


@pytest.mark.parametrize("name", CASES)
def test_every_verb_on_every_idiom(name):
    case = CASES[name]()
    run = fitted(case)
    assert np.isfinite(run.metrics["loss"]).all() and np.isfinite(run.metrics["grad_norm"]).all()

    draws = run.sample(5, given=case.given)
    local = {n for n, site in run.structure.model.items() if site.local} & set(draws) or {"x"}
    assert all(len(draws[n]) == 5 for n in local)
    for array in (n for n, use in run.structure.arrays.items() if use == "data" and n in draws):
        assert draws[array].shape[1:] == case.arrays[array].shape[1:]
    if not case.given:  # rows are draws of one distribution: another seed gives others
        assert any(not np.array_equal(draws[n], v) for n, v in run.sample(5, seed=1).items())

    numbers = run.evaluate(case.arrays, k=20)
    assert np.isfinite(numbers["elbo"]) and numbers["elbo"] <= numbers["log_likelihood"] + 1e-6
    if run.structure.latents:
        tree = run.posterior(case.arrays, draws=3, rows=24 if case.local_guide else 6)
        latents = {site.removesuffix(f"_{i}") for site in run.structure.latents for i in range(6)}
        assert {str(v) for v in tree["posterior"].data_vars} <= latents
        assert all(np.isfinite(tree["posterior"][v]).all() for v in tree["posterior"].data_vars)

    arrays = tensors(run, case)
    named = arguments(case.program.model, arrays)
    trace = poutine.trace(run.model).get_trace(**named)
    assert set(run.structure.model) <= set(trace.nodes)
    assert pyro.render_model(run.model, model_args=tuple(named.values())) is not None
    guide = run.guide if case.program.guide is not None else None
    drawn = Predictive(run.model, guide=guide, num_samples=2)(**arrays)
    assert all(len(value) == 2 for value in drawn.values())
    assert not pyro.get_param_store().keys()


@pytest.mark.parametrize("name", CASES)
def test_the_run_holds_what_training_ended_with(name):
    """Parameters moved, `params` are constrained, `modules` are copies that compute what the trained program does."""
    case = CASES[name]()
    before, run = fitted(case, steps=0).params, fitted(case, steps=4)
    after = run.params
    assert set(after) == set(before) and all(np.isfinite(v).all() for v in after.values())
    still = {n for n in after if np.array_equal(before[n], after[n])}
    assert not still, still
    for name, module in run.modules.items():
        for path, parameter in module.named_parameters():
            assert isinstance(parameter, torch.nn.Parameter)
            full = next((n for n in after if n.endswith(path) and n.startswith(name)), None)
            if full is not None and "_unconstrained" not in path:
                assert np.array_equal(parameter.detach().numpy(), after[full])
        assert not any(part.training for part in module.modules())


def test_constraints_hold_after_training():
    run = fitted(CASES["global_params"](), steps=50, lr=0.1)
    assert run.params["weights"].sum() == pytest.approx(1, abs=1e-6) and (run.params["scale"] > 0).all()


def test_batchnorm_statistics_follow_the_data_and_are_fixed_afterwards():
    case = CASES["vae_batchnorm"]()
    encoder = next(
        c.cell_contents for c in case.program.guide.__closure__ if isinstance(c.cell_contents, torch.nn.Module)
    )
    run = fitted(case, steps=300, lr=1e-6)  # 0.9^300 of the start is left
    norm = run.modules["encoder"][1]
    with torch.no_grad():
        inputs = encoder[0](torch.as_tensor(case.arrays["x"]).float())
    assert torch.allclose(norm.running_mean, inputs.mean(0), atol=0.15)
    assert torch.allclose(norm.running_var, inputs.var(0), rtol=0.5)
    assert int(norm.num_batches_tracked) == 300
    assert torch.equal(encoder[1].running_mean, torch.zeros(5)) and int(encoder[1].num_batches_tracked) == 0
    weights = run.trained.values["encoder$$$1.running_mean"].clone()
    run.sample(4), run.evaluate(case.arrays, k=10), run.posterior(case.arrays, draws=2)
    assert torch.equal(run.trained.values["encoder$$$1.running_mean"], weights)


def test_dropout_is_random_in_training_and_off_elsewhere():
    case = CASES["vae_dropout"]()
    run = fitted(case, steps=1)
    x = torch.as_tensor(case.arrays["x"]).float()
    a, b = (poutine.trace(run.guide).get_trace(x=x).nodes["z"]["fn"].base_dist.loc for _ in range(2))
    assert torch.equal(a, b)


def test_a_gru_is_trained():
    case = CASES["state_space"]()
    before = fitted(case, steps=0).params
    run = fitted(case, steps=40, lr=1e-2)
    moved = [np.abs(run.params[n] - before[n]).max() for n in before if n.startswith("gru")]
    assert len(moved) == 4 and min(moved) > 0.02
    assert run.metrics["loss"][-1] < run.metrics["loss"][0] or len(run.metrics["loss"]) == 1
    x = torch.as_tensor(case.arrays["x"]).float()
    assert torch.equal(run.modules["gru"](x)[0], run.modules["gru"](x)[0])


def test_numbered_sites_become_one_variable():
    draws = fitted(CASES["hmm"]()).sample(5)
    assert draws["z"].shape == (5, 5) and draws["x"].shape == (5, 5)


def test_a_lazy_autoguide_of_the_user_is_left_uncreated():
    case = CASES["regression_auto_normal"]()
    run = fitted(case)
    assert not [n for n, _ in case.program.guide.named_parameters()] or "AutoNormal" in repr(type(case.program.guide))
    assert run.guide.median().keys() >= {"sigma", "linear.weight", "linear.bias"}
    assert run.guide.quantiles([0.5])["sigma"][0] > 0
