"""How much is computed at a time, and with which seed: memory stays bounded whatever is asked for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from probgen.errors import ProbgenError
from probgen.program import Site, Structure

NUMBERS = 2**23  # values of sample sites held at once; a network's activations come on top, some ten times that


def seed_at(seed: int, *place: int) -> int:
    """A seed for one place (batch, chunk, ...) of a computation, as good as independent of every other's."""
    if seed < 0:
        raise ProbgenError(f"`seed` is {seed}: it must be 0 or more")
    return int(np.random.SeedSequence([seed, *place]).generate_state(1)[0] >> 1)


def pieces(total: int, largest: int) -> Iterator[int]:
    """Sizes of at most `largest` that add up to `total`, as equal as they can be."""
    count = -(-total // max(1, largest))
    for i in range(count):
        yield (i + 1) * total // count - i * total // count


def spread(rows: int, most: int) -> np.ndarray:
    """At most so many row numbers, evenly spaced over all rows: data may be sorted."""
    return np.unique(np.linspace(0, rows - 1, min(rows, most)).astype(int))


def numbers_of_datum(structure: Structure) -> int:
    """How many values the sample sites of one datum hold together."""
    return max(1, sum(numbers_of(site) for site in structure.model.values() if site.local or site.role == "observed"))


def particles(structure: Structure) -> int:
    """How many runs of one datum's part of the program fit into memory at a time."""
    return max(1, NUMBERS // numbers_of_datum(structure))


def numbers_of(site: Site) -> int:
    """How many values a site holds for one datum."""
    rows = next((plate.size for plate in site.plates if plate.data), site.shape[0] if site.shape else 1)
    return -(-int(np.prod(site.shape)) // max(1, rows))
