import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.distributed import parallel
from experiments.mnist.network import MLP
from experiments.training.optimisers import make_optimiser, with_learning_rate
from experiments.training.steps import (
    AUXILIARY_WEIGHT,
    TrainState,
    cross_entropy,
    init_state,
    take_batch,
    train_steps,
)
from tests.experiments.helpers import (
    assert_trees_identical,
    make_image_set,
    make_models,
    make_states,
)

BATCH = 16
DATA = make_image_set(num_train=64, num_test=1)
IMAGES = DATA.train_images.reshape(64, 20)
MODELS = make_models()
SCALE = 1 / 255
RANDOM = np.random.default_rng(1)
INDICES = RANDOM.integers(0, 64, (10, 2, BATCH), dtype=np.int32)


@functools.cache
def mapped_steps():
    function = functools.partial(train_steps, MODELS, SCALE)
    return parallel.map_over_devices(function, in_axes=(None, None, None, 0))


def train(states, indices):
    shards = parallel.shard(indices, axis=2)
    data = parallel.replicate((IMAGES, DATA.train_labels))
    return mapped_steps()(states, *data, shards)


def train_on_one_device(states, indices):
    """The same function where the device axis has one device with all the batch."""
    function = functools.partial(train_steps, MODELS, SCALE)
    mapped = jax.vmap(
        function, (None, None, None, 0), axis_name=parallel.DEVICE_AXIS, out_axes=0
    )
    first = jax.device_put(states, jax.devices()[0])
    results = jax.jit(mapped)(first, IMAGES, DATA.train_labels, indices[None])
    return jax.tree.map(lambda leaf: leaf[0], results)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference_step(model: MLP, state: TrainState, index: np.ndarray, rate: float):
    """Section 4.1's network and section 3's gradients, by hand, in float64."""
    params, stats = jax.tree.map(
        lambda leaf: np.array(leaf, np.float64), (state.params, state.batch_stats)
    )
    x, labels = IMAGES[index] * SCALE, DATA.train_labels[index]
    m, tape = len(index), []
    for layer in range(len(model.hidden)):
        dense = params[f"Dense_{layer}"]
        u, z = x, x @ dense["kernel"] + dense.get("bias", 0)
        kept = ()
        if model.batch_norm:
            norm, old = params[f"BatchNorm_{layer}"], stats[f"BatchNorm_{layer}"]
            mean, var = z.mean(axis=0), z.var(axis=0)
            old["mean"] = model.decay * old["mean"] + (1 - model.decay) * mean
            unbiased = var * m / (m - 1)
            old["var"] = model.decay * old["var"] + (1 - model.decay) * unbiased
            kept = (z - mean, np.sqrt(var + model.epsilon))
            z = kept[0] / kept[1] * norm["scale"] + norm["bias"]
        x = sigmoid(z)
        tape.append((u, kept, x))
    last = params[f"Dense_{len(model.hidden)}"]
    logits = x @ last["kernel"] + last["bias"]
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    softmax = exponentials / exponentials.sum(axis=1, keepdims=True)
    loss = -np.log(softmax[np.arange(m), labels]).mean()

    def descend(parameters, name, gradient):
        parameters[name] -= rate * gradient

    grad = (softmax - np.eye(model.num_classes)[labels]) / m
    grad_x = grad @ last["kernel"].T
    descend(last, "kernel", x.T @ grad)
    descend(last, "bias", grad.sum(axis=0))
    for layer in reversed(range(len(model.hidden))):
        u, kept, activation = tape[layer]
        dense = params[f"Dense_{layer}"]
        grad = grad_x * activation * (1 - activation)
        if model.batch_norm:
            norm, (centred, std) = params[f"BatchNorm_{layer}"], kept
            normalised_grad = grad * norm["scale"]
            grad_var = (normalised_grad * centred).sum(axis=0) * -0.5 / std**3
            grad_mean = -(normalised_grad / std).sum(axis=0)
            descend(norm, "scale", (grad * centred / std).sum(axis=0))
            descend(norm, "bias", grad.sum(axis=0))
            grad = normalised_grad / std + grad_var * 2 * centred / m + grad_mean / m
        else:
            descend(dense, "bias", grad.sum(axis=0))
        grad_x = grad @ dense["kernel"].T
        descend(dense, "kernel", u.T @ grad)
    return params, stats, loss


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol, atol),
        found,
        expected,
    )


@pytest.fixture(scope="module")
def states():
    return make_states(MODELS, 20, rates=(0.5, 3.0))


@pytest.fixture(scope="module")
def ten_steps(states):
    return train(states, INDICES)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("replica", [0, 1])
