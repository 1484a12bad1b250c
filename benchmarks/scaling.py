"""How the cost grows with batch, channels, devices and the size of a network.

Times are of forward and backward passes of BN with ReLU, beside flax.linen's. For
devices (512 host devices are forced, and nothing is run on them) the collectives of the
compiled program are counted and their results' bytes added up, which no load on the
machine changes. A checkpoint is that of a training state of Inception with momentum,
saved and restored by `experiments.checkpoints`.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

import bn_jax.linen
from benchmarks import libraries, measuring, op, programs, results
from experiments.checkpoints.save import Checkpoints
from experiments.inception.network import Inception
from experiments.training import steps
from experiments.training.optimisers import make_optimiser

DEVICES = (1, 2, 4, 8, 16, 64, 256, 512)
CONTESTANTS = ("bn_jax", "flax.linen")
ROUNDS = 11


def main(arguments: argparse.Namespace) -> None:
    """Measures, prints tables and writes the results."""
    rounds = arguments.rounds or (2 if arguments.tiny else ROUNDS)
    most_devices = 8 if arguments.tiny else max(DEVICES)
    jax.config.update("jax_num_cpu_devices", most_devices)
    machine = results.machine()
    lists = {
        "batch": [(n, 14, 14, 256) for n in (8, 16, 32, 64, 128, 256)],
        "channels": [(32, 14, 14, c) for c in (64, 128, 256, 512, 1024, 2048)],
    }
    if arguments.tiny:
        lists = {"batch": [(4, 4, 4, 8)], "channels": [(4, 4, 4, 16)]}
    content: dict[str, Any] = {"machine": machine}
    for varied, shapes in lists.items():
        content[varied] = [
            row for shape in shapes for row in _times(shape, varied, rounds)
        ]
    content["devices"] = [
        collectives_of(name, count)
        for count in DEVICES
        if count <= jax.device_count()
        for name in CONTESTANTS
    ]
    widths = (1 / 16,) if arguments.tiny else (1 / 8, 1 / 4, 1 / 2, 1)
    content["checkpoint"] = [checkpoint_of(width) for width in widths]
    for name, rows in list(content.items())[1:]:
        print(f"\n{name}")
        body = [list(row.values()) for row in rows]
        print(results.table(list(rows[0]), body), flush=True)
    results.write(arguments.output, content)


def _times(shape: tuple[int, ...], varied: str, rounds: int) -> list[dict[str, Any]]:
    rows = op.measure(
        *(shape, "float32", True, "forward and backward", rounds), only=CONTESTANTS
    )
    size = shape[0] if varied == "batch" else shape[-1]
    kept = ("name", "median", "low", "high", "ratio")
    return [{varied: size} | {key: row[key] for key in kept} for row in rows]


def collectives_of(name: str, num_devices: int) -> dict[str, Any]:
    """Counts the collectives of a training step of one layer with shared moments.

    Args:
      name: a key of `libraries.JAX_LAYERS`, "bn_jax" or "flax.linen".
      num_devices: that share the moments, each with 8 examples of 256 channels.
    """
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("devices",))
    whole, split = PartitionSpec(), PartitionSpec("devices")
    layer = libraries.JAX_LAYERS[name](
        (8, 256), jnp.float32, relu=True, axis_name="devices"
    )

    def step(params: Any, x: jax.Array, dy: jax.Array) -> Any:
        y, pullback, _ = jax.vjp(layer.forward, params, x, has_aux=True)
        grads, dx = pullback(dy)
        # What every training step adds: the parameters' gradients, averaged.
        return y, dx, jax.lax.pmean(grads, "devices")

    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(whole, split, split),
        out_specs=(split, split, whole),
        check_vma=False,
    )
    x = jnp.zeros((8 * num_devices, 256))
    compiled = jax.jit(mapped).lower(layer.params, x, x).compile()
    counts, num_bytes = programs.collectives(compiled.as_text() or "")
    return {
        "devices": num_devices,
        "name": name,
        "collectives": sum(counts.values()),
        "bytes": num_bytes,
    }


def checkpoint_of(width: float) -> dict[str, Any]:
    """Saves and restores a training state of Inception."""
    model = Inception(num_classes=1000, norm=bn_jax.linen.BatchNorm, width=width)
    optimiser = make_optimiser(momentum=0.9)
    state = jax.jit(
        lambda key: steps.init_state(model, (64, 64, 3), key, 0.1, optimiser)
    )(jax.random.key(0))
    states = {"network": state}
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        checkpoints = Checkpoints(Path(folder))
        checkpoints.save(1, states)
        checkpoints.close()
        saved = time.perf_counter()
        checkpoints = Checkpoints(Path(folder))
        checkpoints.restore_newest(states)
        restored = time.perf_counter()
        checkpoints.close()
        on_disk = sum(
            path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()
        )
    return {
        "width": width,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "statistics": sum(leaf.size for leaf in jax.tree.leaves(state.batch_stats)),
        "state_megabytes": sum(a.nbytes for a in jax.tree.leaves(state)) / 1e6,
        "checkpoint_megabytes": on_disk / 1e6,
        "seconds_to_save": saved - begin,
        "seconds_to_restore": restored - saved,
    }


if __name__ == "__main__":
    given = results.parse(__doc__, "scaling")
    measuring.prepare(given.cores)
    main(given)
