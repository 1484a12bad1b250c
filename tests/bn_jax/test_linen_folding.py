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
from bn_jax.linen_folding import apply_folded, check_folded, fold_batch_norms
from experiments.inception.network import Inception
from experiments.mnist.network import MLP
from tests.bn_jax.debug_flags import FLAGS
from tests.bn_jax.reference import lenient

BATCH_NORMS = [nn.BatchNorm, bn_jax.linen.BatchNorm]
each_batch_norm = pytest.mark.parametrize("batch_norm", BATCH_NORMS)


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
        name = next(key.key for key in path[::-1] if hasattr(key, "key"))
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


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("transpose_kernel", [True, False])
@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR"])
def test_transposed_convolutions(padding, transpose_kernel, use_bias):
    def make():
        options = {"padding": padding, "transpose_kernel": transpose_kernel}
        options |= {"strides": (2, 2), "use_bias": use_bias, "name": "up"}
        # As many features as inputs: a wrong axis would have the right size.
        return [nn.ConvTranspose(4, (3, 3), **options), inference()]

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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch_norm", "activation"),
    [(bn_jax.linen.BatchNorm, "relu"), (nn.BatchNorm, "sigmoid")],
)
def test_inception(batch_norm, activation):
    norm = functools.partial(batch_norm, epsilon=1e-3)
    options = {"num_classes": 5, "width": 1 / 16, "activation": activation}
    model, x = Inception(norm=norm, **options), images(2, 32, 32, 3)
    variables = trained_variables(model, x, train=False)
    folded, report = fold_batch_norms(model, variables, x, train=False)
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
    folded, _ = fold_batch_norms(model, variables, x, train=False)
    assert_same_function(model, variables, folded, x, train=False)
    without = functools.partial(Inception(norm=None, **options).apply, train=False)
    y = jax.jit(without)({"params": folded["params"]}, x)
    expected = jax.jit(functools.partial(model.apply, train=False))(variables, x)
    assert jnp.abs(y - expected).max() < 1e-5 * jnp.abs(expected).max()


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
    "shared norm": "it is called 2 times",
    "shared layer": "of dense is used elsewhere, too",
    "input": "its input is one of the model",
    "weight norm": "the kernel of dense is used elsewhere, too",
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
    assert finding.reason == "it is called within scan"
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
    assert finding.reason.startswith("its input is one of the model")


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


def dense(**options: Any) -> nn.Module:
    return nn.Dense(4, name="dense", **options)


def norm(**options: Any) -> nn.Module:
    return inference(bn_jax.linen.BatchNorm, name="norm", **options)


class OwnLayer(nn.Module):
    """A product that may do more than a layer does."""

    kind: str = "plain"
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        w = self.param("w", nn.initializers.normal(1), (x.shape[-1], 4))
        if self.kind == "standardised":
            w = (w - w.mean(0)) / w.std(0)
        if self.kind == "rounded":
            w = jnp.round(4 * w) / 4
        if self.kind == "integers":
            w = (4 * w).astype(jnp.int8).astype(x.dtype)
        if self.kind == "centred":
            w = w - jnp.full((4, 4), 0.25) @ w
        y = x @ (w.T if self.kind == "transposed" else w)
        if self.use_bias:
            y = y + self.param("b", nn.initializers.normal(1), (4,))[None]
        return nn.tanh(y) if self.kind == "bounded" else y


class QuietDense(nn.Dense):
    """A class derived from a layer's that calls it, and does more."""

    @nn.compact
    def __call__(self, x):
        return 0.5 * super().__call__(x)


class LoudNorm(bn_jax.linen.BatchNorm):
    """A class derived from a normalisation's that does more."""

    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


class NamedNorm(bn_jax.linen.BatchNorm):
    """A class derived from a normalisation's that does the same."""


def rounded_product(x, kernel, *args, **kwargs):
    step = jnp.abs(kernel).max() / 7
    return jax.lax.dot_general(x, jnp.round(kernel / step) * step, *args, **kwargs)


@jax.custom_jvp
def decoded(y, kernel):
    return y @ kernel.T


decoded.defjvps(None, None)


