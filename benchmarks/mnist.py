"""Section 4.1's training on the real MNIST: ours, and loops that call once a step.

Ours runs many steps in one compiled `lax.scan` over data that lies on the device, as
`python -m experiments.mnist` does. The others call a compiled step (flax.linen and
optax) or torch's operations once a step, on batches that NumPy gathers: what their
tutorials show. All train one network with batch normalisation on the same batches.
The last row computes nothing but the products of matrices of such a step.
Timed are pieces of training in turns; `50,000 steps` is that many times a step's time.
"""

import argparse
import functools
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

from benchmarks import measuring, results

STEPS = 50_000
STEPS_A_ROUND = 500  # of each contestant; what experiments.mnist calls at a time
HIDDEN = (100, 100, 100)
BATCH, RATE, STD, EPSILON, DECAY = 60, 0.5, 0.1, 1e-3, 0.99
ROUNDS = 7


def main(arguments: argparse.Namespace) -> None:
    """Measures, prints a table and writes the results."""
    steps = 10 if arguments.tiny else STEPS_A_ROUND
    rounds = arguments.rounds or (2 if arguments.tiny else ROUNDS)
    machine = results.machine()
    from experiments.data.bundled_mnist import load_bundled_mnist

    data = load_bundled_mnist()
    images = (data.train_images.reshape(-1, 28 * 28) > 127).astype("uint8")
    labels = data.train_labels
    indices = _batches(len(images), steps)
    calls: dict[str, Callable[[int], None]] = {
        "bn_jax, scan": _ours(images, labels, indices),
        "flax, a call a step": _flax(images, labels, indices),
    }
    if importlib.util.find_spec("torch"):
        calls["torch, a call a step"] = _torch(images, labels, indices)
    else:
        print("skipped, not installed: torch")
    calls["matrix products alone, scan"] = _products(images, indices)
    timings = measuring.time_in_turns(calls, rounds)
    rows = [
        {
            "name": name,
            **timing._asdict(),
            "steps_timed_at_once": steps,
            "microseconds_a_step": 1e3 * timing.median / steps,
            "seconds_50000_steps": timing.median / steps * STEPS / 1e3,
        }
        for name, timing in timings.items()
    ]
    columns = {
        "": "name",
        "us/step": "microseconds_a_step",
        "50,000 steps, s": "seconds_50000_steps",
        "time/ours": "ratio",
    }
    body = [[row[key] for key in columns.values()] for row in rows]
    print(results.table(list(columns), body))
    results.write(arguments.output, {"machine": machine, "rows": rows})


def _batches(num_examples: int, steps: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, num_examples, (steps, BATCH), np.int32)


def _ours(images: Any, labels: Any, indices: Any) -> Callable[[int], None]:
    import jax
    import numpy as np

    from experiments.distributed import parallel
    from experiments.mnist.network import MLP
    from experiments.training import steps

    model = MLP(
        hidden=HIDDEN,
        initial_std=STD,
        decay=DECAY,
        epsilon=EPSILON,
        axis_name=parallel.DEVICE_AXIS,
    )
    models = {"batch_norm": model}
    state = jax.vmap(
        lambda seed: steps.init_state(
            *(model, (images.shape[1],), jax.random.key(seed), RATE)
        )
    )(np.arange(1))
    state = parallel.replicate({"batch_norm": state})
    data = parallel.replicate((images, labels))
    shares = parallel.shard(indices[:, None], axis=2)
    advance = parallel.map_over_devices(
        functools.partial(steps.train_steps, models, 1.0),
        in_axes=(None, None, None, 0),
        donate_argnums=(0,),
    )

    def call(turn: int) -> None:
        nonlocal state
        del turn
        state, losses = advance(state, *data, shares)
        jax.block_until_ready(losses)

    return call


def _flax(images: Any, labels: Any, indices: Any) -> Callable[[int], None]:
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            init = nn.initializers.normal(STD)
            for units in HIDDEN:
                x = nn.Dense(units, use_bias=False, kernel_init=init)(x)
                x = nn.BatchNorm(
                    use_running_average=False, momentum=DECAY, epsilon=EPSILON
                )(x)
                x = nn.sigmoid(x)
            return nn.Dense(10, kernel_init=init)(x)

    model, optimiser = Network(), optax.sgd(RATE)
    variables = model.init(jax.random.key(0), jnp.zeros((2, images.shape[1])))
    opt_state = optimiser.init(variables["params"])

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(variables: Any, opt_state: Any, x: Any, y: Any) -> Any:
        def loss_of(params: Any) -> Any:
            logits, new = model.apply(
                {**variables, "params": params}, x, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return losses.mean(), new

        grads, new = jax.grad(loss_of, has_aux=True)(variables["params"])
        updates, opt_state = optimiser.update(grads, opt_state)
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, **new}, opt_state

    def call(turn: int) -> None:
        nonlocal variables, opt_state
        del turn
        for index in indices:
            x = images[index].astype(np.float32)
            variables, opt_state = step(variables, opt_state, x, labels[index])
        jax.block_until_ready(variables)

    return call


def _torch(images: Any, labels: Any, indices: Any) -> Callable[[int], None]:
    import numpy as np
    import torch

    layers: list[Any] = []
    inputs = images.shape[1]
    for units in HIDDEN:
        layers += [
            torch.nn.Linear(inputs, units, bias=False),
            torch.nn.BatchNorm1d(units, eps=EPSILON, momentum=1 - DECAY),
            torch.nn.Sigmoid(),
        ]
        inputs = units
    model = torch.nn.Sequential(*layers, torch.nn.Linear(inputs, 10))
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=STD)
    optimiser = torch.optim.SGD(model.parameters(), RATE)

    def call(turn: int) -> None:
        del turn
        for index in indices:
            x = torch.from_numpy(images[index].astype(np.float32))
            y = torch.from_numpy(labels[index].astype(np.int64))
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimiser.step()

    return call


def _products(images: Any, indices: Any) -> Callable[[int], None]:
    """The products of matrices that a step cannot do without, on constant inputs."""
    import jax
    import jax.numpy as jnp

    sizes = (images.shape[1], *HIDDEN, 10)
    keys = jax.random.split(jax.random.key(0), len(sizes))
    kernels = [
        STD * jax.random.normal(key, pair)
        for key, pair in zip(keys, itertools.pairwise(sizes), strict=False)
    ]
    x = jnp.asarray(images[indices[0]], jnp.float32)

    def step(kernels: Any, _: Any) -> tuple[Any, None]:
        inputs = [x]
        for kernel in kernels:
            inputs.append(inputs[-1] @ kernel)
        grad, new = inputs.pop(), []
        for kernel in reversed(kernels):
            new.append(kernel - 1e-6 * (inputs.pop().T @ grad))
            # Nobody asks for the gradient of the images.
            grad = grad @ kernel.T if inputs else grad
        return new[::-1], None

    run = jax.jit(lambda kernels: jax.lax.scan(step, kernels, length=len(indices))[0])
    return lambda turn: jax.block_until_ready(run(kernels))


if __name__ == "__main__":
    given = results.parse(__doc__, "mnist")
    measuring.prepare(given.cores)
    main(given)
