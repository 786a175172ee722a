"""What probgen says when it cannot go on: one sentence that names what is wrong, where, and the cure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ProbgenError(ValueError):
    """A mistake in the input, told in one sentence; the command line prints it alone and exits with status 2."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'lr'?"`` when a known word is close to `word`, else the list of those there are."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are: {', '.join(known)}" if known else ""
