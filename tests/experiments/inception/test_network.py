import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax.linen
from experiments.inception.description import describe
from experiments.inception.initialisation import Initialisation
from experiments.inception.layers import (
    SeparableConv,
    drawn_as_matrix,
    local_response_norm,
    pool3x3,
)
from experiments.inception.network import (
    KEEP_CONVOLUTIONS,
    Inception,
    stem_strides,
    table_rows,
)
from experiments.inception.table import TABLE

NORM = functools.partial(bn_jax.linen.BatchNorm, epsilon=1e-3)
NORM_WITHOUT_SCALE = functools.partial(NORM, use_scale=False)
IMAGES = (224, 224, 3)
SMALL = {"num_classes": 5, "width": 1 / 8, "norm": NORM}


def small_images(batch=4):
    return jax.random.normal(jax.random.key(1), (batch, 32, 32, 3))


def shapes(model, images):
    initialise = functools.partial(model.init, train=False)
    return jax.eval_shape(initialise, {"params": jax.random.key(0)}, images)


def shapes_of(layer, x):
    return jax.eval_shape(layer.init, jax.random.key(0), x)["params"]


def init(model, images):
    """Positive random variables of about unit gain, without compiling initialisers."""
    random = np.random.default_rng(0)

    def make(leaf):
        fan_in = max(1, np.prod(leaf.shape[:-1]))
        values = random.uniform(0.1, 1.9, leaf.shape) / np.sqrt(fan_in)
        signs = random.choice([-1, 1], leaf.shape) if leaf.ndim > 1 else 1
        return jnp.asarray(values * signs, leaf.dtype)

    return jax.tree.map(make, shapes(model, images))


@pytest.mark.parametrize("shape", [(3, 3, 4, 6), (7, 1, 3, 5), (1, 1, 40, 8)])
@pytest.mark.parametrize(
    "initialise",
    [
        *(Initialisation(kind=kind).weights("conv2") for kind in ("googlenet", "he")),
        nn.initializers.lecun_normal(),
    ],
)
def test_kernels_drawn_as_matrices_are_the_same(initialise, shape):
    key = jax.random.key(3)
    drawn = jax.jit(drawn_as_matrix(initialise), static_argnums=1)(key, shape)
    np.testing.assert_array_equal(
        drawn, jax.jit(initialise, static_argnums=1)(key, shape)
    )


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({"norm": NORM}, 11_188_288),
        ({"norm": NORM, "pool_projection": 128}, 11_278_528),
        # The paper's 13.6 million.
        ({"norm": NORM_WITHOUT_SCALE, "auxiliary_head": True}, 13_594_824),
        # Biases of convolutions take the place of batch normalisation's.
        ({"norm": NORM_WITHOUT_SCALE}, 11_178_336),
        ({}, 11_178_336),
    ],
)
def test_parameters(options, parameters):
    layers = describe(Inception(**options), IMAGES)
    assert sum(layer.parameters for layer in layers) == parameters


@pytest.mark.parametrize(
    ("options", "multiply_adds"),
    [
        ({}, 1_934_857_216),
        ({"pool_projection": 128}, 1_948_605_440),
        ({"separable_stem": False, "pool_projection": 128}, 2_032_600_064),
    ],
)
def test_multiply_adds(options, multiply_adds):
    layers = describe(Inception(norm=NORM, **options), IMAGES)
    assert sum(layer.multiply_adds for layer in layers) == multiply_adds


def test_multiply_adds_of_layers_counted_by_hand():
    layers = {layer.name: layer for layer in describe(Inception(), IMAGES)}
    assert layers["conv2"].multiply_adds == 56 * 56 * 3 * 3 * 64 * 192
    assert layers["classifier"].multiply_adds == 1024 * 1000
    depthwise, pointwise = 7 * 7 * 3 * 8, 24 * 64
    assert layers["conv1"].multiply_adds == 112 * 112 * (depthwise + pointwise)
    assert layers["conv1"].parameters == depthwise + pointwise + 64


@pytest.mark.parametrize(
    ("reading", "wide", "after"), [(96, 576, 1024), (128, 608, 1056)]
)
def test_output_of_each_row_is_the_papers(reading, wide, after):
    layers = describe(Inception(pool_projection=reading), IMAGES)
    assert [(layer.name, layer.output_shape) for layer in layers] == [
        ("conv1", (112, 112, 64)),
        ("conv2_reduce", (56, 56, 64)),
        ("conv2", (56, 56, 192)),
        ("row_3a", (28, 28, 256)),
        ("row_3b", (28, 28, 320)),
        ("row_3c", (14, 14, 576)),
        ("row_4a", (14, 14, 576)),
        ("row_4b", (14, 14, 576)),
        ("row_4c", (14, 14, wide)),
        ("row_4d", (14, 14, wide)),
        ("row_4e", (7, 7, after)),
        ("row_5a", (7, 7, 1024)),
        ("row_5b", (7, 7, 1024)),
        ("classifier", (1000,)),
    ]


