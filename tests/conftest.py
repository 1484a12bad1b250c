"""The platform that every test runs on: eight host devices, set before JAX starts.

With TEST_PLATFORMS=cuda it is a GPU, for tests of the core that need one device.
"""

import os
import signal

os.environ["JAX_PLATFORMS"] = os.environ.get("TEST_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
# What commands compile is not kept for later runs of the tests.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")

import jax

# Collectives that are queued asynchronously can deadlock on forced host devices.
jax.config.update("jax_cpu_enable_async_dispatch", False)
# The background of a shell ignores Ctrl-C, and so would the processes of tests.
signal.signal(signal.SIGINT, signal.default_int_handler)
