"""What all tests share: XLA compiles without optimising, and what one test has compiled the next one reads from a folder.

Compiling would be most of the suite's time otherwise. `make nightly` compiles as users do.
"""

import atexit
import os
import shutil
import tempfile

import pytest

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers and the tests' own processes inherit it
    folder = tempfile.mkdtemp(prefix="probgen-xla-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """`nightly_on("numpyro")` leaves the case of that backend, which spends its time in compiling, to the night."""
    for item in items:
        marker, case = item.get_closest_marker("nightly_on"), getattr(item, "callspec", None)
        if marker is not None and case is not None and set(marker.args) & set(case.id.split("-")):
            item.add_marker(pytest.mark.nightly)
