"""`posterior`: draws, densities, names of dimensions, files that ArviZ opens, LOO only where it is valid."""

import numpy as np
import pytest
import xarray as xr
from linear_gaussian import LinearGaussian, NormalMean

from probgen import chunks
from probgen.data import as_rows, load_data
from probgen.data.prepare import Preparation, Standardize
from probgen.errors import ProbgenError
from probgen.posterior import loo, posterior
from probgen.program import Site, Structure

LABELLED = np.arange(300) % 3


def tree_of(trained, n=300, prepare=None, **options):
    y = LABELLED[:n]
    arrays = {"x": trained.generate(n, 1, y)[1], "y": y, "mask": np.ones((n, 2))}
    data = load_data(arrays)
    return posterior(trained, Preparation.of(prepare or {}, data), data.train, **options), arrays


def test_groups_and_dimensions():
    tree, arrays = tree_of(LinearGaussian(classes=3), draws=20)
    assert tree["posterior"]["z"].dims == ("chain", "draw", "data", "z_dim_0")
    assert tree["posterior"]["z"].shape == (1, 20, 300, 2)
    for group, name in (("sample_stats", "log_p"), ("sample_stats", "log_q"), ("log_likelihood", "x")):
        assert tree[group][name].dims == ("chain", "draw", "data")
    assert set(tree.children) == {"posterior", "sample_stats", "log_likelihood", "observed_data", "constant_data"}
    assert list(tree["observed_data"].data_vars) == ["x"] and list(tree["constant_data"].data_vars) == ["mask"]
    np.testing.assert_array_equal(tree["posterior"]["y"], LABELLED)
    np.testing.assert_array_equal(tree["observed_data"]["x"], arrays["x"])
    assert not any("sample" in group.dims for group in tree.children.values())


def test_draws_and_densities_are_those_of_the_posterior():
    """Means of 400 draws of 300 × 2 latents: their sum of squared z-scores is χ²(600) (false alarm 1e-4 a side)."""
    trained = LinearGaussian()
    tree, arrays = tree_of(trained, draws=400)
    z = tree["posterior"]["z"].values[0]
    chi = ((z.mean(0) - trained.posterior_mean(arrays)) @ np.linalg.inv(np.linalg.cholesky(trained.V)).T) ** 2 * 400
    assert 479 < chi.sum() < 738
    difference = tree["sample_stats"]["log_p"] - tree["sample_stats"]["log_q"]
    np.testing.assert_allclose(difference[0], np.tile(trained.log_evidence(arrays), (400, 1)), atol=1e-9)


def test_log_likelihood_integrates_local_latents_out_in_raw_units():
    trained = LinearGaussian(moved=0.2, wider=1.2)
    tree, arrays = tree_of(trained, draws=3, k=3000, prepare={"x": (Standardize(),)})
    x = arrays["x"]
    exact = trained.log_evidence({"x": (x - x.mean(0)) / x.std(0)}) - np.log(x.std(0)).sum()
    found = tree["log_likelihood"]["x"].values[0]
    assert np.abs(found[0] - exact).max() < 0.3 and abs((found[0] - exact).mean()) < 0.01
    np.testing.assert_array_equal(found[0], found[2])
    assert tree["log_likelihood"].attrs["importance_samples"] == 3000


def test_rows_are_chosen_by_seed_and_numbered():
    trained = LinearGaussian()
    one, arrays = tree_of(trained, draws=2, max_rows=40, seed=5)
    two, _ = tree_of(trained, draws=2, max_rows=40, seed=5)
    number = one["posterior"]["data"].values
    assert len(number) == 40 and (np.diff(number) > 0).all() and number.max() > 200
    np.testing.assert_array_equal(one["observed_data"]["x"], arrays["x"][number])
    np.testing.assert_array_equal(one["posterior"]["y"], arrays["y"][number])
    xr.testing.assert_equal(one["posterior"].to_dataset(), two["posterior"].to_dataset())


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(chunks, "NUMBERS", 7 * 500)
    trained = LinearGaussian(moved=0.1)
    tree_of(trained, draws=50, k=30)
    assert max(trained.calls) <= 500
    monkeypatch.setattr("probgen.posterior.LARGEST", 1000)
    with pytest.raises(ProbgenError, match="fewer `draws` or `rows`"):
        tree_of(trained, draws=50)


def test_global_latents():
    x = np.random.default_rng(0).normal(1.0, 1.0, size=250)  # more than one batch of rows would hold
    trained, data = NormalMean(x), load_data({"x": x})
    tree = posterior(trained, Preparation.of({}, data), data.train, draws=50)
    theta = tree["posterior"]["theta"]
    assert theta.dims == ("chain", "draw")
    expected = -0.5 * (x - theta.values[0][:, None]) ** 2 - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(tree["log_likelihood"]["x"][0], expected)
    stats = tree["sample_stats"]
    total = (stats["log_p"] - stats["log_q"]).sum("data") + stats["log_ratio_global"]
    np.testing.assert_allclose(total[0], trained.log_evidence(), atol=1e-9)


