"""Where the time goes in which a training step of Inception compiles.

    python -m benchmarks.compile_time                   # for the device that is here
    python -m benchmarks.compile_time --target=h200     # for one that need not be here

Tracing, lowering and XLA's compilation are timed apart, each program in a process of
its own, without a cache. On a GPU that is here XLA times kernels to choose among them;
how much that takes shows in the levels of its flag: 0 times nothing, 1 does, 4, the
default, also checks what kernels compute. A process that takes too long is ended, and
its row says so. Results are written after each.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import network, results, targets
from benchmarks.network import BARE, contestants

LEVELS = (0, 1, 4)  # of --xla_gpu_autotune_level
SECONDS = 300  # that a process may take
SIZE, BATCH, DTYPE = 224, 256, "bfloat16"
TINY_SIZE, TINY_BATCH, TINY_WIDTH = 32, 4, 1 / 32
COLUMNS = {
    "": "name",
    "autotuning": "level",
    "trace, s": "trace",
    "lower, s": "lower",
    "compile, s": "compile",
    "of the processor, s": "compile_cpu",
    "ended as": "state",
}


def main(arguments: argparse.Namespace) -> None:
    """Compiles, writes the results after each program, and prints a table."""
    if arguments.program:
        print(json.dumps(measure(**json.loads(arguments.program))))
        return
    target = results.chosen(
        "target", arguments.target or "here", ["here", *targets.TARGETS]
    )[0]
    only = results.chosen("only", arguments.only or f"bn_jax,{BARE}", [*contestants()])
    limit = int(arguments.seconds or SECONDS)
    # This process asks for the devices and leaves their memory to those it starts.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if target != "here":
        jax.config.update("jax_platforms", "cpu")
    times_kernels = target == "here" and jax.default_backend() == "gpu"
    rows: list[dict[str, Any]] = []
    for level in LEVELS if times_kernels else (0,):
        for name in only:
            rows.append(_in_a_process(target, name, level, arguments.tiny, limit))
            results.write(
                arguments.output, {"machine": results.machine(), "rows": rows}
            )
    body = [[row.get(key) for key in COLUMNS.values()] for row in rows]
    print(results.table(list(COLUMNS), body), flush=True)


def _in_a_process(
    target: str, name: str, level: int, tiny: bool, limit: int
) -> dict[str, Any]:
    """A row: what `measure` found, or why it did not."""
    program = {"target": target, "name": name, "tiny": tiny}
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level={level}"
    environment = {
        "JAX_COMPILATION_CACHE_DIR": "",
        "XLA_FLAGS": flags.strip(),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
    }
    command = [sys.executable, "-m", "benchmarks.compile_time"]
    command.append(f"--program={json.dumps(program)}")
    print(f"compiling {name} for {target}, autotuning {level}", flush=True)
    row: dict[str, Any] = program | {"level": level}
    try:
        done = subprocess.run(
            command,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return row | {"state": f"stopped after {limit} s"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        return row | {"state": f"failed: {last[0]}"}
    return row | json.loads(done.stdout.splitlines()[-1]) | {"state": "compiled"}


def measure(target: str, name: str, tiny: bool) -> dict[str, Any]:
    """Times the parts of one compilation, in seconds.

    Args:
      target: of `targets.TARGETS`, or "here".
      name: of a contestant of `python -m benchmarks.network`.
      tiny: the smallest network.
    """
    if target == "here":
        device, platform = jax.devices()[0], jax.default_backend()
    else:
        # A compiler for GPUs or TPUs would look for one to run on.
        jax.config.update("jax_platforms", "cpu")
        device, platform = targets.devices(target)[0], targets.TARGETS[target].platform
    size, batch = (TINY_SIZE, TINY_BATCH) if tiny else (SIZE, BATCH)
    contestant = contestants()[name]
    model = network.make_network(
        "inception", contestant.norm, TINY_WIDTH if tiny else 1.0, DTYPE
    )
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    variables = jax.eval_shape(
        functools.partial(model.init, train=True), jax.random.key(0), images
    )
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        (variables, images, labels),
    )
    step = functools.partial(network.train_step, model, contestant.policy)
    times: dict[str, Any] = {}

    def timed(part: str, function: Callable[[], Any]) -> Any:
        clocks = time.perf_counter, time.process_time
        before = [clock() for clock in clocks]
        result = function()
        times[part], times[f"{part}_cpu"] = (
            clock() - start for clock, start in zip(clocks, before, strict=True)
        )
        return result

    traced = timed("trace", lambda: jax.jit(step).trace(*arguments))
    platforms = {"gpu": "cuda"}.get(platform, platform)
    lowered = timed("lower", lambda: traced.lower(lowering_platforms=(platforms,)))
    compiled = timed("compile", lowered.compile)
    lines = {"lowered": lowered.as_text(), "compiled": compiled.as_text()}
    return times | {f"{key}_lines": text.count("\n") for key, text in lines.items()}


if __name__ == "__main__":
    main(
        results.parse(
            __doc__,
            "compile_time",
            target=f"here (default), or one of {', '.join(targets.TARGETS)}",
            only=f"only these contestants, as bn_jax,flax.linen,{BARE}",
            seconds=f"that one program may take (default: {SECONDS})",
            program="one program, as JSON: what this command starts itself with",
        )
    )
