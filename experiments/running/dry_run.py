"""What a run would need and take, found out by a few of its steps."""

import datetime
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

WARM_UP, REPEATS = 1, 3  # calls that compile, and calls that are timed


class Measured(NamedTuple):
    """Of a run's first steps."""

    parameters: Mapping[str, int]  # of each network
    num_networks: int  # trained side by side
    memory: Any  # `memory_analysis()` of the compiled training step
    seconds_per_step: float
    num_evaluations: int  # in the whole run
    seconds_per_evaluation: float


def seconds(function: Callable[[], Any]) -> float:
    """The shortest time of a call, s, after one that compiles.

    Args:
      function: waits for its results.
    """
    times = []
    for _ in range(WARM_UP + REPEATS):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times[WARM_UP:])


def count(params: Any) -> int:
    """The number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def of_replicas(experiment: Any, num_steps: int, num_evaluations: int) -> Measured:
    """Trains and evaluates an experiment for a moment, and keeps nothing.

    Args:
      experiment: trains replicas of networks on a feed that lies on the devices, as
        `experiments.mnist.experiment.Experiment` does.
      num_steps: that are timed together, at most.
      num_evaluations: of the whole run.
    """
    states = experiment.initial_states()
    num_steps = min(num_steps, experiment.config["num_steps"])
    memory = experiment.training_memory(states, num_steps)
    indices = experiment.feed.indices(0, num_steps)
    parameters = {
        name: count(jax.tree.map(lambda leaf: leaf[0], state.params))
        for name, state in states.items()
    }

    def advance() -> None:
        nonlocal states
        states, losses = experiment.step(states, 0, indices)
        jax.block_until_ready(losses)

    return Measured(
        parameters=parameters,
        num_networks=len(experiment.replicas.seed) * len(states),
        memory=memory,
        seconds_per_step=seconds(advance) / num_steps,
        num_evaluations=num_evaluations,
        seconds_per_evaluation=seconds(lambda: experiment.accuracy(states)),
    )


def report(config: Mapping[str, Any], measured: Measured) -> str:
    """The configuration, devices, sizes, memory and time of a run, as text."""
    device, num_steps = jax.local_devices()[0], config["num_steps"]
    training = num_steps * measured.seconds_per_step
    evaluating = measured.num_evaluations * measured.seconds_per_evaluation
    memory = measured.memory
    needed = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    available = (device.memory_stats() or {}).get("bytes_limit")
    parameters = [f"{name} {size:,}" for name, size in measured.parameters.items()]
    lines = [
        "Dry run: nothing was written.",
        "",
        json.dumps(dict(config), indent=2),
        "",
        f"processes:    {jax.process_count()}",
        f"devices:      {jax.device_count()} x {device.device_kind} "
        f"({jax.default_backend()}), {config['parallelism']}, "
        f"moments={config['moments']}, "
        f"{config['batch_size'] // jax.device_count()} examples each",
        f"parameters:   {', '.join(parameters)}",
        f"networks:     {measured.num_networks}",
        f"memory:       {_bytes(needed)} a device for a training step"
        + (f", of {_bytes(available)}" if available else ""),
        f"time:         {1e3 * measured.seconds_per_step:.3g} ms a step, "
        f"{config['batch_size'] / measured.seconds_per_step:,.0f} examples/s",
        f"whole run:    {_duration(training + evaluating)}: {_duration(training)} for "
        f"{num_steps:,} steps, {_duration(evaluating)} for "
        f"{measured.num_evaluations:,} evaluations; compilation and checkpoints come "
        "on top",
    ]
    return "\n".join(lines)


def _duration(seconds_: float) -> str:
    if seconds_ < 60:
        return f"{seconds_:.1f} s"
    return str(datetime.timedelta(seconds=round(seconds_)))


def _bytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
