import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data.file_feed import ImageBatch
from experiments.distributed import parallel
from experiments.inception import experiment as network
from experiments.inception.experiment import Experiment, learning_rates
from experiments.training.state import TrainState
from experiments.training.steps import init_state
from tests.experiments.helpers import assert_trees_identical
from tests.experiments.inception.tiny_inception import (
    NUM_CLASSES,
    tiny_config,
    tiny_experiment,
)

BATCH = 16
EPSILON = 1e-3
UNDISTORTED = {"distortions": "none"}


def make_batch(
    seed: int = 0, batch: int = BATCH, crops: int | None = None
) -> ImageBatch:
    """Random images; with crops as evaluation has them, half of the batch masked."""
    random = np.random.default_rng(seed)
    shape = (batch, *(() if crops is None else (crops,)), 32, 32, 3)
    # Bright and dark images and channels, so that networks tell them apart.
    level = random.integers(0, 200, (*shape[:-3], 1, 1, 3))
    images = (level + random.integers(0, 56, shape)).astype(np.uint8)
    labels = random.integers(0, NUM_CLASSES, batch, dtype=np.int32)
    return ImageBatch(
        images, labels, np.arange(batch) < (batch if crops is None else 9)
    )


def make_state(experiment: Experiment, seed: int = 0) -> TrainState:
    """A state with random parameters and statistics, which takes no compilation."""
    random = np.random.default_rng(seed)
    init = functools.partial(
        init_state,
        experiment.model,
        experiment.image_shape,
        optimiser=experiment._functions.optimiser,
    )
    shapes = jax.eval_shape(init, jax.random.key(0), 0.0)

    def draw(low, high, leaf):
        return random.uniform(low, high, leaf.shape).astype(leaf.dtype)

    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return parallel.replicate(
        state._replace(
            params=jax.tree.map(functools.partial(draw, -1, 1), state.params),
            batch_stats=jax.tree.map(
                functools.partial(draw, 0.2, 1), state.batch_stats
            ),
        )
    )


def on_one_device(function):
    """Calls a function, with compilations of its own, where JAX has one device."""
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[:1]
        for name in ("devices", "local_devices"):
            patch.setattr(jax, name, lambda: devices)
        for name in ("device_count", "local_device_count"):
            patch.setattr(jax, name, lambda: 1)
        compile_anew = functools.cache(network._compile.__wrapped__)
        patch.setattr(network, "_compile", compile_anew)
        return jax.device_get(function())


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol, atol),
        found,
        expected,
    )


# The tiny network in NumPy, float64.


def convolve(images, kernel):
    """3 x 3 with stride 2, of (batch, 32, 32, 3)."""
    inputs = np.pad(2 * np.float64(images) / 255 - 1, [(0, 0), (0, 1), (0, 1), (0, 0)])
    return sum(
        inputs[:, i : i + 32 : 2, j : j + 32 : 2] @ np.float64(kernel)[i, j]
        for i in range(3)
        for j in range(3)
    )


def batch_moments(images, state):
    x = convolve(images, state.params["conv1"]["conv"]["kernel"])
    return {"mean": x.mean(axis=(0, 1, 2)), "var": x.var(axis=(0, 1, 2))}


def reference_probabilities(images, state, moments):
    params = jax.tree.map(np.float64, jax.device_get(state.params))
    norm, classifier = params["conv1"]["norm"], params["classifier"]
    x = convolve(images, params["conv1"]["conv"]["kernel"])
    x = (x - moments["mean"]) / np.sqrt(moments["var"] + EPSILON)
    x = np.maximum(x * norm["scale"] + norm["bias"], 0).mean(axis=(1, 2))
    exponentials = np.exp(x @ classifier["kernel"] + classifier["bias"])
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({}, {0: 1, 99: 1, 100: 0.5, 199: 0.5, 200: 0.25, 1_000: 0.5**10}),
        ({"decay_speed": 2.0}, {49: 1, 50: 0.5, 99: 0.5, 100: 0.25}),
        ({"rate_multiple": 5.0}, {0: 5, 100: 2.5}),
        ({"decay_factor": 1.0}, {0: 1, 10_000: 1}),
        # The first rates that rounding could move by a step.
        ({"steps_per_decay": 103, "decay_speed": 6.0}, {515: 0.5**30, 514: 0.5**29}),
        ({"steps_per_decay": 7, "decay_speed": 3.0}, {35: 0.5**15, 34: 0.5**14}),
    ],
)
def test_the_rate_is_a_staircase(changes, rates):
    config = {
        "learning_rate": 1.0,
        "rate_multiple": 1.0,
        "decay_factor": 0.5,
        "steps_per_decay": 100,
        "decay_speed": 1.0,
        "schedule": "staircase",
        "warmup_steps": 0,
        "num_steps": 10_000,
    }
    found = learning_rates(config | changes, np.array(list(rates)))
    assert found.tolist() == list(rates.values())


