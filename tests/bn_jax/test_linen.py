import dataclasses
import functools

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from jax.sharding import PartitionSpec

import bn_jax
from bn_jax.linen import BatchNorm
from bn_jax.params import BatchNormParams
from bn_jax.statistics import BatchStats
from tests.bn_jax.reference import lenient
from tests.bn_jax.sharing import device_mesh

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
def test_checkpoint_of_flaxs_module_restores_into_ours_and_back(train):
    flaxs = nn.BatchNorm(use_running_average=not train)
    ours = BatchNorm(use_running_average=not train, unbiased=False)
    # Through bytes, each with the other's variables as the target.
    targets = [module.init(jax.random.key(0), X) for module in (flaxs, ours)]
    written = serialization.to_bytes(random_variables())
    flax_variables, our_variables = (
        serialization.from_bytes(target, written) for target in targets
    )
    found, updated = apply(ours, flax_variables)
    expected, flax_updated = apply(flaxs, our_variables)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    for name, values in flax_updated["batch_stats"].items():
        np.testing.assert_allclose(updated["batch_stats"][name], values, rtol=1e-4)


def test_constructor_is_flaxs():
    ours, flaxs = (
        {field.name: field.default for field in dataclasses.fields(kind)}
        for kind in (BatchNorm, nn.BatchNorm)
    )
    own = {"activation", "unbiased", "frozen"}
    own |= {"virtual_batch_size", "renormalisation"}
    own |= {"single_value", "skip_nonfinite"}
    assert list(flaxs) == [name for name in ours if name not in own]
    assert {name: ours[name] for name in flaxs} == flaxs
    assert isinstance(BatchNorm(), nn.BatchNorm)


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("force_float32_reductions", [True, False])
def test_initial_values_are_flaxs_for_the_same_key(
    param_dtype, force_float32_reductions
):
    def init(kind):
        module = kind(
            use_running_average=False,
            scale_init=nn.initializers.normal(),
            bias_init=nn.initializers.uniform(),
            param_dtype=param_dtype,
            force_float32_reductions=force_float32_reductions,
        )
        with lenient():
            return module.init(jax.random.key(3), X)

    ours, flaxs = init(BatchNorm), init(nn.BatchNorm)
    assert jax.tree.structure(ours) == jax.tree.structure(flaxs)
    for found, expected in zip(
        jax.tree.leaves(ours), jax.tree.leaves(flaxs), strict=True
    ):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(np.float32(found), np.float32(expected))


def test_statistics_in_half_precision_move_as_far_as_it_goes():
    module = BatchNorm(
        use_running_average=False,
        param_dtype=jnp.bfloat16,
        force_float32_reductions=False,
        momentum=0.5,
    )
    variables = module.init(jax.random.key(0), X)
    _, updated = apply(module, variables)
    mean = updated["batch_stats"]["mean"]
    assert mean.dtype == jnp.bfloat16
    expected = jnp.asarray(X.mean((0, 1), dtype=np.float64) / 2, jnp.bfloat16)
    np.testing.assert_array_equal(np.float32(mean), np.float32(expected))


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


def test_init_normalises_as_training_does():
    module = BatchNorm(use_running_average=False, axis_name="unknown in init")
    y, variables = module.init_with_output(jax.random.key(0), X)
    expected, _ = apply(module.clone(axis_name=None), variables)
    np.testing.assert_array_equal(y, expected)


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
    with pytest.raises(ValueError, match=r"of BatchNorm hold no mean .* Pass"):
        BatchNorm(use_running_average=True).apply({"params": params}, X)
    with pytest.raises(ValueError, match="of norm hold no mean"):
        Network().apply({"params": {"norm": params}}, X)
    training = BatchNorm(use_running_average=False)
    with pytest.raises(ValueError, match="hold no mean in batch_stats"):
        apply(training, {"params": params})
    half = {"params": params, "batch_stats": {"mean": np.zeros(5, np.float32)}}
    with pytest.raises(ValueError, match="hold no var in batch_stats"):
        apply(training, half)


def test_statistics_that_may_not_change_are_an_error():
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        BatchNorm(use_running_average=False).apply(random_variables(), X)


def test_frozen_layers_keep_their_statistics_and_still_learn():
    variables = random_variables()
    module = BatchNorm(use_running_average=False, frozen=True)
    # Nothing is mutable, and nothing need be.
    found = np.asarray(module.apply(variables, X))
    expected = BatchNorm(use_running_average=True).apply(variables, X)
    np.testing.assert_array_equal(found, expected)

    def loss(params, x):
        return jnp.sum(module.apply({**variables, "params": params}, x) ** 2)

    grads, grad_x = jax.grad(loss, argnums=(0, 1))(variables["params"], X)
    (scale, _), (mean, var) = as_core(variables)
    xhat = (X - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(
        grads["scale"], (2 * found * xhat).sum((0, 1)), rtol=1e-4
    )
    np.testing.assert_allclose(grads["bias"], (2 * found).sum((0, 1)), rtol=1e-4)
    # Constants: no gradient flows through the moments of the batch.
    np.testing.assert_allclose(
        grad_x, 2 * found * (scale / np.sqrt(var + 1e-5)), rtol=1e-4
    )


class Tower(nn.Module):
    """A block in a lifted transform of Flax."""

    norm: type[nn.Module]
    lifted: str = "none"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x):
        if self.lifted == "scan":
            blocks = nn.scan(
                Block,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=3,
            )
            return blocks(self.norm, self.axis_name)(x, None)[0]
        block = nn.remat(Block) if self.lifted == "remat" else Block
        for _ in range(3):
            x, _ = block(self.norm, self.axis_name)(x, None)
        return x


class Block(nn.Module):
    norm: type[nn.Module]
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, _):
        x = nn.Dense(5, use_bias=False)(x)
        return nn.relu(self.norm(False, axis_name=self.axis_name)(x)), None


def train_tower(norm, lifted="none"):
    tower = Tower(norm, lifted)
    variables = Tower(nn.BatchNorm, lifted).init(jax.random.key(0), X)

    def loss(params):
        y, updated = apply(tower, {**variables, "params": params})
        return jnp.mean(y**3), updated

    return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])


@pytest.mark.parametrize("lifted", ["scan", "remat"])
def test_lifted_transforms_train_as_flaxs_module_does(lifted):
    found = train_tower(functools.partial(BatchNorm, unbiased=False), lifted)
    expected = train_tower(nn.BatchNorm, lifted)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5)


def test_lifted_vmap_shares_moments_over_its_axis():
    mapped = nn.vmap(
        BatchNorm,
        variable_axes={"params": None, "batch_stats": None},
        split_rngs={"params": False},
        axis_name="parts",
    )
    variables = random_variables()
    found, updated = apply(
        mapped(use_running_average=False, axis_name="parts"), variables
    )
    expected, whole = apply(BatchNorm(use_running_average=False), variables)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        updated["batch_stats"]["var"], whole["batch_stats"]["var"], rtol=1e-5
    )


def test_layers_share_moments_in_shard_map():
    model = Tower(BatchNorm, axis_name="a")
    variables = model.init(jax.random.key(0), X)
    sharded = jax.shard_map(
        functools.partial(apply, model),
        mesh=device_mesh(2),
        in_specs=(PartitionSpec(), PartitionSpec("a")),
        out_specs=(PartitionSpec("a"), PartitionSpec()),
    )
    found, updated = jax.jit(sharded)(variables, X)
    expected, whole = apply(Tower(BatchNorm), variables)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    for a, b in zip(jax.tree.leaves(updated), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