class Reader(nn.Module):
    """A layer, a normalisation, and something that reads one of their variables."""

    kind: str

    def setup(self):
        self.dense, self.norm = (
            nn.Dense(4),
            bn_jax.linen.BatchNorm(use_running_average=True),
        )

    def __call__(self, x):
        y = nn.relu(self.norm(self.dense(x)))
        kernel = self.dense.variables["params"]["kernel"]
        kind = self.kind
        if kind == "transposed":
            return y @ kernel.T
        if kind == "get_variable":
            return y @ self.dense.get_variable("params", "kernel").T
        if kind == "jit":
            return jax.jit(lambda y, kernel: y @ kernel.T)(y, kernel)
        if kind == "remat":
            return jax.checkpoint(lambda y, kernel: y @ kernel.T)(y, kernel)
        if kind == "custom_jvp":
            return decoded(y, kernel)
        if kind == "scan":
            return jax.lax.scan(lambda y, _: (y @ kernel.T, None), y, None, 2)[0]
        if kind == "cond":
            return jax.lax.cond(y.sum() > 0, lambda: y @ kernel.T, lambda: y)
        if kind == "while":
            return jax.lax.fori_loop(0, 2, lambda i, y: y @ kernel.T, y)
        if kind == "vmap":
            return jax.vmap(lambda row: kernel @ row)(y)
        if kind == "penalty":
            return y, (kernel**2).sum()
        if kind == "output":
            return y, kernel
        if kind == "bias":
            return y + self.dense.variables["params"]["bias"]
        if kind == "scale":
            return y * self.norm.variables["params"]["scale"]
        if kind == "mean":
            return y - self.norm.variables["batch_stats"]["mean"]
        assert kind == "gradient"
        slope = jax.grad(lambda x: self.norm(self.dense(x)).sum())
        return slope(x)


READERS = [
    *("transposed", "get_variable", "jit", "remat", "custom_jvp", "scan", "cond"),
    *("while", "vmap", "penalty", "output", "bias", "scale", "mean", "gradient"),
]


@pytest.mark.parametrize("kind", READERS)
def test_what_something_else_reads_stays(kind):
    model, x = Reader(kind), images(5, 4)
    variables = trained_variables(model, x)
    folded, (finding,) = fold_batch_norms(model, variables, x)
    assert finding.layer is None
    assert "used elsewhere, too" in finding.reason or "2 times" in finding.reason
    check_folded(model, variables, folded, x, tolerance=0.0)
    assert paths(folded) == paths(variables)


