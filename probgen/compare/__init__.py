"""`compare`: one table over runs, each number with its error and its protocol.

Runs compare where their data and split are the same; others are refused. All are evaluated on the same rows, with the same `k` and
`seed`. What `prepare` does to the data may differ, so:

- **A likelihood compares only with one of the same thing.** Steps that can be undone (`Scale`, `Standardize`, `Logit`, `Flatten`)
  count by their log-Jacobians and make no difference. What loses or adds something does (`Binarize`, `Dequantize`, with their
  constants), and whether it is a probability or a density, and which arrays are drawn and which given. Each such thing has a
  column of its own, and a sentence that says what it is; no number stands in the column of another.
- **Samples are compared in the data's own units**, whatever a program sees, with held-out rows. What `Binarize` loses is then
  missing from the samples: real rows that went through it have a line of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from probgen.errors import ProbgenError


def compare(
    runs: Iterable[Any] | Mapping[str, Any],
    data: Any = None,
    *,
    rows: int | None = None,
    k: int = 1000,
    samples: int = 2000,
    seed: int = 0,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Likelihoods, distances of samples, costs and sizes of `runs`, measured anew by one protocol.

    Data and split must be the same, else the runs are refused. What `prepare` does may differ: a likelihood stands in one column
    only with those of the same thing. Steps that can be undone (`Scale`, `Standardize`, `Logit`, `Flatten`) make no difference to
    what it is of; `Binarize` and `Dequantize` do, with their constants, and so do probability or density, and the arrays drawn
    and given. Samples are compared in the data's own units.

    `runs` are runs, or a mapping of labels to them; `data` is where they were trained on, needed only where no run finds it
    again. Likelihoods are those of the first `rows` test rows (all), by `k` importance samples where latents are integrated
    out. At most `samples` draws are held against as many test rows by `probgen.quality`, whose floor is training rows. The
    numbers that runs keep in their folders are neither read nor replaced.

    Returns:
        Plain values: `data`, `protocol`, `likelihoods` (what there are likelihoods of, by name), `runs` (a mapping each, in
        the order given: `estimates` of `likelihood_of`, `quality`, `seconds_a_sample`, `seconds_to_train`, `parameters`,
        `posterior`, ...; None where something is not defined, and `undefined` says why), `floors` (the distances of real rows).
        With `out`, a file that ends in .html, the page is written there and the mapping beside it as .json.

    Raises:
        ProbgenError: runs whose data, split or drawn arrays differ, no test rows, or settings that cannot be.
    """
    from probgen.compare.agreement import agreed_array, agreed_data, labelled
    from probgen.compare.page import write
    from probgen.compare.rows import Against, described, floors, protocol

    named = labelled(runs)
    target = None if out is None else _target(out)
    if k < 2 or samples < 10 or (rows is not None and rows < 1):
        raise ProbgenError(
            f"compare(rows={rows}, k={k}, samples={samples}): take at least 1 row, 2 importance samples and 10 samples"
        )
    data = agreed_data(named, data)
    against = Against.of(data, agreed_array(named), rows, samples, seed)
    found, drawn = {}, {}
    for label, run in named.items():
        found[label], drawn[label] = described(label, run, against, k, seed)
    comparison = {
        **protocol(data, against, k, seed),
        "likelihoods": {each.pop("name"): each for entry in found.values() for each in entry.pop("measures")},
        "floors": floors(named.values(), against, seed),
        "runs": list(found.values()),
    }
    if target is not None:
        write(comparison, named, drawn, against, target)
    return comparison


def _target(out: str | Path) -> Path:
    """The file of the page, which can be written; said before anything is computed."""
    path = Path(out).expanduser()
    if path.suffix != ".html" or not path.parent.is_dir() or path.is_dir():
        raise ProbgenError(
            f"compare: cannot write the page to {out}: name a file that ends in .html, in a folder that there is"
        )
    return path