def test_a_backend_whose_terms_are_other_draws_gets_no_log_likelihood():
    class Other(NormalMean):
        def terms(self, arrays, draws, seed):
            return super().terms(arrays, draws, seed + 1)

    x = np.random.default_rng(0).normal(1.0, 1.0, size=30)
    data = load_data({"x": x})
    with pytest.warns(UserWarning, match="no log_likelihood group"):
        tree = posterior(Other(x), Preparation.of({}, data), data.train, draws=5)
    assert "log_likelihood" not in tree.children and "log_ratio_global" not in tree["sample_stats"]
    with pytest.raises(ProbgenError, match="LOO needs the group"):
        loo(tree)


@pytest.mark.parametrize("guide", [{}, {"moved": 0.1, "wider": 1.3}])
def test_loo_is_the_exact_one_even_for_an_approximate_guide(guide):
    """PSIS with 4000 draws: its error here is some 0.02 nats of −43 (over ten seeds); the gate is 0.15."""
    x = np.random.default_rng(0).normal(1.0, 1.0, size=30)
    trained, data = NormalMean(x, **guide), load_data({"x": x})
    tree = posterior(trained, Preparation.of({}, data), data.train, draws=4000)
    assert loo(tree).elpd == pytest.approx(trained.exact_loo(), abs=0.15)


def test_loo_is_refused_where_it_is_not_valid():
    tree, _ = tree_of(LinearGaussian(), draws=3)
    assert tree["log_likelihood"].attrs["loo_valid"] == 0
    with pytest.raises(ProbgenError, match="LOO is valid only"):
        loo(tree)
    x = np.random.default_rng(0).normal(size=30)
    data = load_data({"x": x})
    part = posterior(NormalMean(x), Preparation.of({}, data), data.train, draws=3, max_rows=10)
    with pytest.raises(ProbgenError, match="all 30 training rows"):
        loo(part)


def test_the_file_opens_everywhere(tmp_path):
    """As a tree, and group by group, which is how `az.from_netcdf` of ArviZ 0.23 reads."""
    tree, _ = tree_of(LinearGaussian(), draws=5)
    path = tmp_path / "posterior.nc"
    tree.to_netcdf(path, engine="h5netcdf")
    with xr.open_datatree(path, engine="h5netcdf") as back:
        xr.testing.assert_equal(back["posterior"].to_dataset(), tree["posterior"].to_dataset())
        assert loo_refused(back)
    for group in tree.children:
        with xr.open_dataset(path, group=group, engine="h5netcdf") as dataset:
            assert set(dataset.data_vars) == set(tree[group].data_vars)
            np.testing.assert_array_equal(dataset["data"], np.arange(300))
            np.testing.assert_array_equal(dataset["y"], LABELLED)


def loo_refused(tree):
    with pytest.raises(ProbgenError, match="LOO is valid only"):
        loo(tree)
    return True


def test_numbered_latents_and_reserved_names():
    class Chain(LinearGaussian):
        @property
        def structure(self):
            old = super().structure
            z = {f"z_{t}": Site(f"z_{t}", "latent", "Normal", (10,), 0, old.model["z"].plates) for t in (1, 2)}
            x = Site("data", "observed", "Normal", (10, self.D), 1, old.model["z"].plates)
            return Structure({**z, "data": x}, z, ("data",), False, {"x": "data"})

        def posterior(self, arrays, draws, seed):
            values, log_p, log_q = super().posterior(arrays, draws, seed)
            return {"z_1": values["z"][..., 0], "z_2": values["z"][..., 1]}, log_p, log_q

        def log_weights(self, arrays, k, seed):
            _, log_p, log_q = super().posterior(arrays, k, seed)
            return log_p - log_q

    tree, arrays = tree_of(Chain(), draws=300)
    assert tree["posterior"]["z"].dims == ("chain", "draw", "data", "z_dim_0")
    trained = LinearGaussian()
    assert np.abs(tree["posterior"]["z"].values[0].mean(0) - trained.posterior_mean(arrays)).max() < 0.3
    assert list(tree["log_likelihood"].data_vars) == ["data_"]


def test_bad_input():
    trained = LinearGaussian()
    data = load_data({"x": trained.generate(20, 0)[1]})
    preparation = Preparation.of({}, data)
    with pytest.raises(ProbgenError, match="no rows"):
        posterior(trained, preparation, data.test)
    with pytest.raises(ProbgenError, match="`draws` is 0"):
        posterior(trained, preparation, data.train, draws=0)

    class Flow(LinearGaussian):
        @property
        def structure(self):
            return Structure({"x": super().structure.model["x"]}, {}, ("data",), False, {"x": "data"})

    with pytest.raises(ProbgenError, match="no latents"):
        posterior(Flow(), preparation, as_rows({"x": np.zeros((3, 5))}))