class Cast(nn.Module):
    """Reads its kernel once and uses it twice."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(1), (4, 4))
        kernel = kernel.astype(jnp.bfloat16).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.normal(1), (4,))
        y = norm()(x @ kernel + bias)
        return nn.relu(y) @ kernel


class Mapped(nn.Module):
    """A layer and a normalisation within a transformation of Flax."""

    transform: Any

    @nn.compact
    def __call__(self, x):
        def body(module, x):
            return module(x)

        def make():
            return [nn.Dense(4, name="dense"), norm(), nn.relu]

        return self.transform(body)(Chain(make, name="chain"), x)


def carried(body):
    scan = nn.scan(
        lambda module, x, _: (body(module, x), None),
        variable_broadcast=["params", "batch_stats"],
        split_rngs={"params": False},
        length=3,
    )
    return lambda module, x: scan(module, x, None)[0]


over_rows = functools.partial(
    nn.vmap,
    variable_axes={"params": None, "batch_stats": None},
    split_rngs={"params": False},
)
over_models = functools.partial(
    nn.vmap,
    variable_axes={"params": 0, "batch_stats": 0},
    split_rngs={"params": True},
    in_axes=None,
    axis_size=3,
)


def chain(*makers: Callable[[], Any]) -> nn.Module:
    return Chain(lambda: [make() for make in makers])


partial = functools.partial
# Whether the normalisation of each model folds. All are called on (5, 4).
FOLDS: dict[str, tuple[bool, nn.Module]] = {
    "sequential": (True, nn.Sequential([nn.Dense(4), inference()])),
    "derived norm": (True, chain(dense, partial(NamedNorm, use_running_average=True))),
    "loud norm": (False, chain(dense, partial(LoudNorm, use_running_average=True))),
    "own layer": (True, chain(OwnLayer, norm)),
    "own layer, no bias": (True, chain(partial(OwnLayer, use_bias=False), norm)),
    "own layer, transposed": (True, chain(partial(OwnLayer, "transposed"), norm)),
    "norm first, transposed": (True, chain(norm, partial(OwnLayer, "transposed"))),
    "standardised": (False, chain(partial(OwnLayer, "standardised"), norm)),
    "rounded": (False, chain(partial(OwnLayer, "rounded"), norm)),
    "integers": (False, chain(partial(OwnLayer, "integers"), norm)),
    "centred": (False, chain(partial(OwnLayer, "centred"), norm)),
    "bounded": (False, chain(partial(OwnLayer, "bounded"), norm)),
    "quiet": (False, chain(partial(QuietDense, 4), norm)),
    "quiet, no bias": (False, chain(partial(QuietDense, 4, use_bias=False), norm)),
    "own product": (False, chain(partial(dense, dot_general=rounded_product), norm)),
    "several features": (False, chain(lambda: nn.DenseGeneral((2, 4)), norm)),
    "several inputs": (True, chain(lambda: nn.DenseGeneral(4, axis=(-1,)), norm)),
    "weight norm": (False, chain(lambda: nn.WeightNorm(nn.Dense(4)), norm)),
    "cast": (False, Cast()),
    "jit": (True, Mapped(nn.jit)),
    "remat": (True, Mapped(nn.remat)),
    "scan": (False, Mapped(carried)),
    "vmap of rows": (False, Mapped(over_rows)),
    "vmap of models": (False, Mapped(over_models)),
    "jit of layer": (True, chain(partial(nn.jit(nn.Dense), 4, use_bias=False), norm)),
    "jit of norm": (True, chain(dense, lambda: nn.jit(inference().__class__)(True))),
    "jit, filtered": (
        True,
        chain(partial(nn.jit(nn.Dense, variables="params"), 4, use_bias=False), norm),
    ),
    "norm first": (True, chain(norm, dense)),
    "norm first, no bias": (True, chain(norm, partial(dense, use_bias=False))),
    "norm first, jit": (True, chain(norm, partial(nn.jit(nn.Dense), 4))),
    "norm first, activation": (False, chain(partial(norm, activation="relu"), dense)),
    "norm first, relu": (False, chain(norm, lambda: nn.relu, dense)),
    "norm first, residual": (False, chain(lambda: nn.relu, norm, lambda: twice, dense)),
    "norm first, own layer": (True, chain(norm, partial(OwnLayer, use_bias=False))),
    "norm first, rounded": (False, chain(norm, partial(OwnLayer, "rounded"))),
    "norm first, bounded": (
        False,
        chain(norm, partial(OwnLayer, "bounded", use_bias=False)),
    ),
}


def twice(x: jax.Array) -> jax.Array:
    return x + jnp.sin(x)


@pytest.mark.parametrize("name", FOLDS)
def test_the_report_is_true_before_and_after_apply(name):
    folds, model = FOLDS[name]
    x = images(5, 4)
    variables = trained_variables(model, x)
    folded, report = fold_batch_norms(model, variables, x)
    (finding,) = report
    assert (finding.reason is None) == folds, finding
    assert check_folded(model, variables, folded, x) <= (1e-5 if folds else 0)
    assert len(folded["batch_stats"]) == (not folds)
    jax.jit(model.apply)(variables, x)
    again = fold_batch_norms(model, variables, x)
    assert again.report == report
    jax.tree.map(np.testing.assert_array_equal, again.variables, folded)
    assert check_folded(model, variables, again.variables, x) <= 1e-5


CONVS = {
    "valid": (True, {"padding": "VALID"}),
    "zero": (True, {"padding": 0}),
    "zeros": (True, {"padding": [(0, 0), (0, 0)]}),
    "grouped": (True, {"padding": "VALID", "feature_group_count": 2}),
    "depthwise": (True, {"padding": "VALID", "feature_group_count": 4}),
    "no bias": (True, {"padding": "VALID", "use_bias": False}),
    "strided": (True, {"padding": "VALID", "strides": 2, "kernel_dilation": 2}),
    "1x1": (True, {"kernel_size": (1, 1), "padding": "SAME"}),
    "same": (False, {"padding": "SAME"}),
    # Nothing is padded at this size, and would be at another.
    "same by chance": (False, {"kernel_size": (3, 3), "strides": 3, "padding": "SAME"}),
    "one": (False, {"padding": 1}),
    "circular": (False, {"padding": "CIRCULAR"}),
    "dilated input": (False, {"padding": 0, "input_dilation": 2}),
    "masked": (False, {"padding": "VALID", "mask": jnp.ones((3, 3, 4, 8))}),
}


@pytest.mark.parametrize("kind", CONVS)
def test_a_normalisation_before_a_convolution(kind):
    folds, options = CONVS[kind]
    model = chain(norm, lambda: nn.Conv(8, **{"kernel_size": (3, 3)} | options))
    variables = trained_variables(model, images())
    folded, (finding,) = fold_batch_norms(model, variables, images())
    assert (finding.reason is None) == folds, finding
    for size in (9, 10):
        x = images(2, size, size, 4)
        assert check_folded(model, variables, folded, x) < 1e-5


def test_one_layer_takes_the_normalisations_on_both_sides():
    model = chain(inference, partial(dense, use_bias=False), norm, lambda: nn.relu)
    variables = trained_variables(model, images(5, 4))
    folded, report = fold_batch_norms(model, variables, images(5, 4))
    assert [finding.layer for finding in report] == ["dense", "dense"]
    assert check_folded(model, variables, folded, images(5, 4)) < 1e-5
    assert paths(folded["params"]) == {"dense/kernel", "dense/bias"}


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "silu", "gelu"])
def test_every_activation_is_applied_by_name(activation):
    class Activated(nn.BatchNorm):
        activation: str | None = None

    model = chain(dense, lambda: Activated(True))
    loud = chain(dense, lambda: Activated(True, activation=activation))
    variables = trained_variables(model, images(5, 4))
    folded, _ = fold_batch_norms(loud, variables, images(5, 4))
    expected = getattr(nn, activation)(model.apply(variables, images(5, 4)))
    got = apply_folded(loud, folded, images(5, 4))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_boxes_stay(norm_first, use_bias, box):
    options: dict[str, Any] = {"use_bias": use_bias}
    options["kernel_init"] = box(nn.initializers.lecun_normal(), ("rows", "model"))
    if use_bias:
        options["bias_init"] = box(nn.initializers.normal(1), ("model",))
    scale = box(nn.initializers.ones, ("rows" if norm_first else "model",))
    makers = [partial(dense, **options), partial(norm, scale_init=scale)]
    model = chain(*makers[:: -1 if norm_first else 1])
    variables = trained_variables(model, images(5, 4))
    folded, (finding,) = fold_batch_norms(model, variables, images(5, 4))
    assert finding.layer == "dense"
    assert check_folded(model, variables, folded, images(5, 4)) < 1e-5
    layer = folded["params"]["dense"]
    for name, names in (("kernel", ("rows", "model")), ("bias", ("model",))):
        assert type(layer[name]) is type(variables["params"]["dense"]["kernel"])
        assert layer[name].names == names
        assert layer[name].value.ndim == len(names)


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("kind", ["norm first", "jit of layer", "own layer", "remat"])
def test_under_debug_flags(kind, flag):
    _, model = FOLDS[kind]
    with FLAGS[flag]():
        x = images(5, 4)
        variables = trained_variables(model, x)
        jax.jit(model.apply)(variables, x)
        folded, (finding,) = fold_batch_norms(model, variables, x)
        assert finding.reason is None
        assert check_folded(model, variables, folded, x) < 1e-5
        apply_folded(model, folded, x)


def test_every_normalisation_is_reported():
    model = chain(dense, norm)
    variables = trained_variables(model, images(5, 4))
    other = {"mean": jnp.zeros(4), "var": jnp.ones(4)}
    variables["batch_stats"]["elsewhere"] = other
    report = fold_batch_norms(model, variables, images(5, 4)).report
    assert report[1] == ("elsewhere", None, "no BatchNorm is called there")


def test_a_folded_normalisation_refuses_what_it_was_not_folded_for():
    class Switched(nn.Module):
        @nn.compact
        def __call__(self, x, train=False, mask=None):
            x = dense()(x)
            return bn_jax.linen.BatchNorm(name="norm")(x, not train, mask=mask)

    model, x = Switched(), images(5, 4)
    variables = trained_variables(model, x)
    folded, _ = fold_batch_norms(model, variables, x)
    with pytest.raises(ValueError, match="norm is folded, and is called to train"):
        apply_folded(model, folded, x, train=True)
    with pytest.raises(ValueError, match="norm is folded, and is called with mask"):
        apply_folded(model, folded, x, mask=jnp.ones((5, 1), bool))


def test_the_check_finds_what_differs():
    model, x = chain(dense, norm), images(5, 4)
    variables = trained_variables(model, x)
    folded, _ = fold_batch_norms(model, variables, x)
    assert 0 <= check_folded(model, variables, folded, x) < 1e-5
    kernel = folded["params"]["dense"]["kernel"]
    expected = model.apply(variables, x)
    for wrong in (1.01, jnp.nan):
        folded["params"]["dense"]["kernel"] = kernel.at[:, 2].multiply(wrong)
        with pytest.raises(ValueError, match=r"float32\).* at \(\d, 2\)"):
            check_folded(model, variables, folded, x)
    folded["params"]["dense"]["kernel"] = kernel * 1.01
    got = apply_folded(model, folded, x)
    error = jnp.abs(got - expected).max() / jnp.abs(expected).max()
    measured = check_folded(model, variables, folded, x, tolerance=1.0)
    np.testing.assert_allclose(measured, error, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("where", ["dtype", "param_dtype"])
def test_the_check_accepts_the_rounding_of_coarse_dtypes(where, dtype):
    options = {where: dtype}
    model = chain(partial(nn.Dense, 4, **options), partial(inference, **options))
    variables = trained_variables(model, images(50, 4))
    folded, (finding,) = fold_batch_norms(model, variables, images(50, 4))
    assert finding.reason is None
    assert 1e-4 < check_folded(model, variables, folded, images(50, 4)) < 5e-2


class Random(nn.Module):
    """Layers, normalisations and what is between them, drawn at random."""

    seed: int

    @nn.compact
    def __call__(self, x):
        rng = np.random.default_rng(self.seed)
        values, made = [x], set()
        for step in range(8):
            x = values[rng.choice([-1, -1, -1, rng.integers(len(values))])]
            kind = rng.integers(9)
            if kind <= 2:
                x = inference(bn_jax.linen.BatchNorm, name=f"norm_{step}")(x)
            elif kind <= 4:
                bias = bool(rng.integers(2))
                layer = nn.jit(nn.Dense) if rng.integers(2) else nn.Dense
                x = layer(4, use_bias=bias, name=f"dense_{step}")(x)
                made.add(f"dense_{step}")
            elif kind == 5:
                padding = ["SAME", "CIRCULAR"][rng.integers(2)]
                x = nn.Conv(4, (1 + 2 * rng.integers(2),), padding=padding)(x)
            elif kind == 6:
                x = nn.relu(x)
            elif kind == 7:
                x = x + values[rng.integers(len(values))]
            else:
                name = f"dense_{rng.integers(8)}"
                if name in made:
                    x = x @ self.variables["params"][name]["kernel"].T
            values.append(x)
        return values[-1], values[rng.integers(len(values))]


def test_reports_of_random_models_are_true():
    x, folds, stays = images(2, 5, 4), 0, 0
    for seed in range(30):
        model = Random(seed)
        variables = {"batch_stats": {}} | trained_variables(model, x)
        folded, report = fold_batch_norms(model, variables, x)
        error = check_folded(model, variables, folded, x)
        left = folded["batch_stats"].keys()
        assert left == {finding.norm for finding in report if finding.reason}
        folds += len(report) - len(left)
        stays += len(left)
        assert error < 1e-5, seed
    assert folds > 10
    assert stays > 10
