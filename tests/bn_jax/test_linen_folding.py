"""Folding whole linen models: outputs, programs, reports."""

import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax.linen
from bn_jax.linen_folding import LAYERS, apply_folded, fold_batch_norms
from experiments.inception.layers import SeparableConv
from experiments.inception.network import Inception
from experiments.mnist.network import MLP
from tests.bn_jax.reference import lenient

BATCH_NORMS = [nn.BatchNorm, bn_jax.linen.BatchNorm]
each_batch_norm = pytest.mark.parametrize("batch_norm", BATCH_NORMS)
INCEPTION_LAYERS = {**LAYERS, SeparableConv: "pointwise_kernel"}


@pytest.fixture(autouse=True)
def flax_promotes():
    with lenient():
        yield


class Chain(nn.Module):
    """Applies functions of one argument, made within the module, in a row."""

    make: Callable[[], list[Callable[[jax.Array], jax.Array]]]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for function in self.make():
            x = function(x)
        return x


def inference(batch_norm: Any = nn.BatchNorm, **options: Any) -> nn.Module:
    return batch_norm(use_running_average=True, **options)


def trained_variables(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Variables with values as after training: none is 0 or 1."""
    variables = model.init(jax.random.key(0), *args, **kwargs)
    rng = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = path[-1].key
        if name in ("scale", "var"):
            value = rng.uniform(0.5, 2, leaf.shape)
        elif name in ("bias", "mean"):
            value = rng.normal(size=leaf.shape)
        else:
            return leaf
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, variables)


def assert_same_function(
    model: nn.Module, variables: Any, folded: Any, *args: Any, **kwargs: Any
) -> None:
    """Outputs agree to 1e-5 of their scale."""
    apply = functools.partial(model.apply, **kwargs)
    expected = jax.jit(apply)(variables, *args)
    got = jax.jit(functools.partial(apply_folded, model, **kwargs))(folded, *args)
    assert got.dtype == expected.dtype
    error = jnp.abs(got - expected).max() / jnp.abs(expected).max()
    assert error < 1e-5
    assert jnp.std(expected) > 0


def images(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), shape or (2, 9, 9, 4))


def paths(tree: Any) -> set[str]:
    return set(flax.traverse_util.flatten_dict(tree, sep="/"))


CONVOLUTIONS = {
    "plain": {},
    "strided": {"strides": 2, "padding": "VALID"},
    "dilated": {"kernel_dilation": 2},
    "circular": {"padding": "CIRCULAR"},
    "grouped": {"feature_group_count": 2},
    "depthwise": {"feature_group_count": 4},
}


@pytest.mark.parametrize(
    ("kind", "use_bias", "batch_norm"),
    [
        ("plain", True, nn.BatchNorm),
        ("strided", False, bn_jax.linen.BatchNorm),
        ("dilated", False, nn.BatchNorm),
        ("circular", True, bn_jax.linen.BatchNorm),
        ("grouped", False, nn.BatchNorm),
        ("grouped", True, bn_jax.linen.BatchNorm),
        ("depthwise", False, bn_jax.linen.BatchNorm),
        ("depthwise", True, nn.BatchNorm),
    ],
)
def test_convolutions(kind, use_bias, batch_norm):
    def make():
        options = CONVOLUTIONS[kind]
        convolution = nn.Conv(8, (3, 3), use_bias=use_bias, name="conv", **options)
        return [convolution, inference(batch_norm, name="norm"), nn.relu]

    model = Chain(make)
    variables = trained_variables(model, images())
    folded, report = fold_batch_norms(model, variables, images())
    assert [str(finding) for finding in report] == ["norm: folded into conv"]
    assert paths(folded["params"]) == {"conv/kernel", "conv/bias"}
    assert not folded["batch_stats"]
    assert_same_function(model, variables, folded, images())


@each_batch_norm
@pytest.mark.parametrize(
    "options",
    [{}, {"use_scale": False}, {"use_bias": False}, {"epsilon": 0.3}],
)
@pytest.mark.parametrize("use_bias", [True, False])
def test_dense(use_bias, options, batch_norm):
    def make():
        return [nn.Dense(5, use_bias=use_bias), inference(batch_norm, **options)]

    model, x = Chain(make), images(6, 3)
    variables = trained_variables(model, x)
    folded, _ = fold_batch_norms(model, variables, x)
    assert_same_function(model, variables, folded, x)


def test_transposed_convolutions():
    def make():
        return [nn.ConvTranspose(3, (3, 3), strides=(2, 2), name="up"), inference()]

    model = Chain(make)
    variables = trained_variables(model, images())
    folded, (finding,) = fold_batch_norms(model, variables, images())
    assert finding.layer == "up"
    assert_same_function(model, variables, folded, images())


def test_fused_activation_stays():
    def make():
        norm = inference(bn_jax.linen.BatchNorm, activation="relu")
        return [nn.Dense(5), norm, nn.Dense(3)]

    model, x = Chain(make), images(6, 3)
    variables = trained_variables(model, x)
    folded, _ = fold_batch_norms(model, variables, x)
    assert_same_function(model, variables, folded, x)


class Branches(nn.Module):
    """Nested modules defined in setup, under rematerialisation, and in a residual."""

    def setup(self):
        self.first = nn.remat(Chain)(self._pair)
        self.second = Chain(self._pair)

    @staticmethod
    def _pair():
        return [nn.Conv(4, (3, 3), name="conv"), inference(name="norm"), nn.tanh]

    def __call__(self, x):
        return x + self.second(self.first(x))


def test_nested_and_rematerialised():
    variables = trained_variables(Branches(), images())
    folded, report = fold_batch_norms(Branches(), variables, images())
    assert [finding.layer for finding in report] == ["first/conv", "second/conv"]
    assert_same_function(Branches(), variables, folded, images())


def unfused(lowered_text: str) -> set[str]:
    """The arithmetic of normalisation that a lowered program holds."""
    names = {"rsqrt", "sqrt", "multiply", "subtract", "divide"}
    return names & set(re.findall(r"stablehlo\.(\w+)", lowered_text))


def test_the_mlp_of_the_paper():
    depth = (20, 10)
    model, x = MLP(depth, 4), images(6, 12)
    variables = trained_variables(model, x, train=False)
    folded, report = fold_batch_norms(model, variables, x, train=False)
    assert [f.layer for f in report] == [f"Dense_{i}" for i in range(len(depth))]
    assert_same_function(model, variables, folded, x, train=False)
    plain = jax.jit(functools.partial(model.apply, train=False))
    assert "rsqrt" in unfused(plain.lower(variables, x).as_text())
    apply = jax.jit(functools.partial(apply_folded, model, train=False))
    lowered = apply.lower(folded, x)
    # A sigmoid divides; nothing else is left.
    assert unfused(lowered.as_text()) <= {"divide"}
    assert "rsqrt" not in lowered.compile().as_text()


@pytest.mark.parametrize(
    ("batch_norm", "activation"),
    [(bn_jax.linen.BatchNorm, "relu"), (nn.BatchNorm, "sigmoid")],
)
def test_inception(batch_norm, activation):
    norm = functools.partial(batch_norm, epsilon=1e-3)
    options = {"num_classes": 5, "width": 1 / 16, "activation": activation}
    model, x = Inception(norm=norm, **options), images(2, 32, 32, 3)
    variables = trained_variables(model, x, train=False)
    folded, report = fold_batch_norms(
        model, variables, x, layers=INCEPTION_LAYERS, train=False
    )
    assert len(report) == 69
    assert all(finding.reason is None for finding in report)
    apply = jax.jit(functools.partial(apply_folded, model, train=False))
    lowered = apply.lower(folded, x)
    # Average pools and sigmoids divide; nothing else is left.
    assert unfused(lowered.as_text()) <= {"divide"}
    # The parameters are those of the network that never had a normalisation.
    without = Inception(norm=None, **options)
    initial = jax.eval_shape(
        functools.partial(without.init, train=False), jax.random.key(0), x
    )
    shapes = functools.partial(jax.tree.map, jnp.shape)
    assert shapes(folded["params"]) == shapes(initial["params"])


@pytest.mark.slow
def test_inception_computes_the_same():
    norm = functools.partial(bn_jax.linen.BatchNorm, epsilon=1e-3)
    options = {"num_classes": 5, "width": 1 / 16}
    model, x = Inception(norm=norm, **options), images(2, 32, 32, 3)
    variables = trained_variables(model, x, train=False)
    folded, _ = fold_batch_norms(
        model, variables, x, layers=INCEPTION_LAYERS, train=False
    )
    assert_same_function(model, variables, folded, x, train=False)
    without = functools.partial(Inception(norm=None, **options).apply, train=False)
    y = jax.jit(without)({"params": folded["params"]}, x)
    expected = jax.jit(functools.partial(model.apply, train=False))(variables, x)
    assert jnp.abs(y - expected).max() < 1e-5 * jnp.abs(expected).max()


def test_a_layer_of_ones_own_folds_if_it_is_named():
    def make():
        return [
            SeparableConv(5, (3, 3), (1, 1), use_bias=False, name="own"),
            inference(),
        ]

    model = Chain(make)
    variables = trained_variables(model, images())
    _, (finding,) = fold_batch_norms(model, variables, images())
    assert "result of conv_general_dilated" in finding.reason
    layers = {**LAYERS, SeparableConv: "pointwise_kernel"}
    folded, _ = fold_batch_norms(model, variables, images(), layers=layers)
    assert_same_function(model, variables, folded, images())


class Odd(nn.Module):
    """Where normalisations cannot be folded."""

    kind: str

    @nn.compact
    def __call__(self, x):
        kind = self.kind
        dense = nn.Dense(x.shape[-1], name="dense")
        norm = inference(name="norm", axis=(0, 1) if kind == "axis" else -1)
        if kind == "shared norm":
            return norm(norm(dense(x)))
        if kind == "shared layer":
            return norm(dense(dense(x)))
        if kind == "input":
            return norm(x)
        if kind == "weight norm":
            return norm(nn.WeightNorm(dense, name="weight_norm")(x))
        if kind == "transposed":
            return norm(
                nn.ConvTranspose(3, (3,), transpose_kernel=True, name="up")(x[None])
            )
        y = dense(x)
        if kind == "activation":
            return norm(nn.relu(y))
        if kind == "residual":
            return norm(y) + y
        if kind == "output":
            return norm(y), y
        if kind == "sum":
            return norm(y + x)
        if kind == "dtype":
            return norm(nn.Dense(3, dtype=jnp.bfloat16, name="coarse")(x))
        if kind == "mask":
            return norm(y, mask=jnp.ones((6, 1), bool))
        return norm(y)


REASONS = {
    "axis": r"feature axes are \(0, 1\) of 2, not the last one alone",
    "shared norm": "it is called more than once",
    "shared layer": "dense is called more than once",
    "input": "its input is one of the model",
    "weight norm": "its input is a result of|not a parameter as it is stored",
    "transposed": "the kernel of up is transposed",
    "activation": "its input is a result of relu, not of a layer",
    "residual": "the output of dense is used elsewhere, too",
    "output": "the output of dense is used elsewhere, too",
    "sum": "its input is a result of add, not of a layer",
    "dtype": "it turns bfloat16 into float32",
    "mask": "it is called with a mask or weights",
}


@pytest.mark.parametrize("kind", REASONS)
def test_what_cannot_be_folded_stays_and_says_why(kind):
    model, x = Odd(kind), images(6, 3)
    variables = trained_variables(model, x)
    folded, (finding,) = fold_batch_norms(model, variables, x)
    assert finding.norm == "norm"
    assert finding.layer is None
    assert re.search(REASONS[kind], finding.reason), finding.reason
    assert str(finding) == f"norm: not folded, since {finding.reason}"
    assert paths(folded) == paths(variables)
    jax.tree.map(
        np.testing.assert_array_equal,
        apply_folded(model, folded, x),
        model.apply(variables, x),
    )


def test_layers_in_a_scan_stay():
    def make():
        return [nn.Dense(3, name="dense"), inference(name="norm")]

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            def body(module, x, _):
                return module(x), None

            over = nn.scan(
                body,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=4,
            )
            return over(Chain(make, name="chain"), x, None)[0]

    x = images(6, 3)
    variables = trained_variables(Scanned(), x)
    folded, (finding,) = fold_batch_norms(Scanned(), variables, x)
    assert "not a parameter as it is stored" in finding.reason
    np.testing.assert_array_equal(
        apply_folded(Scanned(), folded, x), Scanned().apply(variables, x)
    )


def test_shapes_are_enough():
    model, x = MLP((4,), 2), images(6, 3)
    variables = trained_variables(model, x, train=False)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    got = fold_batch_norms(model, variables, shape, train=False)
    expected = fold_batch_norms(model, variables, x, train=False)
    assert got.report == expected.report
    jax.tree.map(np.testing.assert_array_equal, got.variables, expected.variables)


def test_arguments_that_are_no_arrays_are_passed_as_they_are():
    class Switched(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            y = nn.Dense(3)(x)
            return nn.BatchNorm()(y, not train)

    model, x = Switched(), images(6, 3)
    variables = trained_variables(model, x, False)
    _, (finding,) = fold_batch_norms(model, variables, x, False)
    assert finding.layer == "Dense_0"


def test_saved_and_restored(tmp_path):
    model, x = MLP((4, 5), 2), images(6, 3)
    variables = trained_variables(model, x, train=False)
    folded, _ = fold_batch_norms(model, variables, x, train=False)
    flat = flax.traverse_util.flatten_dict(folded, sep="/")
    np.savez(tmp_path / "folded.npz", **flat)
    with np.load(tmp_path / "folded.npz") as file:
        restored = flax.traverse_util.unflatten_dict(dict(file), sep="/")
    np.testing.assert_array_equal(
        apply_folded(model, restored, x, train=False),
        apply_folded(model, folded, x, train=False),
    )


def test_the_model_itself_is_a_normalisation():
    model, x = inference(), images(6, 3)
    variables = trained_variables(model, x)
    _, (finding,) = fold_batch_norms(model, variables, x)
    assert finding == ("", None, "its input is one of the model, or of a part of it")


def test_bad_arguments():
    model, x = MLP((4,), 2), images(6, 3)
    variables = trained_variables(model, x, train=False)
    with pytest.raises(ValueError, match="BatchNorm_0 normalises by the batch"):
        fold_batch_norms(model, variables, x, train=True)
    with pytest.raises(ValueError, match="hold no batch_stats"):
        fold_batch_norms(model, {"params": variables["params"]}, x, train=False)
    folded, _ = fold_batch_norms(model, variables, x, train=False)
    with pytest.raises(ValueError, match="folded already"):
        fold_batch_norms(model, folded, x, train=False)
    with pytest.raises(ValueError, match="no collection 'folded'"):
        apply_folded(model, variables, x, train=False)
