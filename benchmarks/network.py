"""A training step, and inference, of whole networks of which only the norm changes.

BN-Inception and ResNet-50 as Flax modules: without normalisation, with ours, with ours
and rematerialisation (the backward pass computes all but convolutions again), and with
`flax.linen.BatchNorm`; on a GPU the same networks in torch, too, channels last. `bn
costs` is the step's time minus that of the network without normalisation. Memory is the
compiled step's, beside arguments and results. Folded inference has a benchmark of its
own, `python -m benchmarks.folding`.
"""

import argparse
import functools
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bn_jax.linen
from benchmarks import measuring, programs, results, torch_layer
from benchmarks.resnet import ResNet50
from experiments.inception.network import KEEP_CONVOLUTIONS, Inception

# Name, image size, width and batch.
SETTINGS = {
    "cpu": [("inception", 64, 0.25, 32), ("resnet50", 64, 0.5, 16)],
    "gpu": [("inception", 224, 1.0, 256), ("resnet50", 224, 1.0, 256)],
    "tiny": [("inception", 32, 1 / 16, 4), ("resnet50", 32, 1 / 16, 4)],
}
# XLA's convolutions in bfloat16 are many times slower on CPU, with any norm.
DTYPES = {"cpu": ("float32",), "tiny": ("float32",), "gpu": ("float32", "bfloat16")}
MODES = ("training", "inference")
ROUNDS = 9
BARE = "no normalisation"


class Contestant(NamedTuple):
    """A way to normalise."""

    norm: Callable[..., Any] | None
    policy: Any = None  # of jax.checkpoint


class FlaxNorm(nn.Module):
    """Flax's with the interface that the networks expect of a norm."""

    use_running_average: bool
    activation: str | None = None
    axis: Any = -1
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises, and applies ReLU if asked to."""
        y = nn.BatchNorm(
            use_running_average=self.use_running_average,
            axis=self.axis,
            dtype=self.dtype,
        )(x)
        return nn.relu(y) if self.activation == "relu" else y


def main(arguments: argparse.Namespace) -> None:
    """Measures, prints a table a network and writes the results."""
    platform = "tiny" if arguments.tiny else jax.default_backend()
    rounds = arguments.rounds or (2 if arguments.tiny else ROUNDS)
    machine = results.machine()
    rows = []
    if platform not in SETTINGS:
        platform = "gpu"
    # Any dtype may be asked for; by default those that make sense on this platform.
    dtypes = results.chosen("dtypes", arguments.dtypes, DTYPES["gpu"])
    if arguments.dtypes is None:
        dtypes = list(DTYPES[platform])
    modes = results.chosen("modes", arguments.modes, MODES)
    names = [*contestants(), *torch_layer.VARIANTS]
    only = results.chosen("only", arguments.only, names)
    settings = {setting[0]: setting for setting in SETTINGS[platform]}
    networks = results.chosen("networks", arguments.networks, list(settings))
    for network, dtype, mode in itertools.product(networks, dtypes, modes):
        setting = settings[network]
        measured = measure(*setting, dtype=dtype, mode=mode, rounds=rounds, only=only)
        _print(measured)
        rows += measured
    results.write(arguments.output, {"machine": machine, "rows": rows})


def contestants() -> dict[str, Contestant]:
    """The ways to normalise; ours is first."""
    return {
        "bn_jax": Contestant(bn_jax.linen.BatchNorm),
        "bn_jax, rematerialised": Contestant(bn_jax.linen.BatchNorm, KEEP_CONVOLUTIONS),
        "flax.linen": Contestant(FlaxNorm),
        BARE: Contestant(None),
    }


def measure(
    network: str,
    image_size: int,
    width: float,
    batch: int,
    *,
    dtype: str,
    mode: str,
    rounds: int,
    only: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Times one network with every way to normalise.

    Args:
      network: "inception" or "resnet50".
      image_size: height and width.
      width: what its channels are multiplied by.
      batch: images a step.
      dtype: of the computation.
      mode: "training" or "inference".
      rounds: timed steps of each.
      only: names of contestants; None for all.

    Returns:
      A row a contestant. `bn_costs` is None without the one that has none.
    """
    images = jax.random.normal(jax.random.key(0), (batch, image_size, image_size, 3))
    labels = jnp.arange(batch) % 10
    lowered, arguments = {}, {}
    for name, contestant in contestants().items():
        if name not in (only or contestants()):
            continue
        if mode == "inference" and contestant.policy is not None:
            continue
        model = make_network(network, contestant.norm, width, dtype)
        variables = jax.jit(functools.partial(model.init, train=True))(
            jax.random.key(0), images[:2]
        )
        if mode == "training":
            step = functools.partial(train_step, model, contestant.policy)
        else:
            step = functools.partial(_infer, model)
        arguments[name] = variables, images, labels
        lowered[name] = jax.jit(step).lower(*arguments[name])
    print(f"compiling {network} in {dtype}, {', '.join(lowered)}", flush=True)
    # That takes a minute each on a GPU, and most of it one core.
    with ThreadPoolExecutor() as pool:
        compiled = dict(zip(lowered, pool.map(_compile, lowered.values()), strict=True))
    memory = {name: programs.temporary_bytes(step) for name, step in compiled.items()}
    calls = {
        name: functools.partial(_call, step, *arguments[name])
        for name, step in compiled.items()
    }
    for name in _of_torch(mode):
        if only is None or name in only:
            calls[name], memory[name] = _torch(
                *(network, width, images, labels, dtype),
                compiled=torch_layer.VARIANTS[name],
            )
    timings = measuring.time_in_turns(calls, rounds)
    bare = timings[BARE].median if BARE in timings else None
    return [
        {
            "network": network,
            "image_size": image_size,
            "width": width,
            "batch": batch,
            "dtype": dtype,
            "mode": mode,
            "name": name,
            **timing._asdict(),
            "images_per_second": 1e3 * batch / timing.median,
            "bn_costs": None if bare is None else timing.median - bare,
            "temporary_megabytes": memory[name] / 1e6,
        }
        for name, timing in timings.items()
    ]


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    return lowered.compile()


