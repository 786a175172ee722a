"""`show`: the factorisation, the diagram and the KLs that a structure spells out."""

import shutil
import subprocess

import numpy as np
import pytest

from probgen.program import Plate, Program, Site, Structure
from probgen.show import Description, show
from probgen.show.factors import Factor, latex

DATA = Plate("data", 64, -1, data=True)


def site(name, role="latent", *parents, local=True, family="Normal", event=(2,), **facts):
    plates = (DATA,) if local else ()
    shape = (64, *event) if local else event
    return Site(name, role, family, shape, len(event), plates, "Independent(Real(), 1)", parents=parents, **facts)


def structure(model, guide=(), **facts):
    return Structure({s.name: s for s in model}, {s.name: s for s in guide}, ("data",), **facts)


def describe(model, guide=(), reads=("x",), **facts):
    return Description("it", structure(model, guide, **facts), 1437, reads)


def test_a_vae_reads_as_in_its_paper():
    told = describe([site("z"), site("x", "observed", "z")], [site("z")], arrays={"x": "data"})
    assert told.factorisation == "p(x, z) = p(z) p(x | z)\nq(z | x)"
    assert told.latex.splitlines() == [
        r"p_\theta(x, z) = \prod_{n=1}^{N} p_\theta(z_{n})\, p_\theta(x_{n} \mid z_{n})",
        r"q_\phi(z \mid x) = \prod_{n=1}^{N} q_\phi(z_{n} \mid x_{n})",
    ]
    assert told.kl["z"].startswith("analytic: Normal ‖ Normal")
    assert "N/B" in str(told) and "1,437" in str(told)


def test_globals_given_arrays_and_computed_values():
    model = [
        site("w", local=False),
        site("mean", "deterministic", "w"),
        site("y", "observed", "mean"),
    ]
    told = describe(model, [site("w", local=False)], reads=(), arrays={"x": "given", "y": "data"})
    assert told.factorisation == "p(y, w | x) = p(w) p(y | w, x)\nq(w)"
    assert r"p_\theta(w)\, \prod_{n=1}^{N} p_\theta(y_{n} \mid w, x_{n})" in told.latex


def test_a_guide_with_known_parents_is_written_factor_by_factor():
    model = [site("z_2"), site("z_1", "latent", "z_2"), site("x", "observed", "z_1")]
    upwards = [site("z_1"), site("z_2", "latent", "z_1")]
    told = describe(model, upwards, arrays={"x": "data"})
    assert told.factorisation.splitlines()[0] == "p(x, z_2, z_1) = p(z_2) p(z_1 | z_2) p(x | z_1)"
    assert told.factorisation.splitlines()[1] == "q(z_1, z_2 | x) = q(z_1 | x) q(z_2 | z_1, x)"
    assert "p(z_1) depends on z_2" in told.kl["z_1"] and told.kl["z_1"].startswith("sampled")
    assert told.kl["z_2"].startswith("analytic")


def test_enumerated_latents_factors_and_other_families():
    y = site("y", family="Categorical", event=(), enumerated=True, discrete=True)
    told = describe([y, site("z"), site("x", "observed", "y", "z")], [site("z", family="Laplace")])
    assert told.kl == {
        "y": "none: it is summed out in the model",
        "z": "in closed form where the PPL knows one for Laplace ‖ Normal, else sampled",
    }
    assert "{y}" in told.diagram and "(z)" in told.diagram and "[x]" in told.diagram
    energy = describe([site("x"), site("energy", "factor", "x")], arrays={})
    assert energy.factorisation == "p(x) ∝ p(x) ψ(x)" and "unnormalised" in str(energy)


def test_what_an_autoguide_draws_on_its_way_is_no_factor():
    helper = site("_Auto_latent", local=False)
    guide = [helper, site("w", "latent", "_Auto_latent", local=False, family="Delta", delta=True)]
    told = describe([site("w", local=False), site("x", "observed", "w")], guide, reads=())
    assert told.factorisation.splitlines()[1] == "q(w)" and "computes it" in told.kl["w"]


def test_long_chains_are_shortened_and_greek_names_are_letters():
    chain = [site("x_1")] + [site(f"x_{t}", "latent", f"x_{t - 1}") for t in range(2, 51)]
    told = describe([*chain, site("x", "observed", "x_50")])
    line = told.factorisation.splitlines()[0]
    assert line.startswith("p(x, x_1, x_2, ⋯, x_49, x_50) = p(x_1) p(x_2 | x_1) p(x_3 | x_2) ⋯") and len(line) < 120
    assert r"\cdots" in told.latex and "x_{50,n}" in told.latex
    assert latex("p", ("theta", "my_w"), (), [Factor(("theta",), (), False), Factor(("my_w",), (), False)], ()) == (
        r"p(\theta, \mathrm{my\_w}) = p(\theta)\, p(\mathrm{my\_w})"
    )


def test_the_diagram_is_graphviz_source_with_every_edge():
    pixels = Plate("pixels", 9, -2)
    deep = Site("x", "observed", "Bernoulli", (9, 64), 0, (DATA, pixels), "Boolean()", parents=("z",))
    told = describe([site("theta", local=False), site("z", "latent", "theta"), deep])
    assert told.diagram.splitlines() == [
        "(theta)  Normal 2",
        "┌ data · N = 1,437 ───────┐",
        "│ (z)  Normal 2  ← theta  │",
        "│ ┌ pixels · 9 ─────────┐ │",
        "│ │ [x]  Bernoulli  ← z │ │",
        "│ └─────────────────────┘ │",
        "└─────────────────────────┘",
    ]
    assert told.dot.count("->") == 2 and told.dot.count("subgraph") == 2 and told.dot.count("{") == told.dot.count("}")
    if shutil.which("dot"):
        subprocess.run(["dot", "-Tsvg"], input=told.dot.encode(), check=True, capture_output=True)


@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_show_traces_a_program_on_either_backend(backend):
    program = {"pyro": pyro_program, "numpyro": numpyro_program}[backend]()
    told = show(program, {"x": np.random.default_rng(0).normal(size=(100, 3)).astype("float32")})
    assert told.factorisation == "p(x, z) = p(z) p(x | z)\nq(z | x)"
    assert told.rows == 100 and "analytic" in told.kl["z"] and "real" in str(told)


def pyro_program():
    import pyro
    import pyro.distributions as dist
    import torch

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True) * torch.ones(3), 1.0).to_event(1), obs=x)

    def guide(x):
        weight = pyro.param("weight", torch.ones(3, 2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ weight, 1.0).to_event(1))

    return Program(model, guide)


def numpyro_program():
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(z.sum(-1, keepdims=True) * jnp.ones(3), 1.0).to_event(1), obs=x)

    def guide(x):
        weight = numpyro.param("weight", jnp.ones((3, 2)))
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(x @ weight, 1.0).to_event(1))

    return Program(model, guide)