def test_a_step_is_the_one_by_hand(states, name, replica):
    new, losses = train(states, INDICES[:1])
    alone, found = jax.tree.map(lambda leaf: leaf[replica], (states[name], new[name]))
    rate = (0.5, 3.0)[replica]
    params, stats, loss = reference_step(MODELS[name], alone, INDICES[0, replica], rate)
    assert_close(found.params, params)
    assert_close(found.batch_stats, stats)
    assert losses[name][0, replica] == pytest.approx(loss, rel=1e-6)
    assert found.step == 1
    # In deep sigmoid networks the first layer's steps are too small for the above.
    moves, expected = (
        jax.tree.map(lambda new, old: np.float64(new) - old, tree, alone.params)
        for tree in (found.params, params)
    )
    assert_close(moves, expected, rtol=2e-3, atol=3e-8)
    assert all(np.abs(move).max() > 3e-6 for move in jax.tree.leaves(moves))


def test_eight_devices_are_one_with_the_whole_batch(states, ten_steps):
    assert_close(ten_steps, train_on_one_device(states, INDICES), rtol=1e-4, atol=1e-5)


def test_losses_are_those_of_each_step(states, ten_steps):
    each = []
    for index in INDICES:
        states, losses = train(states, index[None])
        each.append(losses)
    for name in MODELS:
        one_by_one = np.concatenate([losses[name] for losses in each])
        np.testing.assert_array_equal(ten_steps[1][name], one_by_one)


@pytest.mark.parametrize("chunks", [[3, 7], [7, 3], [1] * 10, [5, 4, 1]])
def test_chunks_give_the_same_bits(states, ten_steps, chunks):
    for indices in np.split(INDICES, np.cumsum(chunks)[:-1]):
        states, _ = train(states, indices)
    assert_trees_identical(states, ten_steps[0])


def test_results_are_arguments_of_the_next_call(ten_steps):
    for leaf in jax.tree.leaves(ten_steps[0]):
        assert leaf.sharding.is_fully_replicated
        assert leaf.devices() == set(jax.local_devices())


def test_state_after_ten_steps(ten_steps):
    for name in MODELS:
        state = ten_steps[0][name]
        assert state.step.tolist() == [10, 10]
        assert state.step.dtype == jnp.int32
        rates = state.opt_state.hyperparams["learning_rate"]
        assert rates.tolist() == [0.5, 3.0]


def test_replicas_are_independent(states, ten_steps):
    swapped = jax.tree.map(lambda leaf: leaf[::-1], states)
    crossed, _ = train(parallel.replicate(swapped), INDICES[:, ::-1])
    assert_trees_identical(crossed, jax.tree.map(lambda leaf: leaf[::-1], ten_steps[0]))
    poisoned = jax.tree.map(
        lambda leaf: leaf.at[1].set(jnp.nan) if leaf.dtype == jnp.float32 else leaf,
        states,
    )
    found, _ = train(poisoned, INDICES)
    assert_trees_identical(
        *(jax.tree.map(lambda leaf: leaf[0], tree) for tree in (found, ten_steps[0]))
    )


def test_rate_scales_the_step(states):
    hyperparams = states["baseline"].opt_state.hyperparams
    moves = {}
    for rate in 0.25, 0.5:
        rates = {"learning_rate": jnp.full_like(hyperparams["learning_rate"], rate)}
        changed = {
            name: state._replace(opt_state=state.opt_state._replace(hyperparams=rates))
            for name, state in states.items()
        }
        new, _ = train(parallel.replicate(changed), INDICES[:1])
        moves[rate] = jax.tree.map(
            jnp.subtract, *({n: s[n].params for n in s} for s in (new, states))
        )
    doubled = jax.tree.map(lambda leaf: 2 * leaf, moves[0.25])
    assert_close(doubled, moves[0.5], rtol=1e-3, atol=1e-6)


def test_initial_state():
    model = MLP(hidden=(5,), num_classes=3)
    state = init_state(model, (7,), jax.random.key(3), 0.25)
    variables = model.init(jax.random.key(3), jnp.zeros((1, 7)), train=True)
    assert_trees_identical(state.params, variables["params"])
    assert_trees_identical(state.batch_stats, variables["batch_stats"])
    assert state.step == 0
    rate = state.opt_state.hyperparams["learning_rate"]
    assert rate == 0.25
    assert rate.dtype == jnp.float32
    assert init_state(MODELS["baseline"], (7,), jax.random.key(3), 1).batch_stats == {}


def test_initial_deviation_may_be_traced():
    model = MLP(hidden=(50, 50))

    def init(std):
        variables = model.clone(initial_std=std).init(
            jax.random.key(0), jnp.zeros((1, 40)), train=True
        )
        return variables["params"]["Dense_1"]["kernel"]

    small, large = jax.jit(jax.vmap(init))(np.array([0.01, 1.0], np.float32))
    np.testing.assert_allclose(100 * small, large, rtol=1e-5)


