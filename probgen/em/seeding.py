"""Where EM starts: rows that become centres, and the rows that lie nearest to each.

Reference: Arthur & Vassilvitskii, k-means++: the advantages of careful seeding, SODA 2007.
"""

from __future__ import annotations

import numpy as np

from probgen.errors import ProbgenError

SAMPLE = 10_000  # rows among which centres are sought
PIECE = 65_536  # rows whose distances are held at once
SHORT = 10  # steps of each restart
RESTART = 7919  # between the seeds of restarts


def refuse_few_rows(latent: str, states: int, rows: int) -> None:
    """Every state starts at a row of its own."""
    if states > rows:
        raise ProbgenError(
            f"the latent {latent!r} makes {states} states, and there are only {rows} rows to start them from: ask for fewer "
            "components, or start from EM(init='program')"
        )


def standardised(values: list[np.ndarray]) -> np.ndarray:
    """Values [N, ...] of several sites as columns of unit variance [N, D]; constant columns are zero."""
    flat = np.concatenate([np.asarray(v, np.float32).reshape(len(v), -1) for v in values], 1)
    centred = flat - flat.mean(0, dtype=np.float64).astype(np.float32)
    spread = centred.std(0)
    return centred / np.where(spread > 1e-6 * np.abs(flat).max(0), spread, np.inf)


def centres(points: np.ndarray, number: int, init: str, seed: int) -> np.ndarray:
    """Rows of `points` [N, D] as centres [number, D]: spread out ("k-means++"), or any ("random")."""
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0xE1,)))
    sample = points if len(points) <= SAMPLE else points[random.choice(len(points), max(SAMPLE, number), replace=False)]
    if init == "random":
        return sample[random.choice(len(sample), number, replace=False)]
    chosen = [int(random.integers(len(sample)))]
    nearest = _squared(sample, sample[chosen])[:, 0]
    for _ in range(1, number):
        mass = nearest.sum(dtype=np.float64)
        if mass > 0:  # the best of several candidates
            candidates = random.choice(len(sample), 2 + int(np.log(number)), p=nearest / mass)
        else:  # fewer distinct rows than centres
            candidates = random.integers(len(sample), size=1)
        after = np.minimum(nearest[:, None], _squared(sample, sample[candidates]))
        best = int(after.sum(0).argmin())
        chosen.append(int(candidates[best]))
        nearest = after[:, best]
    return sample[chosen]


def nearest(points: np.ndarray, middles: np.ndarray) -> np.ndarray:
    """For each row the number of the centre that it lies nearest to, [N]."""
    pieces = [_squared(points[i : i + PIECE], middles).argmin(1) for i in range(0, len(points), PIECE)]
    return np.concatenate(pieces)


def _squared(points: np.ndarray, middles: np.ndarray) -> np.ndarray:
    squares = (points**2).sum(1)[:, None] - 2 * points @ middles.T + (middles**2).sum(1)
    return np.maximum(squares, 0)
