"""The platform that every test runs on: eight host devices, set before JAX starts.

With TEST_PLATFORMS=cuda it is a GPU, for tests of the core that need one device.
"""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = os.environ.get("TEST_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
# Half of the time goes into compiling, and much is compiled by several processes: kept
# beside what pytest keeps, for the next run of the tests, too.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(__file__).parents[1] / ".pytest_cache" / "compiled"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest

# Collectives that are queued asynchronously can deadlock on forced host devices.
jax.config.update("jax_cpu_enable_async_dispatch", False)
# The background of a shell ignores Ctrl-C, and so would the processes of tests.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tracing makes so many objects that a tenth of the time went into looking for cycles.
gc.set_threshold(100_000)


@pytest.fixture(scope="module", autouse=True)
def release_what_was_traced() -> Iterator[None]:
    """Keeps the heap small: gigabytes of programs make every search for leaks long."""
    yield
    jax.clear_caches()
