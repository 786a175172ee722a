r"""Pairs of noise and data for a rectified flow: what a first flow draws, and the noise that it drew it from.

.. math::
    z \sim N(0, I), \qquad x = f^{-1}(z), \qquad
    \text{then } \operatorname{E} \|u(x_t, t) - (x - z)\|^2 \text{ with } x_t = (1 - t) x + t z \text{ of one pair}

The flow that learns from them has straighter ways, so that fewer steps of a solver follow them.

References:
    | Flow straight and fast: learning to generate and transfer data with rectified flow (Liu et al., 2022), arXiv:2209.03003
"""

from __future__ import annotations

from typing import Any

import numpy as np

from probgen.errors import ProbgenError


def reflow(run: Any, n: int, seed: int = 0) -> dict[str, np.ndarray]:
    """`n` draws of a trained flow as the arrays `x`, in the data's own units, and `z`, the noise that each comes from.

    They are data to learn from: `load("flow_matching", pairs, coupling="given")`.

    Raises:
        ProbgenError: a program whose data site is no flow, or data that are prepared at random.
    """
    if run.preparation.random:
        raise ProbgenError(
            "reflow: the data are prepared at random (Dequantize), so a draw in their units has no one noise"
        )
    drawn = run.sample(n, seed=seed)
    sites = [name for name in run.structure.observed if name in drawn]
    raw = {name: drawn[name] for name in sites}
    prepared, _ = run.preparation.forward(raw, None)
    bases = run.trained.bases(prepared, seed)
    if len(sites) != 1 or list(bases) != sites:
        raise ProbgenError(
            f"reflow: {run.name} has no data site that is a flow: use a program such as flow_matching or cnf"
        )
    return {**raw, "z": bases[sites[0]].reshape(prepared[sites[0]].shape)}
