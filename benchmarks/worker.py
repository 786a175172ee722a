"""One measurement in a process of its own: `python -m benchmarks.worker NAME '{"argument": ...}'` prints JSON.

Thread pools, compile caches and peak memory of one measurement are then not those of another.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
XLA_ONE = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
MEASUREMENTS = {
    "pyro": "benchmarks.pyro_steps:measured",
    "numpyro": "benchmarks.numpyro_steps:measured",
    "cuda": "benchmarks.cuda_steps:measured",
    "growth-pyro": "benchmarks.pyro_steps:grown",
    "growth-numpyro": "benchmarks.numpyro_steps:grown",
    "memory-pyro": "benchmarks.pyro_steps:peak_memory",
    "memory-numpyro": "benchmarks.numpyro_steps:peak_memory",
    "first-loss": "benchmarks.first_loss:measured",
    "em": "benchmarks.mixtures:iteration",
    "nuts-numpyro": "benchmarks.nuts_steps:measured",
    "flows": "benchmarks.flow_steps:measured",
    "flow-draws": "benchmarks.flow_steps:drawn",
    "pixels": "benchmarks.pixels:measured",
    "diffusion-numpyro": "benchmarks.diffusion_steps:measured",
    "diffusion-pyro": "benchmarks.diffusion_pyro_steps:measured",
    "diffusion-draws": "benchmarks.diffusion_pyro_steps:drawn",
    "adversarial": "benchmarks.adversarial_steps:measured",
}


def in_own_process(measurement: str, /, *, threads: int = 1, **arguments: Any) -> Any:
    """The measurement's result, from a fresh process with so many threads and an empty compile cache.

    Raises RuntimeError with the end of what the process said if it failed.
    """
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "benchmarks.worker", measurement, json.dumps(arguments)]
        environment = {**os.environ, **dict.fromkeys(POOLS, str(threads)), "TORCHINDUCTOR_CACHE_DIR": cache}
        if threads == 1:
            environment["XLA_FLAGS"] = XLA_ONE
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the measurement {measurement} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Run what the command line names."""
    alone = os.environ.get("OMP_NUM_THREADS") == "1" and "numpyro" in " ".join(sys.argv[1:])
    if alone and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # XLA's own threads heed nothing else
    module, function = MEASUREMENTS[sys.argv[1]].split(":")
    result = getattr(importlib.import_module(module), function)(**json.loads(sys.argv[2]))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
