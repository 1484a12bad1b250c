"""What XLA makes of a training step for accelerators that need not be here.

    python -m benchmarks.compiled --target=h200
    python -m benchmarks.compiled --target=v5e

The networks of `python -m benchmarks.network`, of which only the norm changes, are
compiled for one device and looked at: memory beside arguments and results, how many
instructions run (on a GPU kernels and library calls, beside copies), what they read and
write, and the masks among it; for TPUs also XLA's own estimate of the cycles. These are
no times, but nothing disturbs them. Bytes are as XLA counts them; on a GPU, where it
does not, all of each instruction's operands and results. Compiling takes a quarter of a
minute each for a GPU, and some three minutes for a TPU. `benchmarks/targets.py` says
what to install. In the file of results, rows of other targets stay.
"""

import argparse
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import programs, results, targets
from benchmarks.network import BARE, contestants, make_network, train_step

# Name, image size, width and batch.
SETTINGS = {
    "h200": [("inception", 224, 1.0, 256), ("resnet50", 224, 1.0, 256)],
    "v5e": [("inception", 224, 1.0, 128), ("resnet50", 224, 1.0, 128)],
    "cpu": [("inception", 64, 0.25, 32), ("resnet50", 64, 0.5, 16)],
}
COLUMNS = {
    "": "name",
    "memory, MB": "temporary_megabytes",
    "instructions": "instructions",
    "read and written, GB": "gigabytes",
    "masks, MB": "mask_megabytes",
    "estimated Mcycles": "megacycles",
}
TINY = [("inception", 32, 1 / 16, 4), ("resnet50", 32, 1 / 16, 4)]


def main(arguments: argparse.Namespace) -> None:
    """Compiles, prints a table a network and writes the results."""
    chosen = results.chosen("target", arguments.target or "h200", list(SETTINGS))
    known = ["bfloat16", "float32"]
    dtypes = results.chosen("dtypes", arguments.dtypes or "bfloat16", known)
    only = results.chosen("only", arguments.only, list(contestants()))
    # Networks have the same names everywhere.
    networks = results.chosen("networks", arguments.networks, [s[0] for s in TINY])
    # A compiler for GPUs or TPUs would look for one to run on.
    jax.config.update("jax_platforms", "cpu")
    for target in chosen:
        targets.devices(target)
    rows = []
    for target in chosen:
        for setting in TINY if arguments.tiny else SETTINGS[target]:
            for dtype in dtypes if setting[0] in networks else ():
                own = [
                    describe(target, *setting, dtype=dtype, name=name) for name in only
                ]
                _print(own)
                rows += own
    kept = results.read(arguments.output)["rows"] if arguments.output.exists() else []
    rows += [row for row in kept if row["target"] not in chosen]
    results.write(arguments.output, {"machine": results.machine(), "rows": rows})


def describe(
    target: str,
    network: str,
    image_size: int,
    width: float,
    batch: int,
    *,
    dtype: str,
    name: str,
) -> dict[str, Any]:
    """Compiles one network's training step for a target.

    Args:
      target: of `targets.TARGETS`, or "cpu".
      network: "inception" or "resnet50".
      image_size: height and width.
      width: what its channels are multiplied by.
      batch: images a step.
      dtype: of the computation.
      name: of a contestant of `python -m benchmarks.network`.

    Returns:
      A row of results.
    """
    contestant = contestants()[name]
    model = make_network(network, contestant.norm, width, dtype)
    images = jax.ShapeDtypeStruct((batch, image_size, image_size, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    variables = jax.eval_shape(
        functools.partial(model.init, train=True), jax.random.key(0), images
    )
    step = functools.partial(train_step, model, contestant.policy)
    print(f"compiling {network} in {dtype} for {target}: {name}", flush=True)
    begin = time.perf_counter()
    compiled = targets.compile_for(target, step, variables, images, labels)
    hlo = compiled.as_text()
    traffic = programs.traffic(hlo)
    return {
        "target": target,
        "network": network,
        "image_size": image_size,
        "width": width,
        "batch": batch,
        "dtype": dtype,
        "name": name,
        "temporary_megabytes": programs.temporary_bytes(compiled) / 1e6,
        "instructions": traffic.instructions,
        "gigabytes": (_counted_by_xla(compiled) or traffic.num_bytes) / 1e9,
        "mask_megabytes": traffic.mask_bytes / 1e6,
        "megacycles": _millions(targets.estimated_cycles(hlo)),
        "seconds_to_compile": time.perf_counter() - begin,
    }


def _counted_by_xla(compiled: jax.stages.Compiled) -> float | None:
    analysis: Any = compiled.cost_analysis()
    return analysis["bytes accessed"] if analysis else None


def _millions(number: int | None) -> float | None:
    return None if number is None else number / 1e6


def _print(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    print(
        f"\n{first['target']}: {first['network']}, width {first['width']:g}, "
        f"{first['batch']} images of {first['image_size']}x{first['image_size']}, "
        f"{first['dtype']}"
    )
    body = [[row[key] for key in COLUMNS.values()] for row in rows]
    print(results.table(list(COLUMNS), body), flush=True)


if __name__ == "__main__":
    main(
        results.parse(
            __doc__,
            "compiled",
            target="one or more of h200,v5e,cpu (default: h200)",
            dtypes="bfloat16 or float32 or both (default: bfloat16)",
            networks="only these, of inception,resnet50",
            only=f"only these contestants, as bn_jax,flax.linen,{BARE}",
        )
    )
