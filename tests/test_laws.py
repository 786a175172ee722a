"""The laws, over every model file: what `probgen check` asks of anyone's program, and twins that are one program."""

import re

import numpy as np
import pytest

import probgen
from probgen.check import judge
from probgen.check.laws import LAWS, law_compiled
from probgen.check.subject import Subject
from probgen.data.prepare import Preparation
from probgen.program import backend_of

FILES = {model.name: model for model in probgen.list_models()}
TWINS = [name for name in FILES if f"{name}_numpyro" in FILES]
# Families whose twins are held to each other in a test of their own, with their own options and names of weights.
ELSEWHERE = {"fvsbn", "made"}  # test_autoregressive.py
ELSEWHERE |= {"realnvp", "spline"}  # test_flows_numpyro.py
ELSEWHERE |= {"hvae"}  # test_hvae.py
ELSEWHERE |= {"ddpm"}  # test_diffusion_numpyro.py
ELSEWHERE |= {"ebm"}  # test_energy.py
ELSEWHERE |= {"gan", "wgan_gp"}  # test_adversarial_models.py
ELSEWHERE |= {"gmm", "ppca", "bernoulli_mixture", "kde"}  # test_mixtures.py
# What a file is run on: a set of vectors and one of images; and more options where a file has other networks or sites.
ON = ("digits", "two-moons")
VARIANTS = {"vae": ("digits", {"network": "conv", "hidden": 32}), "gmm": ("two-moons", {"bayesian": True})}
VARIANTS |= {"hvae": ("digits", {"depth": 3, "warmup": 10})}
VARIANTS |= {f"{name}_numpyro": case for name, case in VARIANTS.items()}
VARIANTS |= {name: ("digits", {"network": "dense"}) for name in ("realnvp", "glow")}
VARIANTS |= {"planar": ("two-moons", {"kind": "radial"}), "spline": ("two-moons", {"coupling": True})}
SMALL = {"flow_matching": {"hidden": 16, "layers": 1, "steps": 4}}  # whose densities are integrals
LONG = {"ddpm_numpyro", "hvae_numpyro", "wgan_gp_numpyro"}  # which compile for long on the vectors too
LABELLED = {"cgan"}  # which are not for data without labels
FEW = {"kde": 200, "kde_numpyro": 200}  # rows, where every row meets every other

SUBJECTS: dict[tuple, Subject] = {}


def subject(model, source, variant):
    """One subject for all laws, so that each program is built and traced once."""
    key = (model, source, variant)
    if key not in SUBJECTS:
        data = probgen.load_data(source)
        if model in FEW:
            data = probgen.load_data({name: array[: FEW[model]] for name, array in data.train[:].items()})
        options = VARIANTS[model][1] if variant else SMALL.get(model, {})
        SUBJECTS[key] = Subject(probgen.load(model, data, **options), data)
    return SUBJECTS[key]


CASES = [(m, s, False) for m in FILES for s in ON if s == "digits" or m not in LABELLED] + [
    (m, s, True) for m, (s, _) in VARIANTS.items()
]


def named(case):
    return f"{case[0]}-{case[1]}{'-variant' if case[2] else ''}"


def marks(case):
    """A NumPyro file spends its time in compiling: the suite runs it on the vectors, where densities are integrated."""
    model, source, variant = case
    plain = source == "two-moons" and not variant and model not in LONG
    return pytest.mark.nightly if model.endswith("_numpyro") and not plain else ()


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__.removeprefix("law_"))
@pytest.mark.parametrize("case", [pytest.param(c, id=named(c), marks=marks(c)) for c in CASES])
def test_law(case, law):
    verdict = judge(law, subject(*case))
    assert verdict.passed is not False, str(verdict)


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES, ids=named)
def test_compiled_is_eager(case):
    verdict = judge(law_compiled, subject(*case))
    assert verdict.passed is not False, str(verdict)


# -- twins ----------------------------------------------------------------------------------------------------------


def layer(name):
    """(module, position of the layer, weight or bias) of a parameter's name, in Pyro's or flax's words."""
    module, rest = re.split(r"\$\$\$|\.", name, maxsplit=1)
    return module, int(re.search(r"\d+", rest).group()), "bias" if rest.endswith("bias") else "weight"


def as_torch(kernel, module):
    """A flax kernel in torch's layout: dense [in, out], convolution [h, w, in, out], transposed ones mirrored."""
    if kernel.ndim == 2:
        return kernel.T
    if kernel.ndim == 4:
        return kernel.transpose(3, 2, 0, 1) if module == "encoder" else kernel[::-1, ::-1].transpose(2, 3, 0, 1)
    return kernel


def converted(flax, torch):
    """Flax's weights under torch's names: those layers that have weights, in order."""
    result = {name: flax[name] for name in torch if "$$$" not in name}
    for module in {layer(name)[0] for name in torch if "$$$" in name}:
        ours, theirs = ({layer(n)[1] for n in names if n.startswith(module)} for names in (torch, flax))
        position = dict(zip(sorted(theirs), sorted(ours), strict=True))
        at = {(layer(n)[1], layer(n)[2]): n for n in torch if n.startswith(module)}
        for name in (n for n in flax if n.startswith(module)):
            _, i, kind = layer(name)
            result[at[position[i], kind]] = np.ascontiguousarray(as_torch(flax[name], module))
    return result


@pytest.mark.parametrize("options", [{}, {"network": "conv", "hidden": 32}, {"likelihood": "gaussian"}], ids=str)
@pytest.mark.parametrize("name", [name for name in TWINS if name not in ELSEWHERE])
def test_twins_are_one_program(name, options):
    """Pyro and NumPyro agree on every log density at given latents, with the same weights: ≤1e-5 relative."""
    data = probgen.load_data("digits")
    programs = [probgen.load(file, data, **options) for file in (name, f"{name}_numpyro")]
    preparation = Preparation.of(programs[0].prepare, data)
    arrays, _ = preparation.forward(data.train[np.arange(7)], np.random.default_rng(0))
    runs = [probgen.fit(program, data, steps=3, progress=False) for program in programs]
    ours, theirs = (run._weights for run in runs)
    weights = converted(theirs, ours)
    twin = backend_of(programs[0]).trained_of(programs[0], weights, arrays, rows=len(data.train))
    latents = {"z": np.random.default_rng(1).normal(size=(7, 16)).astype(np.float32)}
    for a, b in zip(twin.log_joint(arrays, latents, 0), runs[1].trained.log_joint(arrays, latents, 0), strict=True):
        assert a.keys() == b.keys()
        for site in a:
            np.testing.assert_allclose(a[site], b[site], rtol=1e-5, atol=1e-4, err_msg=site)