@pytest.mark.parametrize(("size", "map_size"), [(224, 7), (112, 4), (64, 4), (32, 4)])
def test_last_map_of_small_images(size, map_size):
    layers = describe(Inception(), (size, size, 3))
    assert layers[-2].output_shape == (map_size, map_size, 1024)


def test_weight_layers():
    layers = describe(Inception(norm=NORM), IMAGES)
    # Seven a row, five in those without a 1x1 branch and projection; a separable
    # convolution is two.
    assert [layer.weight_layers for layer in layers] == (
        [2, 1, 1] + [5 if row.stride == 2 else 7 for row in TABLE] + [1]
    )
    assert sum(layer.weight_layers for layer in layers) == 71


def test_width_multiplies_channels():
    rows = table_rows(0.25, 128)
    assert rows[0] == TABLE[0]._replace(
        conv1x1=16,
        reduce3x3=16,
        conv3x3=16,
        reduce_double3x3=16,
        double3x3=24,
        pool_projection=8,
    )
    assert {row.pool_projection for row in rows if row.name in ("4c", "4d")} == {32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool_projection": 64}, r"pool_projection=64: .* \(96, 128\)"),
        ({"width": 0.01}, "width=0.01 leaves no channels"),
    ],
)
def test_tables_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        describe(Inception(**options), IMAGES)


@pytest.mark.parametrize(
    ("size", "strides"),
    {
        224: (2, 2, 2),
        112: (2, 2, 2),
        111: (2, 2, 1),
        64: (2, 2, 1),
        56: (2, 2, 1),
        55: (1, 2, 1),
        32: (1, 2, 1),
    }.items(),
)
def test_stem_keeps_a_map_for_the_rows(size, strides):
    assert stem_strides(size) == strides
    first_row = size / np.prod(strides)
    assert 13 < first_row <= 28


def test_where_batch_normalisation_sits():
    variables = shapes(Inception(**SMALL), small_images())
    paths = jax.tree_util.tree_flatten_with_path(variables["params"])[0]
    names = {tuple(key.key for key in path) for path, _ in paths}
    convolutions = {path[:-2] for path in names if path[-2] == "conv"}
    assert len(convolutions) == 69
    for path in convolutions:
        assert (*path, "conv", "bias") not in names
        assert (*path, "norm", "scale") in names
    without = shapes(Inception(**SMALL | {"norm": None}), small_images())
    assert without.keys() == {"params"}


def test_per_activation_rows_have_a_scale_per_activation():
    model = Inception(**SMALL, per_activation_rows=("5a", "5b"))
    params = shapes(model, small_images())["params"]
    assert params["row_5a"]["conv1x1"]["norm"]["scale"].shape == (4, 4, 44)
    assert params["row_4d"]["conv1x1"]["norm"]["scale"].shape == (12,)


def test_bfloat16_computes_in_it_and_stores_float32():
    model = Inception(**SMALL, dtype=jnp.bfloat16)
    images = small_images()

    def run():
        variables = init(model, images)
        return variables, model.apply(
            variables,
            images,
            train=True,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=True,
        )

    variables, (logits, updated) = jax.eval_shape(run)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert logits.dtype == jnp.float32
    (block,) = updated["intermediates"]["row_4a"]["__call__"]
    assert block.dtype == jnp.bfloat16
    statistics = jax.tree.leaves(updated["batch_stats"])
    assert {leaf.dtype for leaf in statistics} == {jnp.dtype("float32")}


def test_dropout_and_auxiliary_head_are_for_training():
    model = Inception(**SMALL, dropout_rate=0.4, auxiliary_head=True)
    images = small_images()

    def run(train):
        variables = init(model, images)
        return model.apply(
            variables,
            images,
            train=train,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(2)} if train else None,
        )[0]

    logits, auxiliary = jax.eval_shape(functools.partial(run, True))
    assert logits.shape == auxiliary.shape == (4, 5)
    assert jax.eval_shape(functools.partial(run, False)).shape == (4, 5)


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
def test_activations_bound_what_the_rows_put_out(activation):
    model = Inception(**SMALL, activation=activation)
    images = small_images()
    variables = init(model, images)
    _, updated = jax.jit(
        functools.partial(
            model.apply,
            train=True,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda module, _: module.name == "row_5b",
        )
    )(variables, images)
    (values,) = updated["intermediates"]["row_5b"]["__call__"]
    low, high = {"relu": (0, np.inf), "sigmoid": (0, 1), "tanh": (-1, 1)}[activation]
    assert low <= values.min() < values.max() <= high
    assert (values.min() < 0) == (activation == "tanh")