def _of_torch(mode: str) -> Sequence[str]:
    """Names of torch's contestants: on a GPU, in training."""
    if mode != "training" or jax.default_backend() != "gpu":
        return ()
    if not importlib.util.find_spec("torch"):
        print("skipped, not installed: torch")
        return ()
    return tuple(torch_layer.VARIANTS)


def _torch(
    network: str, width: float, images: Any, labels: Any, dtype: str, compiled: bool
) -> tuple[Callable[[int], None], int]:
    """Torch's step, and its memory beside parameters and images."""
    import torch

    from benchmarks import torch_networks

    step = torch_networks.training_step(
        *(network, width, np.asarray(images), np.asarray(labels)),
        dtype=dtype,
        compiled=compiled,
    )
    step()  # tunes and compiles, in memory that a step does not need
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    memory = torch.cuda.max_memory_allocated() - before
    return functools.partial(_call_torch, step), memory


def _call_torch(step: Callable[[], None], turn: int) -> None:
    del turn
    step()
    torch_layer.wait()


def make_network(network: str, norm: Any, width: float, dtype: str) -> Any:
    """BN-Inception or ResNet-50 with 10 classes."""
    kinds = {"inception": Inception, "resnet50": ResNet50}
    return kinds[network](num_classes=10, norm=norm, width=width, dtype=dtype)


def train_step(
    model: Any, policy: Any, variables: Any, images: Any, labels: Any
) -> tuple[Any, Any]:
    """One step of plain SGD; returns new parameters and statistics."""

    def loss_of(params: Any) -> Any:
        logits, new = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), new

    if policy is not None:
        loss_of = jax.checkpoint(loss_of, policy=policy)
    grads, new = jax.grad(loss_of, has_aux=True)(variables["params"])
    params = jax.tree.map(lambda p, g: p - 1e-3 * g, variables["params"], grads)
    return params, new


def _infer(model: Any, variables: Any, images: Any, labels: Any) -> Any:
    del labels
    return model.apply(variables, images, train=False)


def _call(compiled: Any, variables: Any, images: Any, labels: Any, turn: int) -> None:
    del turn
    jax.block_until_ready(compiled(variables, images, labels))


def _print(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    print(
        f"\n{first['network']}, width {first['width']:g}, {first['batch']} images of "
        f"{first['image_size']}x{first['image_size']}, {first['dtype']}, "
        f"{first['mode']}"
    )
    columns = {
        "": "name",
        "ms": "median",
        "25%": "low",
        "75%": "high",
        "time/ours": "ratio",
        "images/s": "images_per_second",
        "bn costs, ms": "bn_costs",
        "memory, MB": "temporary_megabytes",
    }
    body = [[row[key] for key in columns.values()] for row in rows]
    print(results.table(list(columns), body), flush=True)


if __name__ == "__main__":
    given = results.parse(
        __doc__,
        "network",
        dtypes="only these, as bfloat16,float32",
        modes="only these, of training,inference",
        networks="only these, of inception,resnet50",
        only="only these contestants, as bn_jax,flax.linen",
    )
    measuring.prepare(given.cores)
    main(given)