def test_equal_configurations_share_what_is_compiled():
    one = tiny_experiment(tiny_config())
    assert tiny_experiment(tiny_config(seed=5))._functions is one._functions
    assert tiny_experiment(tiny_config(momentum=0.5))._functions is not one._functions


def test_the_initial_state_depends_on_the_seed():
    states = [
        tiny_experiment(tiny_config(seed=seed)).initial_state() for seed in (0, 0, 1)
    ]
    assert_trees_identical(states[0], states[1])
    for leaf in jax.tree.leaves(states[0]):
        assert leaf.sharding.is_fully_replicated
        assert leaf.devices() == set(jax.local_devices())
    kernels = [state.params["conv1"]["conv"]["kernel"] for state in states]
    assert (kernels[0] != kernels[2]).all()
    assert states[0].step == 0


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("bn_x5", {}),
        ("bn_x5", {"activation": "sigmoid", "rematerialise": True}),
        ("bn_x5", {"auxiliary_head": True, "momentum": 0.5, "l2_weight": 0.0}),
        ("inception", {"dropout_rate": 0.0}),
    ],
)
def test_train_step_is_sgd_with_momentum_and_l2_by_hand(variant, changes):
    config = tiny_config(
        variant,
        **UNDISTORTED
        | {"l2_weight": 0.5, "learning_rate": 0.1, "steps_per_decay": 1}
        | {"decay_factor": 0.5, "decay_speed": 1.0}
        | changes,
    )
    experiment = tiny_experiment(config)
    state = make_state(experiment)
    model = experiment.model
    if model.norm is not None:
        model = model.clone(norm=functools.partial(model.norm, axis_name=None))
    expected = jax.device_get(state)

    def loss_of(params, batch):
        inputs = 2 * batch.images.astype(np.float32) / 255 - 1
        logits, updated = model.apply(
            {"params": params, "batch_stats": expected.batch_stats},
            inputs,
            train=True,
            mutable=["batch_stats"],
        )
        heads = logits if config["auxiliary_head"] else (logits,)
        losses = [
            -jnp.mean(jax.nn.log_softmax(head)[np.arange(BATCH), batch.labels])
            for head in heads
        ]
        total = sum(w * loss for w, loss in zip((1, 0.3), losses, strict=False))
        return total, updated.get("batch_stats", {})

    trace = jax.tree.map(np.zeros_like, expected.params)
    l2_weight = config["l2_weight"] * config["l2_multiple"]
    for step in range(3):
        batch = make_batch(step)
        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(
            expected.params, batch
        )
        grads = jax.tree_util.tree_map_with_path(
            lambda path, g, w: g + l2_weight * w if path[-1].key == "kernel" else g,
            grads,
            expected.params,
        )
        trace = jax.tree.map(lambda t, g: config["momentum"] * t + g, trace, grads)
        rate = 0.1 * config["rate_multiple"] * 0.5**step
        moves = jax.tree.map(functools.partial(np.multiply, -rate), trace)
        expected = expected._replace(
            params=jax.tree.map(np.add, expected.params, moves),
            batch_stats=stats,
        )
        state, found = experiment.train_step(state, step, batch)
        assert float(found) == pytest.approx(float(loss), rel=1e-5)
    assert state.step == 3
    assert_close(state.params, expected.params, atol=1e-5)
    assert_close(state.batch_stats, expected.batch_stats)


def three_steps(config):
    experiment = tiny_experiment(config)
    state = make_state(experiment)
    losses = []
    for step in range(3):
        state, loss = experiment.train_step(state, step, make_batch(step))
        losses.append(loss)
    batches = [make_batch(step) for step in (7, 8)]
    statistics = experiment.population_statistics(state, 3, batches)
    tests = [make_batch(9, crops=2)]
    scores = [
        experiment.evaluate(state, tests, by_test_batch=by_test_batch)
        for by_test_batch in (False, True)
    ]
    return state, losses, statistics, scores


def test_eight_devices_are_one_with_the_whole_batch():
    """Also where every image has its own distortion."""
    config = tiny_config("bn_x5", distortions="strong")
    one = on_one_device(lambda: three_steps(config))
    assert_close(jax.device_get(three_steps(config)), one, rtol=1e-4, atol=1e-5)


def test_every_image_of_a_step_is_distorted_on_its_own():
    """A uniform image stays uniform; in equal ones all variance is at their borders."""
    batch = make_batch()

    def ratio(value, strength):
        images = np.full_like(batch.images, value)
        experiment = tiny_experiment(tiny_config("bn_x5", distortions=strength))
        moments = experiment.population_statistics(
            make_state(experiment), 0, [batch._replace(images=images)]
        )["conv1"]["norm"]
        return moments["var"] / moments["mean"] ** 2

    border = ratio(240, "none")
    assert (ratio(128, "strong") > 3 * border + 0.1).all()


