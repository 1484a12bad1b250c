"""Compiling for accelerators that are not here, which XLA can without having one.

`pip install 'jax[cuda12]'` brings the compiler for GPUs, `'jax[tpu]'` that for TPUs;
best into an environment of their own, with JAX of the same version.
"""

import importlib.util
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

# What XLA's choices depend on, by NVIDIA's data sheet and what `deviceQuery` says. The
# versions are those of the libraries that `jax[cuda12]` brings.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: 4800000000000
  device_memory_size: 151397597184
  cuda_compute_capability { major: 9 }
  driver_version: "12.9.0"
  runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H200"
"""


class Target(NamedTuple):
    """A device to compile for."""

    platform: str
    plugin: str  # the Python package that holds the compiler
    package: str  # what pip calls it
    options: dict[str, Any]  # of the topology
    environment: dict[str, str]


TARGETS = {
    "h200": Target(
        platform="cuda",
        plugin="jax_plugins.xla_cuda12",
        package="jax[cuda12]",
        options={"target_config": H200, "topology": "1x1x1"},
        # There is nothing to time kernels on.
        environment={"XLA_FLAGS": "--xla_gpu_autotune_level=0"},
    ),
    "v5e": Target(
        platform="tpu",
        plugin="libtpu",
        package="jax[tpu]",
        options={"topology_name": "v5e:2x2"},
        environment={
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
        },
    ),
}


def devices(name: str) -> list[jax.Device]:
    """The devices of a target, to compile for but not to run on.

    Args:
      name: of `TARGETS`, or "cpu" for the ones that are here.

    Raises:
      SystemExit: the target's compiler is not installed.
    """
    if name == "cpu":
        return jax.devices("cpu")
    target = TARGETS[name]
    if not _is_installed(target.plugin):
        raise SystemExit(
            f"error: no compiler for {name} here; install one: pip install "
            f"'{target.package}=={jax.__version__}'."
        )
    for variable, value in target.environment.items():
        os.environ.setdefault(variable, value)
    return list(
        topologies.get_topology_desc(platform=target.platform, **target.options).devices
    )


def _is_installed(plugin: str) -> bool:
    try:
        return importlib.util.find_spec(plugin) is not None
    except ModuleNotFoundError:
        return False


def compile_for(
    name: str, function: Callable[..., Any], *shapes: Any
) -> jax.stages.Compiled:
    """Compiles a function for one device of a target.

    Args:
      name: as for `devices`.
      function: to be compiled.
      *shapes: its arguments, or what has their shapes and dtypes.
    """
    device = devices(name)[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
    )
    platform = TARGETS[name].platform if name in TARGETS else name
    traced = jax.jit(function).trace(*placed)
    return traced.lower(lowering_platforms=(platform,)).compile()


def estimated_cycles(hlo: str) -> int | None:
    """The sum of what XLA for TPUs estimates for a program's instructions, or None.

    Of conditional branches only what is outside of them counts.
    """
    entry = hlo[hlo.index("\nENTRY") :]
    found = re.findall(r'"estimated_cycles":"(\d+)"', entry)
    return sum(map(int, found)) if found else None
