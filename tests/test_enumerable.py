"""Latents that are marked for enumeration and cannot be: one sentence with the cure, whatever learns the program."""

import importlib

import numpy as np
import pytest

import probgen
from probgen import ProbgenError, Program

MARK = {"enumerate": "parallel"}
X = np.random.default_rng(0).normal(size=30).astype(np.float32)
BITS = ", ".join(["'za'", "'zb'", "'zc'", "'zd'", "'ze'"])


def programs(ppl, dist):
    def one(latent, summed=False, prior=False):
        def model(x):
            mean = ppl.sample("mean", dist.Normal(0.0, 1.0)) if prior else 0.0
            with ppl.plate("data", len(x)):
                z = ppl.sample("z", latent(), infer=MARK)
                ppl.sample("x", dist.Normal((z.sum(-1) if summed else z) + mean, 1.0), obs=x)

        return model

    def many(x):
        with ppl.plate("data", len(x)):
            total = sum(ppl.sample(f"z{chr(97 + i)}", dist.Bernoulli(0.5), infer=MARK) for i in range(25))
            ppl.sample("x", dist.Normal(total, 1.0), obs=x)

    def bits():
        return dist.Bernoulli(0.5).expand([40]).to_event(1)

    return {
        "poisson": one(lambda: dist.Poisson(2.0)),
        "normal": one(lambda: dist.Normal(0.0, 1.0)),
        "bits": one(bits, summed=True),
        "many": many,
        "poisson, with a prior": one(lambda: dist.Poisson(2.0), prior=True),
        "bits, with a prior": one(bits, summed=True, prior=True),
        "binomial, with a prior": one(lambda: dist.Binomial(20_000, 0.5), prior=True),
    }


ENDLESS = r"'z' \(Poisson\) is marked for enumeration, and there is no end to its values: leave out the mark and draw"
EVENT = r"'z' \(Bernoulli\) is marked for enumeration as one event of 40 values.*put them in a plate"
CASES = [
    ("poisson", "EM", ENDLESS),
    ("poisson", "ELBO", ENDLESS),
    ("normal", "EM", r"'z' \(Normal\) is marked for enumeration, and it is continuous: leave out the mark"),
    ("normal", "ELBO", r"'z' \(Normal\) is marked for enumeration, and it is continuous: leave out the mark"),
    ("bits", "EM", EVENT),
    ("bits", "ELBO", EVENT),
    ("many", "EM", rf"enumerating {BITS}, … makes 33,554,432 joint states, more than the 10,000 that EM sums out"),
    ("many", "ELBO", "'x' depends on 25 latents that are enumerated, which have 33,554,432 joint values, more than"),
    ("poisson, with a prior", "EM", ENDLESS),
    ("bits, with a prior", "EM", EVENT),
    ("binomial, with a prior", "EM", "enumerating 'z' makes 20,001 joint states"),
]


@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
@pytest.mark.parametrize(("name", "by", "said"), CASES, ids=[f"{name}-{by}" for name, by, _ in CASES])
def test_what_cannot_be_enumerated_is_told_with_its_cure(name, by, said, backend):
    ppl, dist = importlib.import_module(backend), importlib.import_module(f"{backend}.distributions")
    losses = importlib.import_module(f"probgen.{backend}")

    def guide(x):
        ppl.sample("mean", dist.Normal(0.0, 1.0))

    program = Program(programs(ppl, dist)[name], guide if name.endswith("prior") else None, by=getattr(losses, by)())
    with pytest.raises(ProbgenError, match=said) as told:
        probgen.fit(program, {"x": X}, steps=2, progress=False)
    assert str(told.value).count("\n") == 0
