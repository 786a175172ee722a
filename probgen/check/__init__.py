"""`check`: the laws of the zoo on anyone's program: a tick, or one sentence with the cure."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

from probgen.check.laws import LAWS, law_compiled
from probgen.check.subject import Subject, Verdict
from probgen.errors import ProbgenError
from probgen.program import Program


def check(program: Program, data: Any, seed: int = 0, compile: bool = False) -> list[Verdict]:
    """The verdict of every law on `program` with `data`; `compile` adds the compiled step to them."""
    return list(verdicts(program, data, seed, compile))


def verdicts(program: Program, data: Any, seed: int = 0, compile: bool = False) -> Iterator[Verdict]:
    """The verdicts one by one. Where the program does not run, the other laws are not looked at."""
    subject, runs = Subject(program, data, seed), True
    for law in (*LAWS, law_compiled) if compile else LAWS:
        if not runs:
            yield Verdict(name_of(law), None, "not looked at, because the program does not run")
            continue
        verdict = judge(law, subject)
        runs = runs and not (law is LAWS[0] and verdict.passed is False)
        yield verdict


def calibrated(run: Any, **options: Any) -> Iterator[Verdict]:
    """A verdict on each latent site of a fitted run: whether its posteriors are calibrated."""
    from probgen.calibration import calibration, undefined

    why = undefined(run.trained.structure)
    if why:
        yield Verdict("calibration", None, why)
        return
    found = calibration(run, **options)
    for site, sentence in found.verdicts.items():
        yield Verdict(f"calibration of {site}", found.site_passed(site), sentence)


def judge(law: Callable[[Subject], Verdict], subject: Subject) -> Verdict:
    """What the law says; an error of the program's own is a broken law, told in one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return law(subject)
    except ProbgenError as error:
        return Verdict(name_of(law), False, str(error))
    except Exception as error:  # the program is anyone's, and may raise anything
        said = next(iter(str(error).strip().splitlines()), "no message")
        return Verdict(name_of(law), False, f"the program raises {type(error).__name__}: {said}")


def name_of(law: Callable[[Subject], Verdict]) -> str:
    """A law's name in words."""
    return law.__name__.removeprefix("law_").replace("_", " ")
