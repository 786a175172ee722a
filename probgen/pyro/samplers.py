"""The loop of a sampler in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from probgen.diffusion.samplers import Sampler
from probgen.pyro.denoiser import Denoiser


def sampled(chain: Denoiser, sampler: Sampler, start: Tensor) -> Tensor:
    """From x_1 = `start` to data as the chain sees them, [B, *shape], with torch's random numbers."""
    chain = chain.guided(sampler.guidance)
    table = sampler.numbers(chain)
    columns = {name: torch.as_tensor(values, dtype=start.dtype).to(start.device).unbind() for name, values in table.items()}
    x, memory, last = start, sampler.start(start), len(table["t"]) - 1
    for i in range(last + 1):
        at = {name: values[i] for name, values in columns.items()}
        noise = [torch.randn_like(x) for _ in range(sampler.noises)]
        if i == last:
            return sampler.last(chain, x, at, noise, memory)
        x, memory = sampler.step(chain, x, at, noise, memory)
    return x
