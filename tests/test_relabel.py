"""Label switching undone, and p(z | x): against permutations that are known and responsibilities in closed form."""

import itertools

import numpy as np
import pytest
from scipy import stats

import probgen
from probgen import pictures
from probgen.components import component_axes, renumbered, state_sites
from probgen.components.relabel import agreed, agreeing, agreement, relabel
from probgen.errors import ProbgenError
from probgen.nuts.draws import Draws
from probgen.program import Program

K, D = 3, 2
SHARES = np.array([0.5, 0.3, 0.2], np.float32)
MEANS = np.array([[-2.0, 0.0], [2.0, 0.5], [0.0, 3.0]], np.float32)
SCALES = np.array([[0.5, 0.7], [0.6, 0.5], [0.4, 0.8]], np.float32)
BACKENDS = ["pyro", "numpyro"]


def rows(n=80, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.choice(K, n, p=SHARES / SHARES.sum())
    return (MEANS[z] + SCALES[z] * rng.normal(size=(n, D))).astype(np.float32)


def languages(backend):
    """The PPL, its distributions, an array maker and the backend's ELBO."""
    if backend == "pyro":
        import pyro
        import pyro.distributions as dist
        import torch

        from probgen.pyro import ELBO

        return pyro, dist, lambda a: torch.tensor(np.asarray(a, np.float32)), ELBO
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    from probgen.numpyro import ELBO

    return numpyro, dist, lambda a: jnp.asarray(a, jnp.float32), ELBO


def point_mixture(backend):
    """Parameters as points: nothing but z is latent."""
    ppl, dist, array, ELBO = languages(backend)

    def model(x):
        means = ppl.param("means", array(MEANS))
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", dist.Categorical(array(SHARES)), infer={"enumerate": "parallel"})
            ppl.sample("x", dist.Normal(means[z], array(SCALES)[z]).to_event(1), obs=x)

    return Program(model, by=ELBO())


def bayesian_mixture(backend, prior_means=None, extra=False):
    """Weights, means [K, D] and scales [K, D] are latents; the guide holds them near the truth.

    D is 2 and K is 3, but `tau` [K] stands above the means alone, and `loose` [K] is nobody's.
    """
    ppl, dist, array, ELBO = languages(backend)
    at = np.zeros((K, D)) if prior_means is None else prior_means

    def model(x):
        weights = ppl.sample("share", dist.Dirichlet(array(np.full(K, 2.0))))
        spread = 3.0
        if extra:
            tau = ppl.sample("tau", dist.LogNormal(array(np.ones(K)), 0.3).to_event(1))
            spread = tau[:, None]
        means = ppl.sample("where", dist.Normal(array(at), spread * array(np.ones((K, D)))).to_event(2))
        scales = ppl.sample("wide", dist.LogNormal(array(np.zeros((K, D))), 1.0).to_event(2))
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            ppl.sample("x", dist.Normal(means[z], scales[z]).to_event(1), obs=x)

    def guide(x):
        ppl.sample("share", dist.Dirichlet(array(SHARES * 300)))
        if extra:
            ppl.sample("tau", dist.LogNormal(array([0.5, 1.0, 1.5]), 0.05).to_event(1))
        ppl.sample("where", dist.Normal(array(MEANS), 0.05).to_event(2))
        ppl.sample("wide", dist.LogNormal(array(np.log(SCALES)), 0.05).to_event(2))

    return Program(model, guide, by=ELBO(), defaults={"batch_size": None})


def fitted(program, x):
    """A run of the program as it is written."""
    return probgen.fit(program, {"x": x}, steps=0, progress=False)


def shuffled(tree, order, axes, chains=1):
    """The tree with component k of draw s taken from `order[s, k]`, in so many chains."""
    tree = tree.copy()
    dataset = tree["posterior"].to_dataset()
    made, draws = {}, len(order) // chains
    for name, variable in dataset.data_vars.items():
        value = variable.values[0]
        if name in axes:
            index = order.reshape(len(order), K, *[1] * (value.ndim - 2))
            value = np.take_along_axis(value, index, 1)
        elif name == "z":
            value = np.take_along_axis(np.argsort(order, 1), value.astype(int), 1)
        made[name] = (variable.dims, value.reshape(chains, draws, *value.shape[1:]))
    coords = {n: c for n, c in dataset.coords.items() if n not in ("chain", "draw")}
    fresh = type(dataset)(made, {**coords, "chain": np.arange(chains), "draw": np.arange(draws)})
    for group in list(tree.children):
        if group in ("sample_stats", "log_likelihood"):
            del tree[group]
    tree["posterior"].dataset = fresh
    return tree


def permutations(n, seed=3):
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(K) for _ in range(n)])


AXES = ("share", "where", "wide")


