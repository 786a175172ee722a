"""Where and in what precision a program runs, and where its random numbers come from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from probgen.errors import ProbgenError


def resolve_device(device: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one. A device that is not there is refused."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ProbgenError(f'device must be "auto", "cpu", "cuda" or "cuda:1", not {device!r}') from error
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        raise ProbgenError(f"the device {device!r} is not on this machine: use device='cpu' or 'auto'")
    return found


def resolve_precision(precision: str) -> tuple[torch.dtype, bool]:
    """The dtype of the leaves, and whether the program runs under bfloat16 autocast."""
    known = {"32": (torch.float32, False), "64": (torch.float64, False), "bf16-mixed": (torch.float32, True)}
    if str(precision) not in known:
        raise ProbgenError(f'precision must be "32", "64" or "bf16-mixed", not {precision!r}')
    return known[str(precision)]


class InPrecision(Messenger):
    """Draws in the precision of the run, whatever the constants of their distribution were made in."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def _pyro_post_sample(self, msg: dict) -> None:
        value = msg["value"]
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != self.dtype:
            msg["value"] = value.to(self.dtype)


def has_cuda() -> bool:
    """Whether `device="auto"` means a GPU here."""
    return torch.cuda.is_available()


@contextlib.contextmanager
def numbers(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """The default dtype and, off the CPU, the default device that a program's own constants are made with."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with contextlib.nullcontext() if device.type == "cpu" else device:
            with contextlib.nullcontext() if dtype is torch.float32 else InPrecision(dtype):
                yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def generators_restored(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, the caller's generators are left as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def seed_step(seed: int, step: int, device: torch.device) -> None:
    """Random numbers as a pure function of (seed, step): a 64-bit mix of the two seeds the generator."""
    mixed = (seed * 0x9E3779B97F4A7C15 + (step + 1) * 0xBF58476D1CE4E5B9) & 0x7FFFFFFFFFFFFFFF
    torch.default_generator.manual_seed(mixed)  # 1 µs, where torch.manual_seed takes 74
    if device.type == "cuda":
        torch.cuda.manual_seed(mixed)
