"""Rows of numbers, or the word that a sampler has diverged."""

from __future__ import annotations

import numpy as np

from probgen.errors import ProbgenError


def refuse_not_finite(rows: np.ndarray, name: str) -> None:
    """Refuse rows [N, ...] of which some hold NaN or infinity."""
    lost = int((~np.isfinite(rows)).reshape(len(rows), -1).any(1).sum())
    if lost:
        raise ProbgenError(f"{lost} of {len(rows)} rows of {name} are not finite: the sampler has diverged")
