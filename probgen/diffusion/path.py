"""Where a solver of the probability flow looks: noise-to-signal ratios, times and signals along the way from data to noise."""

from __future__ import annotations

import numpy as np

from probgen.diffusion.denoiser import GaussianChain
from probgen.diffusion.samplers import asked_at


def path(chain: GaussianChain, t: float | None, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ς = σ / α, time and α at both ends of every step and half way, [2 steps + 1] each, in double precision.

    The steps are even in log ς, from time t, or the earliest at which the network is asked, to the end of a schedule that is
    not traced.
    """
    schedule = chain.schedule.in_numbers()
    low, high = asked_at(chain)
    low = low if t is None else float(schedule.noise_to_signal(t))
    ratios = np.geomspace(low, high, 2 * steps + 1)
    times = np.append(schedule.time_of(ratios[:-1]), 1.0)
    return ratios, times, schedule.alpha(times) + 0 * times