def test_take_batch():
    batch = take_batch(jnp.asarray(IMAGES), DATA.train_labels, INDICES[0], SCALE)
    assert batch.inputs.shape == (2, BATCH, 20)
    assert batch.inputs.dtype == jnp.float32
    assert batch.labels.shape == (2, BATCH)
    expected = IMAGES[INDICES[0]].astype(np.float32) / 255
    np.testing.assert_allclose(batch.inputs, expected, rtol=1e-6)
    np.testing.assert_array_equal(batch.labels, DATA.train_labels[INDICES[0]])


def parameters_and_gradients():
    """Every kind of parameter of a convolutional network, and three gradients."""
    random = np.random.default_rng(0)
    shapes = {
        "conv1": {
            "conv": {
                "depthwise_kernel": (3, 3, 1, 2),
                "pointwise_kernel": (1, 1, 2, 4),
            },
            "norm": {"scale": (4,), "bias": (4,)},
        },
        "row": {"conv": {"kernel": (1, 1, 4, 3), "bias": (3,)}},
        "classifier": {"kernel": (3, 2), "bias": (2,)},
    }

    def draw():
        return jax.tree.map(
            lambda shape: random.standard_normal(shape).astype(np.float32),
            shapes,
            is_leaf=lambda leaf: isinstance(leaf, tuple),
        )

    return draw(), [draw() for _ in range(3)]


def descend(optimiser, params, gradients, rates):
    state = optimiser.init(params)
    for gradient, rate in zip(gradients, rates, strict=True):
        state = with_learning_rate(state, rate)
        updates, state = optimiser.update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params


@pytest.mark.parametrize("momentum", [None, 0.0, 0.9])
@pytest.mark.parametrize("l2_weight", [0.0, 0.3])
def test_momentum_and_l2_by_hand(momentum, l2_weight):
    params, gradients = parameters_and_gradients()
    rates = [0.5, 0.5, 0.1]
    found = descend(
        make_optimiser(l2_weight=l2_weight, momentum=momentum), params, gradients, rates
    )
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    expected = []
    for number, (path, weights) in enumerate(paths):
        weights, trace = np.float64(weights), 0.0
        penalised = path[-1].key in ("kernel", "depthwise_kernel", "pointwise_kernel")
        for gradient, rate in zip(gradients, rates, strict=True):
            # The gradient of l2_weight / 2 * |w|^2.
            step = jax.tree.leaves(gradient)[number] + penalised * l2_weight * weights
            trace = (momentum or 0.0) * trace + step
            weights = weights - rate * trace
        expected.append(weights)
    assert_close(found, structure.unflatten(expected))


def test_l2_leaves_biases_and_normalisation_alone():
    params, _ = parameters_and_gradients()
    nothing = jax.tree.map(np.zeros_like, params)
    found = descend(
        make_optimiser(l2_weight=0.5, momentum=0.9), params, [nothing], [1.0]
    )
    for part, name in (("conv1", "norm"), ("row", "conv")):
        for key in params[part][name].keys() & {"scale", "bias"}:
            np.testing.assert_array_equal(
                found[part][name][key], params[part][name][key]
            )
    kernel = params["row"]["conv"]["kernel"]
    np.testing.assert_allclose(found["row"]["conv"]["kernel"], kernel / 2, rtol=1e-6)


def test_plain_sgd_keeps_no_trace():
    params, _ = parameters_and_gradients()
    size = sum(leaf.size for leaf in jax.tree.leaves(params))

    def kept(optimiser):
        return sum(jnp.size(leaf) for leaf in jax.tree.leaves(optimiser.init(params)))

    assert kept(make_optimiser()) < size
    assert size <= kept(make_optimiser(l2_weight=0.1, momentum=0.9)) < 2 * size


def test_the_rate_of_a_state_may_be_traced():
    params, (gradient, *_) = parameters_and_gradients()
    optimiser = make_optimiser(l2_weight=0.1, momentum=0.9)
    state = optimiser.init(params)
    changed = jax.jit(with_learning_rate)(state, 0.25)
    rate = changed.hyperparams["learning_rate"]
    assert rate == 0.25
    assert rate.dtype == jnp.float32
    assert_trees_identical(
        with_learning_rate(changed, 0.0), with_learning_rate(state, 0.0)
    )
    assert jax.tree.structure(changed) == jax.tree.structure(state)
    quarter, _ = optimiser.update(gradient, changed, params)
    whole, _ = optimiser.update(gradient, with_learning_rate(state, 1.0), params)
    assert_trees_identical(jax.tree.map(lambda leaf: 4 * leaf, quarter), whole)


def test_cross_entropy_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])) + 7
    labels = jnp.array([0, 1])
    expected = (np.log(2) + np.log(10)) / 2
    assert cross_entropy(logits, labels) == pytest.approx(expected, rel=1e-6)
    chance = jnp.zeros((2, 3))
    both = cross_entropy((logits, chance), labels)
    assert both == pytest.approx(expected + 0.3 * np.log(3), rel=1e-6)
    assert AUXILIARY_WEIGHT == 0.3