def drawn(n, seed=1):
    """Draws of the latents near the truth, made by hand."""
    rng = np.random.default_rng(seed)
    return {
        "share": rng.dirichlet(SHARES * 300, n).astype(np.float32),
        "where": (MEANS + 0.05 * rng.normal(size=(n, K, D))).astype(np.float32),
        "wide": (SCALES * np.exp(0.05 * rng.normal(size=(n, K, D)))).astype(np.float32),
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_permutations_are_undone_exactly(backend):
    """Up to one renumbering of all draws together, which nothing tells."""
    run, values, order = fitted(bayesian_mixture(backend), rows()), drawn(40), permutations(40)
    states = np.random.default_rng(2).integers(0, K, (40, 80))
    moved = renumbered(values, dict.fromkeys(AXES, (0,)), order)
    moved["z"] = np.take_along_axis(np.argsort(order, 1), states, 1)
    found, done = agreeing(run.trained, {"x": rows()}, moved)
    one = np.abs(found["where"][0][:, None] - MEANS).sum(-1).argmin(1)
    assert sorted(one) == [0, 1, 2] and set(done["z"].moved) == {*AXES, "z"}
    for name in AXES:
        np.testing.assert_array_equal(found[name], values[name][:, one], name)
    np.testing.assert_array_equal(found["z"], np.argsort(one)[states])


def test_a_posterior_with_known_permutations_is_undone_in_its_groups():
    run = fitted(bayesian_mixture("pyro"), rows())
    tree = run.posterior(draws=40, data=rows())
    back = relabel(shuffled(tree, permutations(40), AXES), run)["posterior"]
    one = np.abs(back["where"].values[0, 0][:, None] - MEANS).sum(-1).argmin(1)
    for name in AXES:
        np.testing.assert_array_equal(back[name].values, tree["posterior"][name].values[:, :, one], name)
        assert back[name].attrs["relabelled_by"] == "z"
    np.testing.assert_array_equal(back["z"].values, np.argsort(one)[tree["posterior"]["z"].values.astype(int)])
    assert "renumbered in" in back.attrs["relabelled_z"] and "where" in back.attrs["relabelled_z"]


def test_draws_that_agree_stay_as_they_are():
    run = fitted(bayesian_mixture("pyro"), rows())
    tree = run.posterior(draws=20, data=rows())
    back = relabel(tree, run)["posterior"]
    for name in (*AXES, "z"):
        np.testing.assert_array_equal(back[name].values, tree["posterior"][name].values)
    assert "in 0 of 20 draws" in back.attrs["relabelled_z"] and not tree["posterior"].attrs.get("relabelled_z")


def test_chains_in_different_modes_agree_afterwards():
    import arviz_stats

    run = fitted(bayesian_mixture("pyro"), rows())
    tree = run.posterior(draws=400, data=rows())
    order = np.repeat(np.array([[0, 1, 2], [1, 2, 0], [2, 1, 0], [0, 2, 1]]), 100, axis=0)
    stuck = shuffled(tree, order, AXES, chains=4)
    before = arviz_stats.rhat(stuck["posterior"].to_dataset()[list(AXES)])
    after = arviz_stats.rhat(relabel(stuck, run)["posterior"].to_dataset()[list(AXES)])
    assert all(float(before[name].max()) > 2 for name in AXES)
    assert all(float(after[name].max()) < 1.02 for name in AXES), after


def test_draws_of_chains_agree_afterwards_and_say_so():
    run, values = fitted(bayesian_mixture("pyro"), rows()), drawn(200)

    def chains(values):
        stats_of = {"diverging": np.zeros((2, 100), bool)}
        return Draws({n: v.reshape(2, 100, *v.shape[1:]) for n, v in values.items()}, stats_of)

    order = np.repeat(np.array([[0, 1, 2], [1, 2, 0]]), 100, axis=0)
    stuck = chains(renumbered(values, dict.fromkeys(AXES, (0,)), order))
    after, said = agreed(run.trained, stuck)
    assert stuck.diagnostics()["r_hat"] > 1.5
    assert after.diagnostics() == pytest.approx(chains(values).diagnostics())
    assert len(said) == 1 and "renumbered in 100 of 200 draws" in said[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_whichever_draws_of_chains_are_looked_at_bear_the_same_numbers(backend, monkeypatch):
    """Two chains, each in a numbering of its own: without a reference either half would keep its own."""
    run, values = fitted(bayesian_mixture(backend), rows()), drawn(40)
    moved = renumbered(values, dict.fromkeys(AXES, (0,)), np.repeat([[2, 0, 1], [1, 0, 2]], 20, axis=0))
    lp = np.zeros((2, 20))
    lp[1, 7] = 1.0  # the likeliest, whose numbers all are to bear
    kept = Draws({n: v.reshape(2, 20, *v.shape[1:]) for n, v in moved.items()}, {"lp": lp})
    monkeypatch.setattr(run.trained, "draws", kept, raising=False)
    for half in (slice(0, 20), slice(20, 40), slice(10, 30)):
        found, _ = agreeing(run.trained, {"x": rows()}, {n: v[half] for n, v in moved.items()})
        np.testing.assert_array_equal(found["where"], values["where"][half][:, [1, 0, 2]])


def test_the_picture_of_global_latents_shows_components_that_agree(monkeypatch):
    run, values = fitted(bayesian_mixture("pyro"), rows()), drawn(60)
    moved = renumbered(values, dict.fromkeys(AXES, (0,)), permutations(60))
    monkeypatch.setattr(run.trained, "posterior", lambda *_, **__: (moved, None, None))
    with pictures.detached():
        ax = pictures.forest(run)
    assert "same number in all draws" in ax.get_title(loc="left")
    widths = [np.ptp(line.get_xdata()) for line in ax.get_lines() if line.get_linewidth() == 1.2]
    assert len(widths) == K + 2 * K * D and max(widths) < 1.0  # components lie 3 and more apart


def test_a_latent_above_the_components_is_renumbered_with_them():
    run = fitted(bayesian_mixture("pyro", extra=True), rows())
    tree = run.posterior(draws=30, data=rows())
    back = relabel(shuffled(tree, permutations(30), (*AXES, "tau")), run)["posterior"]
    ranked = np.argsort(back["tau"].values[0], axis=1)  # its three numbers lie far apart
    assert (ranked == ranked[0]).all()
    assert back["tau"].attrs["relabelled_by"] == "z"


def test_components_that_a_prior_tells_apart_keep_their_places():
    run = fitted(bayesian_mixture("pyro", prior_means=2 * MEANS), rows())
    tree = run.posterior(draws=10, data=rows())
    back = relabel(tree, run)["posterior"]
    assert "not exchangeable" in back.attrs["relabelled_z"]
    np.testing.assert_array_equal(back["where"].values, tree["posterior"]["where"].values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_axes_of_components_are_found_and_not_those_of_the_same_length(backend):
    """Scales [K, K]: with three dimensions of the data, only the first axis is that of the components."""
    ppl, dist, array, ELBO = languages(backend)
    x = np.random.default_rng(0).normal(size=(30, K)).astype(np.float32)

    def model(x):
        shared = ppl.sample("shared", dist.Normal(array(np.zeros(K)), 1.0).to_event(1))  # by dimension of x
        turned = ppl.sample("turned", dist.Normal(array(np.zeros((K, K))), 1.0).to_event(2))  # [dimension, component]
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", dist.Categorical(array(np.ones(K) / K)), infer={"enumerate": "parallel"})
            ppl.sample("x", dist.Normal(turned.T[z] + shared, 1.0).to_event(1), obs=x)

    def guide(x):
        ppl.sample("shared", dist.Normal(array(np.zeros(K)), 1.0).to_event(1))
        ppl.sample("turned", dist.Normal(array(np.zeros((K, K))), 1.0).to_event(2))

    trained = fitted(Program(model, guide, by=ELBO(), defaults={"batch_size": None}), x).trained
    assert state_sites(trained.structure) == ["z"]
    values = {n: v for n, v in trained.posterior({"x": x}, 3, 0)[0].items() if n != "z"}
    assert component_axes(trained, {"x": x}, values, "z") == {"turned": (1,)}


def test_the_algorithm_finds_permutations_of_uncertain_assignments():
    """Assignments of overlapping components, each draw noisy and permuted at random."""
    rng = np.random.default_rng(0)
    truth = rng.dirichlet([0.7] * 4, size=300)
    noisy = truth * np.exp(0.3 * rng.normal(size=(50, 300, 4)))
    noisy /= noisy.sum(-1, keepdims=True)
    order = np.stack([rng.permutation(4) for _ in range(50)])
    found = agreement(np.take_along_axis(noisy, order[:, None], 2))
    undone = np.take_along_axis(order, found, 1)
    assert (undone == undone[0]).all()


def responsibilities(x, shares, means, scales):
    """p(z = k | x) in closed form, [N, K]."""
    log = np.log(shares) + stats.norm(means, scales).logpdf(x[:, None]).sum(-1)
    return np.exp(log - np.logaddexp.reduce(log, 1)[:, None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_assignments_of_a_point_program_are_the_responsibilities(backend):
    x = rows(700) * 0.5  # in two batches, components overlap
    found = fitted(point_mixture(backend), x[:50]).assignments(x)
    assert found["z"].dims == ("data", "z_dim") and found["z"].shape == (700, K)
    np.testing.assert_allclose(found["z"].values, responsibilities(x, SHARES, MEANS, SCALES), atol=2e-5)
    assert found["z"].attrs["relabelled"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_assignments_are_averaged_over_draws_whose_components_agree(backend, monkeypatch):
    """The draws change places at random; without renumbering all probabilities would be near a third."""
    x = rows(60) * 0.7
    run = fitted(bayesian_mixture(backend), x)
    values = drawn(64)
    moved = renumbered(values, dict.fromkeys(AXES, (0,)), permutations(64))
    monkeypatch.setattr(run.trained, "posterior", lambda *_: (moved, None, None))
    found = run.assignments(x, draws=64)["z"]
    truth = np.mean([responsibilities(x, *(values[n][s] for n in AXES)) for s in range(64)], 0)
    order = np.abs(found.values[:, :, None] - truth[:, None]).sum(0).argmin(0)
    assert sorted(order) == [0, 1, 2] and found.attrs["relabelled"] == 1
    np.testing.assert_allclose(found.values[:, order], truth, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_enumerated_latents_are_summed_out(backend):
    """x | z, y with both discrete: p(z | x) by enumeration."""
    ppl, dist, array, ELBO = languages(backend)
    levels = np.array([[0.0, 1.0], [2.0, 2.5], [-1.0, 3.0]])

    def model(x):
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", dist.Categorical(array(SHARES)), infer={"enumerate": "parallel"})
            y = ppl.sample("y", dist.Bernoulli(array([0.2, 0.5, 0.9])[z]), infer={"enumerate": "parallel"})
            y = y.long() if backend == "pyro" else y
            ppl.sample("x", dist.Normal(array(levels)[z, y], 0.8), obs=x)

    x = np.linspace(-2, 4, 23, dtype=np.float32)
    joint = np.log(SHARES)[:, None] + np.log([[0.8, 0.2], [0.5, 0.5], [0.1, 0.9]])
    joint = np.exp(joint + stats.norm(levels, 0.8).logpdf(x[:, None, None]))
    joint /= joint.sum((1, 2), keepdims=True)
    found = fitted(Program(model, by=ELBO()), x).assignments(x)
    np.testing.assert_allclose(found["z"].values, joint.sum(2), atol=1e-5)
    np.testing.assert_allclose(found["y"].values, joint.sum(1), atol=1e-5)


def test_programs_without_components_are_refused():
    import pyro
    import pyro.distributions as dist

    from probgen.pyro import ELBO

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("m", lambda: 0.0 * x[0]), 1.0).to_event(1), obs=x)

    run = fitted(Program(model, by=ELBO()), rows())
    with pytest.raises(ProbgenError, match="no components"):
        run.assignments(rows())
    with pytest.raises(ProbgenError, match="no enumerated latent"):
        relabel(None, run)


# -- the algorithm's own promises -------------------------------------------------------------------------------------


def costs(assignments, order):
    """Stephens' loss of each draw in every one of the K! orders, against the average of all draws as they are numbered."""
    average = np.take_along_axis(assignments, order[:, None], 2).mean(0)
    every = np.array(list(itertools.permutations(range(assignments.shape[2]))))
    orders = [assignments[:, :, one] for one in every]
    return every, np.stack([(p * np.log(p / average)).sum((1, 2)) for p in orders], 1)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_found_is_the_best_of_each_draw_also_from_a_draw_that_is_like_no_other(seed):
    """By enumeration of all orders against the average that it leads to: one more round would change nothing."""
    rng = np.random.default_rng(seed)
    truth = rng.dirichlet([0.5] * 3, size=40)
    noisy = truth * np.exp(0.8 * rng.normal(size=(30, 40, 3)))
    noisy[0] = rng.dirichlet([0.8] * 3, size=40)  # the first average: it tells nothing of the others
    noisy /= noisy.sum(-1, keepdims=True)
    turned = np.stack([rng.permutation(3) for _ in range(30)])
    given = np.take_along_axis(noisy, turned[:, None], 2)
    found = agreement(given)
    every, loss = costs(given, found)
    np.testing.assert_array_equal(every[loss.argmin(1)], found)
    undone = np.take_along_axis(turned, found, 1)[1:]
    assert (undone == undone[0]).all()


def test_one_datum_alone_does_not_decide():
    """Thirty rows that are nine to one the same in both draws, and one that each is certain of and they disagree on.

    Beside the first draw alone that row costs log 0, which would turn the second draw over in all the others, were it
    not for a least probability.
    """
    shared = np.where(np.arange(30)[:, None] % 2 == [0, 1], 0.9, 0.1)
    draws = np.stack([np.concatenate([shared, [own]]) for own in ([1.0, 0.0], [0.0, 1.0])])
    np.testing.assert_array_equal(agreement(draws), [[0, 1], [0, 1]])
    np.testing.assert_array_equal(agreement(draws[:, :, ::-1] + 0.0, 1), [[0, 1], [0, 1]])
    np.testing.assert_array_equal(agreement(np.stack([draws[0], draws[1][:, ::-1]])), [[0, 1], [1, 0]])
