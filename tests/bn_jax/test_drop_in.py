"""Dtypes and masks, as Flax has them on the same input; small batches, as the core."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bn_jax
from bn_jax import BatchNormParams, BatchStats, drop_in
from bn_jax import nnx as nnx_module
from bn_jax.linen import BatchNorm
from tests.bn_jax.reference import lenient

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(3, 2, (6, 4, 5)).astype(np.float32)
VARIABLES = {
    "params": {
        "scale": np.linspace(0.5, 2, 5, dtype=np.float32),
        "bias": np.linspace(-1, 1, 5, dtype=np.float32),
    },
    "batch_stats": {
        "mean": np.linspace(2, 4, 5, dtype=np.float32),
        "var": np.linspace(3, 5, 5, dtype=np.float32),
    },
}
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def apply(kind, x, train=True, mask=None, weights=None, **options):
    given = {"mask": mask, "weights": weights}
    return kind(use_running_average=not train, **options).apply(
        VARIABLES,
        x,
        mutable=["batch_stats"],
        **{name: value for name, value in given.items() if value is not None},
    )


@pytest.mark.parametrize("input_dtype", [*DTYPES, jnp.int32])
@pytest.mark.parametrize("dtype", [None, *DTYPES])
@pytest.mark.parametrize("train", [True, False])
def test_dtypes_are_flaxs(input_dtype, dtype, train):
    x = jnp.asarray(X, input_dtype)
    found, updated = apply(BatchNorm, x, train, dtype=dtype, unbiased=False)
    with lenient():
        expected, flax_updated = apply(
            nn.BatchNorm, x, train, dtype=dtype, use_fast_variance=False
        )
    assert found.dtype == expected.dtype
    tolerance = 4 * float(jnp.finfo(found.dtype).eps)
    np.testing.assert_allclose(
        np.float32(found), np.float32(expected), rtol=tolerance, atol=4 * tolerance
    )
    for name, values in flax_updated["batch_stats"].items():
        assert updated["batch_stats"][name].dtype == values.dtype == jnp.float32
        np.testing.assert_allclose(updated["batch_stats"][name], values, rtol=1e-5)


def test_statistics_are_of_input_that_was_not_rounded():
    # In bfloat16 these values are all 256.
    x = (256 + 0.1 * RANDOM.normal(size=(64, 5))).astype(np.float32)
    y, updated = apply(BatchNorm, x, dtype=jnp.bfloat16, momentum=0.0)
    var = np.var(np.float64(x), axis=0, ddof=1)
    np.testing.assert_allclose(updated["batch_stats"]["var"], var, rtol=1e-3)
    bias = VARIABLES["params"]["bias"]
    np.testing.assert_allclose(np.float32(y).mean(0), bias, atol=0.01)


@pytest.mark.parametrize("shape", [(6, 4, 1), (6, 1, 1), (4, 1), (6, 4, 5), (1, 1)])
def test_masks_broadcast_as_in_numpy(shape):
    mask = RANDOM.integers(0, 2, shape).astype(bool)
    mask.flat[0] = True
    found, updated = apply(BatchNorm, X, mask=mask)
    full = np.broadcast_to(mask, X.shape).astype(np.float32)
    expected, weighted = apply(BatchNorm, X, weights=full)
    # Two programs, whose sums are rounded each in its own order.
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert np.all(np.where(full, 0, found) == 0)
    for name, values in weighted["batch_stats"].items():
        np.testing.assert_allclose(updated["batch_stats"][name], values, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_masks_of_numbers_are_true_where_not_0(dtype):
    mask = RANDOM.integers(0, 2, (6, 4, 1))
    found, _ = apply(BatchNorm, X, mask=(3 * mask).astype(dtype))
    np.testing.assert_array_equal(found, apply(BatchNorm, X, mask=mask == 1)[0])


@pytest.mark.parametrize("shape", [(6,), (3, 1, 1), (1, 6, 4, 5)])
def test_masks_that_do_not_broadcast_say_so(shape):
    with pytest.raises(ValueError, match=r"does not broadcast .* \(6, 1, 1\)"):
        apply(BatchNorm, X, mask=np.ones(shape, bool))


def test_a_mask_and_weights_exclude_each_other():
    ones = np.ones((6, 1, 1), np.float32)
    with pytest.raises(ValueError, match="mask and weights were both given"):
        apply(BatchNorm, X, mask=ones, weights=ones)


def test_the_output_is_floating_point():
    with pytest.raises(ValueError, match="dtype must be floating point, got int32"):
        apply(BatchNorm, X, dtype=jnp.int32)
    with pytest.raises(TypeError, match="x must be floating point, got complex64"):
        apply(BatchNorm, X.astype(np.complex64))


@pytest.mark.usefixtures("x64")
def test_float64_stays():
    variables = jax.tree.map(np.float64, VARIABLES)
    y, updated = BatchNorm(False, param_dtype=jnp.float64).apply(
        variables, np.float64(X), mutable=["batch_stats"]
    )
    assert y.dtype == jnp.float64
    assert updated["batch_stats"]["mean"].dtype == jnp.float64


def core(function, train, **options):
    params = BatchNormParams(**VARIABLES["params"])
    stats = BatchStats(**VARIABLES["batch_stats"])
    y, stats = function(params, stats, X, train=train, eps=1e-5, **options)
    return y, stats


@pytest.mark.parametrize("train", [True, False])
def test_virtual_batches(train):
    y, updated = apply(BatchNorm, X, train, virtual_batch_size=2)
    expected, stats = core(bn_jax.ghost_batch_norm, train, virtual_batch_size=2)
    np.testing.assert_array_equal(y, expected)
    for name, values in updated["batch_stats"].items():
        np.testing.assert_array_equal(values, getattr(stats, name))
    # Any batch will do for shapes.
    BatchNorm(False, virtual_batch_size=2).init(jax.random.key(0), X[:1])


@pytest.mark.parametrize("train", [True, False])
def test_renormalisation(train):
    y, updated = apply(BatchNorm, X, train, renormalisation=(1.5, 0.5))
    expected, stats = core(bn_jax.batch_renorm, train, r_max=1.5, d_max=0.5)
    np.testing.assert_array_equal(y, expected)
    for name, values in updated["batch_stats"].items():
        np.testing.assert_array_equal(values, getattr(stats, name))


def test_limits_of_the_call_go_first_and_may_be_traced():
    @jax.jit
    def train(r_max):
        return BatchNorm(False, renormalisation=(3.0, 5.0)).apply(
            VARIABLES, X, renormalisation=(r_max, 0.25), mutable=["batch_stats"]
        )[0]

    expected, _ = core(bn_jax.batch_renorm, True, r_max=1.25, d_max=0.25)
    np.testing.assert_allclose(train(1.25), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("renormalisation", [None, (1.5, 0.5)])
@pytest.mark.parametrize("train", [True, False])
def test_nnx_has_both_too(train, renormalisation):
    virtual = None if renormalisation else 3
    layer = nnx_module.BatchNorm(
        5,
        rngs=nnx.Rngs(0),
        use_running_average=not train,
        virtual_batch_size=virtual,
        renormalisation=renormalisation,
    )
    for values in VARIABLES.values():
        for name, value in values.items():
            getattr(layer, name)[...] = jnp.asarray(value)
    options = {"virtual_batch_size": virtual, "renormalisation": renormalisation}
    expected, updated = apply(BatchNorm, X, train, **options)
    np.testing.assert_array_equal(layer(X), expected)
    np.testing.assert_array_equal(layer.var[...], updated["batch_stats"]["var"])
    if renormalisation:
        plain, _ = apply(BatchNorm, X, train)
        layer.renormalisation = None
        np.testing.assert_array_equal(layer(X, renormalisation=(1, 0)).shape, X.shape)
        assert train == (not np.allclose(expected, plain))


def test_gathers_virtual_batches_and_leaves_renormalisation_out():
    def estimate(**options):
        def run(batch_stats, x):
            variables = {**VARIABLES, "batch_stats": batch_stats}
            module = BatchNorm(False, **options)
            return module.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]

        stats = VARIABLES["batch_stats"]
        return bn_jax.population_statistics(run, stats, [X, 2 * X])

    found = estimate(virtual_batch_size=2)
    parts = np.concatenate([X, 2 * X]).astype(np.float64).reshape(6, -1, 5)
    np.testing.assert_allclose(found["mean"], parts.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(found["var"], parts.var(1, ddof=1).mean(0), rtol=1e-5)
    renormalised, plain = estimate(renormalisation=(1.5, 0.5)), estimate()
    np.testing.assert_array_equal(renormalised["var"], plain["var"])


def test_what_virtual_batches_exclude_is_said():
    for options in ({"axis_name": "a"}, {"renormalisation": (1.0, 0.0)}):
        (name,) = options
        with pytest.raises(ValueError, match=f"virtual_batch_size and {name} were"):
            apply(BatchNorm, X, virtual_batch_size=2, **options)


MODULES = {
    "linen": lambda **options: BatchNorm(use_running_average=False, **options),
    "nnx": lambda **options: bn_jax.nnx.BatchNorm(5, rngs=nnx.Rngs(0), **options),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "tanh"}, "activation must be one of .* got 'tanh'"),
        ({"single_value": "zero"}, "single_value must be .* got 'zero'"),
        ({"virtual_batch_size": 2, "axis_name": "a"}, "axis_name were both given"),
        (
            {"virtual_batch_size": 2, "renormalisation": (3.0, 5.0)},
            "renormalisation were both given",
        ),
    ],
)
def test_bad_arguments_are_refused_by_the_constructor(kind, options, message):
    with pytest.raises(ValueError, match=message):
        MODULES[kind](**options)


@pytest.mark.parametrize("kind", MODULES)
def test_an_argument_of_a_newer_flax_is_refused(kind, monkeypatch):
    known = drop_in.FLAX_ARGUMENTS.replace(" use_fast_variance", "")
    monkeypatch.setattr(drop_in, "FLAX_ARGUMENTS", known)
    MODULES[kind]()
    MODULES[kind](use_fast_variance=True)
    with pytest.raises(TypeError, match="use_fast_variance that this version"):
        MODULES[kind](use_fast_variance=False)


def test_one_value_gives_the_bias_as_in_flax():
    x = jnp.ones((1, 5))
    for train in (
        lambda **options: apply(BatchNorm, x, **options)[0],
        lambda **options: MODULES["nnx"](**options)(x),
    ):
        with pytest.raises(ValueError, match="single_value='bias'"):
            train()
        assert train(single_value="bias").shape == (1, 5)
    y, _ = apply(BatchNorm, x, single_value="bias")
    np.testing.assert_array_equal(y, np.float32(VARIABLES["params"]["bias"])[None])
