import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax
from bn_jax.linen import BatchNorm
from bn_jax.params import BatchNormParams
from bn_jax.statistics import BatchStats

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(3, 2, (6, 4, 5)).astype(np.float32)


def random_variables(features=(5,)):
    def values():
        return RANDOM.uniform(0.5, 2, features).astype(np.float32)

    return {
        "params": {"scale": values(), "bias": values()},
        "batch_stats": {"mean": values(), "var": values()},
    }


def as_core(variables):
    return (
        BatchNormParams(**variables["params"]),
        BatchStats(**variables["batch_stats"]),
    )


def apply(module, variables, x=X, **options):
    return module.apply(variables, x, mutable=["batch_stats"], **options)


@pytest.mark.parametrize(
    ("axis", "features"),
    [(-1, (5,)), (1, (4,)), ((1, 2), (4, 5)), ((-1, -2), (4, 5))],
)
def test_variables_are_named_and_shaped_as_flaxs(axis, features):
    variables = BatchNorm(use_running_average=False, axis=axis).init(
        jax.random.key(0), X
    )
    flax_module = nn.BatchNorm(use_running_average=False, axis=axis)
    expected = flax_module.init(jax.random.key(0), X)
    assert jax.tree.structure(variables) == jax.tree.structure(expected)
    for found, other in zip(
        jax.tree.leaves(variables), jax.tree.leaves(expected), strict=True
    ):
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found.ravel(), other.ravel())
        assert found.shape == features


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("axis", [-1, 1, (1, 2)])
def test_is_the_core_with_the_same_options(train, axis):
    weights = RANDOM.integers(0, 2, (6, 1, 1)).astype(np.float32)
    module = BatchNorm(
        axis=axis, momentum=0.8, epsilon=0.02, activation="relu", unbiased=False
    )
    variables = random_variables(tuple(X.shape[i] for i in np.atleast_1d(axis)))
    found, updated = apply(
        module, variables, use_running_average=not train, weights=weights
    )
    expected, stats = bn_jax.batch_norm(
        *as_core(variables),
        X,
        train=train,
        axis=axis,
        decay=0.8,
        eps=0.02,
        weights=weights,
        activation="relu",
        unbiased=False,
    )
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(updated["batch_stats"]["mean"], stats.mean)
    np.testing.assert_array_equal(updated["batch_stats"]["var"], stats.var)