def test_distortions_depend_on_the_step_and_the_seed():
    def moments(step, **changes):
        experiment = tiny_experiment(
            tiny_config("bn_x5", distortions="strong", **changes)
        )
        statistics = experiment.population_statistics(
            make_state(experiment), step, [make_batch()]
        )
        return np.asarray(statistics["conv1"]["norm"]["mean"])

    np.testing.assert_array_equal(moments(5), moments(5))
    assert (moments(5) != moments(6)).any()
    assert (moments(5) != moments(5, seed=1)).any()


def test_dropout_is_for_training_and_differs_between_devices():
    config = tiny_config(
        "inception", **UNDISTORTED, dropout_rate=0.5, l2_weight=0.0, momentum=0.0
    )
    experiment = tiny_experiment(config)
    # One example a device, and all of them the same.
    batch = ImageBatch(*(array[:1].repeat(8, axis=0) for array in make_batch()))
    before = jax.device_get(make_state(experiment)).params["classifier"]["kernel"]

    def classifier(step):
        state, _ = experiment.train_step(make_state(experiment), step, batch)
        return np.asarray(state.params["classifier"]["kernel"])

    found = [classifier(step) for step in range(8)]
    np.testing.assert_array_equal(classifier(0), found[0])
    assert len({kernel.tobytes() for kernel in found}) == 8
    # A feature that all devices drop leaves its weights as they are: of those that are
    # not zero anyway, one in 2^8 if devices draw for themselves, else every second.
    moved = np.array([(kernel != before).any(axis=1) for kernel in found])
    alive = moved.any(axis=0)
    assert alive.sum() >= 2
    assert moved[:, alive].mean() > 0.9
    tests = [make_batch(crops=1)]
    without = tiny_experiment(config | {"dropout_rate": 0.0})
    assert experiment.evaluate(make_state(experiment), tests) == without.evaluate(
        make_state(without), tests
    )


def test_bfloat16_is_close_to_float32():
    losses = {}
    for dtype in "float32", "bfloat16":
        experiment = tiny_experiment(tiny_config("bn_x5", **UNDISTORTED, dtype=dtype))
        state = make_state(experiment)
        state, loss = experiment.train_step(state, 0, make_batch())
        losses[dtype] = float(loss)
        leaves = jax.tree.leaves((state.params, state.batch_stats))
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["bfloat16"] != losses["float32"]


def test_population_statistics_are_averages_of_batch_moments():
    """Algorithm 2, the variances unbiased."""
    experiment = tiny_experiment(tiny_config("bn_x5", **UNDISTORTED))
    state = make_state(experiment)
    batches = [make_batch(seed) for seed in range(3)]
    found = experiment.population_statistics(state, 0, iter(batches))
    moments = [batch_moments(batch.images, state) for batch in batches]
    m = BATCH * 16 * 16
    expected = {
        "mean": np.mean([moment["mean"] for moment in moments], axis=0),
        "var": np.mean([moment["var"] for moment in moments], axis=0) * m / (m - 1),
    }
    assert found.keys() == {"conv1"}
    assert_close(found["conv1"]["norm"], expected)


@pytest.mark.parametrize("crops", [1, 3])
def test_probabilities_are_means_over_crops(crops):
    experiment = tiny_experiment(tiny_config("bn_x5"))
    state = make_state(experiment)
    batches = [make_batch(seed, crops=crops) for seed in range(2)]
    moments = jax.device_get(state.batch_stats["conv1"]["norm"])
    for batch in batches:
        found = experiment.probabilities(state, batch.images)
        assert isinstance(found, np.ndarray)
        assert found.shape == (BATCH, NUM_CLASSES)
        each = [
            reference_probabilities(batch.images[:, crop], state, moments)
            for crop in range(crops)
        ]
        np.testing.assert_allclose(found, np.mean(each, axis=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("by_test_batch", [False, True])
def test_evaluation_counts_what_is_not_masked(by_test_batch):
    experiment = tiny_experiment(tiny_config("bn_x5"))
    state = make_state(experiment)
    batches = [make_batch(seed, crops=2) for seed in range(3)]
    expected = np.zeros(4)
    for batch in batches:
        moments = jax.device_get(state.batch_stats["conv1"]["norm"])
        if by_test_batch:
            # Of all crops, padding among them.
            images = batch.images.reshape(-1, 32, 32, 3)
            moments = batch_moments(images, state)
        each = [
            reference_probabilities(batch.images[:, crop], state, moments)
            for crop in range(2)
        ]
        found = np.mean(each, axis=0)
        for row, label in zip(found[batch.mask], batch.labels[batch.mask], strict=True):
            rank = (row > row[label]).sum()
            expected += [rank < 1, rank < 5, -np.log(row[label]), 1]
    scores = experiment.evaluate(state, iter(batches), by_test_batch=by_test_batch)
    assert scores.count == 27
    assert 0 < scores.top1 < scores.top5 < 27
    np.testing.assert_allclose(scores, expected, rtol=1e-4)


def test_batches_that_do_not_divide_are_an_error():
    experiment = tiny_experiment(tiny_config())
    with pytest.raises(ValueError, match=re.escape("reshape")):
        experiment.train_step(make_state(experiment), 0, make_batch(batch=12))