@pytest.mark.slow
def test_rematerialisation_changes_memory_and_nothing_else():
    images = small_images()
    labels = jnp.arange(4)
    variables = init(Inception(**SMALL), images)

    model = Inception(**SMALL)

    def loss(params):
        logits, updated = model.apply(
            variables | {"params": params}, images, train=True, mutable=["batch_stats"]
        )
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
        return -jnp.mean(chosen), updated

    def value_and_kept(loss):
        params = variables["params"]
        results = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        kept = jax.eval_shape(lambda p: jax.vjp(loss, p, has_aux=True)[1], params)
        per_image = [a.size for a in jax.tree.leaves(kept) if a.shape[:1] == (4,)]
        return results, sum(per_image)

    plain, kept_plain = value_and_kept(loss)
    again, kept_again = value_and_kept(jax.checkpoint(loss, policy=KEEP_CONVOLUTIONS))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-5),
        again,
        plain,
    )
    assert kept_again < 0.5 * kept_plain


def test_local_response_norm_by_hand():
    x = jnp.arange(1.0, 8.0).reshape(1, 1, 1, 7) * 100
    square = np.arange(1.0, 8.0) ** 2 * 1e4
    windows = [square[max(0, i - 2) : i + 3].sum() for i in range(7)]
    expected = np.arange(1.0, 8.0) * 100 / (1 + 2e-5 * np.array(windows)) ** 0.75
    np.testing.assert_allclose(local_response_norm(x)[0, 0, 0], expected, rtol=1e-6)


def test_gradient_of_local_response_norm_by_hand():
    random = np.random.default_rng(0)
    # Large enough that the denominators differ.
    x, grad = (
        random.standard_normal((2, 2, 3, 3, 9)) * np.array([[300], [1]])[:, None, None]
    )
    near = np.abs(np.subtract.outer(range(9), range(9))) <= 2
    base = 1 + 2e-5 * np.square(x) @ near
    shared = (grad * x * base**-1.75) @ near
    expected = grad * base**-0.75 - 1.5 * 2e-5 * x * shared
    assert base.max() > 5

    def weighted(x):
        return jnp.sum(local_response_norm(x) * grad.astype(np.float32))

    for gradient in (jax.grad(weighted), jax.jit(jax.grad(weighted))):
        found = gradient(jnp.float32(x))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize("use_bias", [False, True])
def test_separable_convolution_is_a_depthwise_and_a_1x1_one(strides, use_bias):
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 9, 8, 3)).astype(np.float32)
    layer = SeparableConv(5, (7, 3), strides, use_bias=use_bias)
    params = jax.tree.map(
        lambda leaf: random.standard_normal(leaf.shape).astype(np.float32),
        shapes_of(layer, x),
    )
    assert params["depthwise_kernel"].shape == (7, 3, 1, 24)
    assert params["pointwise_kernel"].shape == (1, 1, 24, 5)
    assert ("bias" in params) == use_bias
    depthwise = nn.Conv(
        24, (7, 3), strides, feature_group_count=3, use_bias=False, precision="highest"
    )
    pointwise = nn.Conv(5, (1, 1), use_bias=use_bias, precision="highest")

    def expected(params, x):
        y = depthwise.apply({"params": {"kernel": params["depthwise_kernel"]}}, x)
        kernel = {"kernel": params["pointwise_kernel"]}
        bias = {"bias": params["bias"]} if use_bias else {}
        return pointwise.apply({"params": kernel | bias}, y)

    def loss(function, params):
        return jnp.mean(jnp.sin(function(params, x) / 10))

    def found(params, x):
        return layer.apply({"params": params}, x)

    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(found(params, x), expected(params, x), atol=2e-4)
    jax.tree.map(
        close,
        *(
            jax.jit(jax.grad(functools.partial(loss, function)))(params)
            for function in (found, expected)
        ),
    )


def test_separable_convolution_computes_in_its_dtype():
    layer = SeparableConv(5, (3, 3), (1, 1), dtype=jnp.bfloat16)
    x = jnp.ones((1, 4, 4, 3))
    params = shapes_of(layer, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    output = jax.eval_shape(layer.apply, {"params": params}, x)
    assert output.dtype == jnp.bfloat16


def test_pools_by_hand():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    average = pool3x3(x, "average", 1)[0, :, :, 0]
    # The corner averages the four positions that are inside.
    assert average[0, 0] == (0 + 1 + 4 + 5) / 4
    assert average[1, 1] == 5
    assert pool3x3(x, "max", 2)[0, :, :, 0].tolist() == [[10, 11], [14, 15]]