@pytest.mark.parametrize("train", [True, False])
def test_replaces_flaxs_module_on_the_same_variables(train):
    variables = random_variables()
    found, updated = apply(
        BatchNorm(use_running_average=not train, unbiased=False), variables
    )
    expected, flax_updated = apply(
        nn.BatchNorm(use_running_average=not train), variables
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    for name, values in flax_updated["batch_stats"].items():
        np.testing.assert_allclose(updated["batch_stats"][name], values, rtol=1e-4)


def test_defaults_are_flaxs_where_both_have_them():
    for name in ("axis", "momentum", "epsilon", "use_bias", "use_scale", "axis_name"):
        assert getattr(BatchNorm(), name) == getattr(nn.BatchNorm(), name), name
    assert BatchNorm().unbiased


@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
def test_scale_and_bias_are_optional(use_scale, use_bias):
    module = BatchNorm(
        use_running_average=False,
        use_scale=use_scale,
        use_bias=use_bias,
        scale_init=nn.initializers.constant(3.0),
        bias_init=nn.initializers.constant(7.0),
    )
    variables = module.init(jax.random.key(0), X)
    names = {"scale"} if use_scale else set()
    names |= {"bias"} if use_bias else set()
    assert set(variables.get("params", {})) == names
    y, _ = apply(module, variables)
    np.testing.assert_allclose(y.mean((0, 1)), 7.0 * use_bias, atol=1e-5)
    np.testing.assert_allclose(y.std((0, 1)), 3.0 if use_scale else 1.0, rtol=1e-4)


def test_gradient_reaches_parameters_and_input_but_no_statistics():
    variables = random_variables()
    module = BatchNorm(use_running_average=False)
    target = RANDOM.normal(size=X.shape).astype(np.float32)

    def loss(variables, x):
        return jnp.sum(apply(module, variables, x)[0] * target)

    def core_loss(params, stats, x):
        y, _ = bn_jax.batch_norm(params, stats, x, train=True, eps=1e-5)
        return jnp.sum(y * target)

    grads, grad_x = jax.grad(loss, argnums=(0, 1))(variables, X)
    params, _, expected_x = jax.grad(core_loss, argnums=(0, 1, 2))(
        *as_core(variables), X
    )
    np.testing.assert_array_equal(grads["params"]["scale"], params.scale)
    np.testing.assert_array_equal(grads["params"]["bias"], params.bias)
    np.testing.assert_array_equal(grad_x, expected_x)
    assert not np.any(jax.tree.leaves(grads["batch_stats"]))


def test_init_leaves_the_statistics_and_takes_one_example():
    variables = BatchNorm(use_running_average=False).init(
        jax.random.key(0), jnp.full((1, 5), 9.0)
    )
    assert variables["batch_stats"]["mean"].tolist() == [0] * 5
    assert variables["batch_stats"]["var"].tolist() == [1] * 5


def test_axis_name_is_for_the_map_alone():
    module = BatchNorm(use_running_average=False, axis_name="devices")
    variables = module.init(jax.random.key(0), X[0])
    mapped = jax.vmap(
        lambda x: apply(module, variables, x), axis_name="devices", out_axes=(0, None)
    )
    y, updated = mapped(X)
    expected, whole = apply(BatchNorm(use_running_average=False), variables)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    for name, values in whole["batch_stats"].items():
        np.testing.assert_allclose(updated["batch_stats"][name], values, rtol=1e-5)


def test_groups_share_among_themselves():
    module = BatchNorm(
        use_running_average=False,
        axis_name="devices",
        axis_index_groups=[[0, 1, 2, 3], [4, 5, 6, 7]],
    )
    x = RANDOM.normal(size=(8, 3, 5)).astype(np.float32)
    variables = random_variables()
    y = jax.pmap(lambda x: apply(module, variables, x)[0], axis_name="devices")(x)
    alone = BatchNorm(use_running_average=False)
    for half in slice(0, 4), slice(4, 8):
        expected, _ = apply(alone, variables, x[half])
        np.testing.assert_allclose(y[half], expected, rtol=1e-4, atol=1e-5)


def test_mode_is_given_once():
    variables = random_variables()
    with pytest.raises(ValueError, match="use_running_average"):
        apply(BatchNorm(), variables)
    with pytest.raises(ValueError, match="use_running_average"):
        apply(BatchNorm(use_running_average=True), variables, use_running_average=True)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return BatchNorm(use_running_average=True, name="norm")(x)


def test_missing_statistics_are_an_error_not_a_fresh_start():
    params = random_variables()["params"]
    with pytest.raises(ValueError, match=r"of BatchNorm hold no batch_stats.* Pass"):
        BatchNorm(use_running_average=True).apply({"params": params}, X)
    with pytest.raises(ValueError, match="of norm hold no batch_stats"):
        Network().apply({"params": {"norm": params}}, X)
    with pytest.raises(ValueError, match="hold no batch_stats"):
        apply(BatchNorm(use_running_average=False), {"params": params})


def test_statistics_that_may_not_change_are_an_error():
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        BatchNorm(use_running_average=False).apply(random_variables(), X)


def test_half_precision_input_keeps_its_dtype():
    y, updated = apply(
        BatchNorm(use_running_average=False),
        random_variables(),
        jnp.asarray(X, jnp.bfloat16),
    )
    assert y.dtype == jnp.bfloat16
    assert updated["batch_stats"]["var"].dtype == jnp.float32
