"""Folding whole nnx models: outputs, programs, reports."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import bn_jax.nnx
from bn_jax.nnx_folding import FoldedBatchNorm, check_folded, fold_batch_norms
from tests.bn_jax.debug_flags import FLAGS
from tests.bn_jax.reference import lenient


@pytest.fixture(autouse=True)
def flax_promotes():
    with lenient():
        yield


def trained(model: Any) -> Any:
    """Gives normalisations values as after training: none is 0 or 1."""
    rng = np.random.default_rng(0)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            for name in ("scale", "var", "bias", "mean"):
                variable = getattr(module, name)
                if variable is None:
                    continue
                low = 0.5 if name in ("scale", "var") else -1
                drawn = rng.uniform(low, 2, variable.shape)
                variable[...] = jnp.asarray(drawn, variable.dtype)
    model.eval()
    return model


def images() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (2, 9, 9, 4))


class Network(nnx.Module):
    """Layers in attributes and in lists, with and without biases."""

    def __init__(self, batch_norm: Any, rngs: nnx.Rngs, **options: Any) -> None:
        self.conv = nnx.Conv(4, 8, (3, 3), use_bias=False, rngs=rngs)
        self.norm = batch_norm(8, rngs=rngs, **options)
        self.blocks = nnx.List(
            [
                nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs),
                batch_norm(8, rngs=rngs),
                nnx.ConvTranspose(8, 3, (2, 2), rngs=rngs),
                batch_norm(3, use_scale=False, use_bias=False, rngs=rngs),
            ]
        )
        self.head = nnx.Sequential(
            nnx.Linear(3, 5, rngs=rngs), batch_norm(5, rngs=rngs), nnx.tanh
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("batch_norm", [nnx.BatchNorm, bn_jax.nnx.BatchNorm])
def test_a_folded_network_computes_the_same(batch_norm):
    model, x = trained(Network(batch_norm, nnx.Rngs(0))), images()
    before = jax.tree.leaves(nnx.state(model))
    folded, report = fold_batch_norms(model, x)
    assert [str(finding) for finding in report] == [
        "norm: folded into conv",
        "blocks.1: folded into blocks.0",
        "blocks.3: folded into blocks.2",
        "head.layers.1: folded into head.layers.0",
    ]
    expected, y = model(x), folded(x)
    assert jnp.abs(y - expected).max() < 1e-5 * jnp.abs(expected).max()
    after = jax.tree.leaves(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert not any(isinstance(m, nnx.BatchNorm) for _, m in nnx.iter_modules(folded))
    assert not jax.tree.leaves(nnx.state(folded, nnx.BatchStat))
    graph, state = nnx.split(folded)
    lowered = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, x)
    operations = set(re.findall(r"stablehlo\.(\w+)", lowered.as_text()))
    assert not operations & {"rsqrt", "sqrt", "multiply", "subtract", "divide"}


def test_fused_activation_stays():
    model = trained(Network(bn_jax.nnx.BatchNorm, nnx.Rngs(0), activation="relu"))
    folded, _ = fold_batch_norms(model, images())
    assert folded.norm.activation == "relu"
    np.testing.assert_allclose(folded(images()), model(images()), atol=1e-5)


class Odd(nnx.Module):
    """Where normalisations cannot be folded."""

    def __init__(self, kind: str, rngs: nnx.Rngs) -> None:
        self.kind = kind
        layer = nnx.LoRALinear if kind == "derived" else nnx.Linear
        options = {"lora_rank": 2} if kind == "derived" else {}
        self.dense = layer(4, 4, rngs=rngs, **options)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x: jax.Array) -> Any:
        if self.kind == "input":
            return self.norm(x)
        if self.kind == "shared layer":
            return self.norm(self.dense(self.dense(x)))
        if self.kind == "shared norm":
            return self.norm(self.dense(x)) + self.norm(self.dense(-x))
        y = self.dense(x)
        if self.kind == "activation":
            return self.norm(nnx.relu(y))
        if self.kind == "residual":
            return self.norm(y) + y
        if self.kind == "mask":
            return self.norm(y, mask=jnp.ones((2, 9, 9, 1), bool))
        return self.norm(y)


REASONS = {
    "input": "its input is one of the model",
    "shared layer": "of dense is used elsewhere, too",
    "shared norm": "it is called 2 times",
    "activation": "its input is a result of relu, not of a layer",
    "residual": "the output of dense is used elsewhere, too",
    "mask": "it is called with a mask",
    "derived": "its input is a result of add, not of a layer",
}


@pytest.mark.parametrize("kind", REASONS)
def test_what_cannot_be_folded_stays_and_says_why(kind):
    model = trained(Odd(kind, nnx.Rngs(0)))
    folded, (finding,) = fold_batch_norms(model, images())
    assert (finding.norm, finding.layer) == ("norm", None)
    assert re.search(REASONS[kind], finding.reason), finding.reason
    assert isinstance(folded.norm, nnx.BatchNorm)
    np.testing.assert_array_equal(folded(images()), model(images()))


def test_every_reference_to_a_folded_normalisation_is_replaced():
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(4, 4, rngs=rngs)
            self.alias = self.norm = nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dense(x))

    model = trained(Twice(nnx.Rngs(0)))
    folded, _ = fold_batch_norms(model, images())
    assert isinstance(folded.norm, FoldedBatchNorm)
    assert folded.alias is folded.norm
    np.testing.assert_allclose(folded(images()), model(images()), atol=1e-5)


def test_training_mode_is_an_error():
    model = trained(Network(nnx.BatchNorm, nnx.Rngs(0)))
    model.train()
    with pytest.raises(ValueError, match="norm normalises by the batch"):
        fold_batch_norms(model, images())


def test_saved_and_restored(tmp_path):
    model = trained(Network(nnx.BatchNorm, nnx.Rngs(0)))
    folded, _ = fold_batch_norms(model, images())
    graph, state = nnx.split(folded)
    leaves, structure = jax.tree.flatten(state)
    np.savez(tmp_path / "folded.npz", *leaves)
    with np.load(tmp_path / "folded.npz") as file:
        restored = jax.tree.unflatten(structure, [file[name] for name in file])
    again = nnx.merge(graph, restored)
    np.testing.assert_array_equal(again(images()), folded(images()))


def layer(rngs: nnx.Rngs, **options: Any) -> nnx.Linear:
    return nnx.Linear(4, 4, rngs=rngs, **options)


def norm(rngs: nnx.Rngs, kind: Any = bn_jax.nnx.BatchNorm, **options: Any) -> Any:
    return kind(4, rngs=rngs, **options)


class Holder(nnx.Module):
    """Layers and normalisations in any container."""

    def __init__(self, held: Any) -> None:
        self.held = held


CONTAINERS = {
    "list": lambda rngs: nnx.data([layer(rngs), norm(rngs)]),
    "tuple": lambda rngs: nnx.data((layer(rngs), norm(rngs))),
    "dict": lambda rngs: nnx.data({"a": layer(rngs), "b": norm(rngs)}),
    "nested": lambda rngs: nnx.data([{"a": (layer(rngs),)}, ([norm(rngs)],)]),
    "List": lambda rngs: nnx.List([layer(rngs), norm(rngs)]),
    "Dict": lambda rngs: nnx.Dict(a=layer(rngs), b=norm(rngs)),
    "List of Dict": lambda rngs: nnx.List([nnx.Dict(a=layer(rngs), b=norm(rngs))]),
    "Sequential": lambda rngs: nnx.Sequential(layer(rngs), norm(rngs)),
    "module": lambda rngs: Holder(nnx.data([layer(rngs), Holder(norm(rngs))])),
    "no pytree": lambda rngs: Plain([layer(rngs), norm(rngs)]),
}


class Plain(nnx.Module, pytree=False):
    """A module as Flax had them before, with lists as they are."""

    def __init__(self, held: Any) -> None:
        self.held = held


class Contained(nnx.Module):
    """Calls what it holds in the order of its leaves, from two places."""

    def __init__(self, rngs: nnx.Rngs, kind: str) -> None:
        self.first = CONTAINERS[kind](rngs)
        self.second = nnx.data(self.first)

    def __call__(self, x: jax.Array) -> jax.Array:
        def call(held: Any, x: jax.Array) -> jax.Array:
            if callable(held):
                return held(x)
            if isinstance(held, Holder | Plain):
                return call(held.held, x)
            for part in held.values() if hasattr(held, "values") else held:
                x = call(part, x)
            return x

        return call(self.second, x)


def norms_left(model: nnx.Module) -> int:
    return sum(isinstance(m, nnx.BatchNorm) for _, m in nnx.iter_modules(model))


def rows() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (5, 4))


@pytest.mark.parametrize("kind", CONTAINERS)
def test_what_any_container_holds_is_replaced(kind):
    model = trained(Contained(nnx.Rngs(0), kind))
    folded, (finding,) = fold_batch_norms(model, rows())
    assert finding.reason is None
    assert (norms_left(model), norms_left(folded)) == (1, 0)
    assert check_folded(model, folded, rows()) < 1e-5
    graph, state = nnx.split(folded)
    np.testing.assert_array_equal(nnx.merge(graph, state)(rows()), folded(rows()))


class LoudNorm(bn_jax.nnx.BatchNorm):
    """A class derived from a normalisation's that does more."""

    def __call__(self, x, *args, **kwargs):
        return 2 * super().__call__(x, *args, **kwargs)


class NamedNorm(bn_jax.nnx.BatchNorm):
    """A class derived from a normalisation's that does the same."""


class QuietLinear(nnx.Linear):
    """A class derived from a layer's that calls it, and does more."""

    def __call__(self, x):
        return 0.5 * super().__call__(x)


class OwnLayer(nnx.Module):
    """A layer that no class of Flax is behind."""

    def __init__(self, rngs: nnx.Rngs, use_bias: bool = True) -> None:
        self.w = nnx.Param(jax.random.normal(rngs.params(), (4, 4)))
        self.b = nnx.Param(jnp.ones(4)) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.w[...]
        return y if self.b is None else y + self.b[...]


class Model(nnx.Module):
    """A layer and a normalisation, and a second layer, called as a function says."""

    def __init__(self, rngs: nnx.Rngs, make: Any, call: Any) -> None:
        self.a, self.norm, self.b = layer(rngs), norm(rngs), layer(rngs)
        self.call = call
        make(self, rngs)

    def __call__(self, x: jax.Array) -> Any:
        return self.call(self, x)


def leave(model: Model, rngs: nnx.Rngs) -> None:
    """Changes nothing."""


def tie(model: Model, rngs: nnx.Rngs) -> None:
    model.b.kernel = model.a.kernel


def tie_bias(model: Model, rngs: nnx.Rngs) -> None:
    model.b.bias = model.a.bias


def tie_scale(model: Model, rngs: nnx.Rngs) -> None:
    model.other = norm(rngs)
    model.norm.scale = model.other.scale


def same_array(model: Model, rngs: nnx.Rngs) -> None:
    model.b.kernel[...] = model.a.kernel[...]


def put(**makers: Any) -> Any:
    def make(model: Model, rngs: nnx.Rngs) -> None:
        for name, maker in makers.items():
            setattr(model, name, maker(rngs))

    return make


def plain(model: Model, x: jax.Array) -> jax.Array:
    return model.b(nnx.relu(model.norm(model.a(x))))


def first(model: Model, x: jax.Array) -> jax.Array:
    return model.b(model.norm(nnx.relu(x)))


def over_layers(model: Model, x: jax.Array) -> jax.Array:
    axes = (nnx.Carry, None)
    step = nnx.scan(lambda x, m: (m.norm(m.a(x)), None), in_axes=axes, length=2)
    return step(x, model)[0]


def mapped(model: Model, x: jax.Array) -> jax.Array:
    return nnx.vmap(lambda m, row: m.norm(m.a(row)), in_axes=(None, 0))(model, x)


partial = functools.partial
no_bias = partial(layer, use_bias=False)
# Whether the normalisation folds; what the model is made of; how it is called.
FOLDS: dict[str, tuple[bool, Any, Any]] = {
    "plain": (True, leave, plain),
    "no bias": (True, put(a=no_bias), plain),
    "named norm": (True, put(norm=partial(norm, kind=NamedNorm)), plain),
    "loud norm": (False, put(norm=partial(norm, kind=LoudNorm)), plain),
    "quiet layer": (False, put(a=lambda r: QuietLinear(4, 4, rngs=r)), plain),
    "own layer": (True, put(a=OwnLayer), plain),
    "own layer, no bias": (False, put(a=partial(OwnLayer, use_bias=False)), plain),
    "tied kernel": (False, tie, plain),
    "tied kernel, one called": (False, tie, lambda m, x: m.norm(m.a(x))),
    "tied bias": (False, tie_bias, plain),
    "same array": (True, same_array, plain),
    "tied scale": (False, tie_scale, lambda m, x: m.other(nnx.relu(plain(m, x)))),
    "layer held twice": (True, lambda m, _: setattr(m, "c", m.a), plain),
    "decoder": (False, leave, lambda m, x: plain(m, x) @ m.a.kernel[...].T),
    "decoder by product": (
        False,
        put(a=no_bias),
        lambda m, x: m.norm(x @ m.a.kernel[...]),
    ),
    "penalty": (False, leave, lambda m, x: (plain(m, x), (m.a.kernel[...] ** 2).sum())),
    "output": (False, leave, lambda m, x: (plain(m, x), m.a.kernel[...])),
    "mean": (False, leave, lambda m, x: plain(m, x) - m.norm.mean[...]),
    "jit": (True, leave, nnx.jit(plain)),
    "remat": (True, leave, nnx.remat(plain)),
    "jit of a reader": (
        False,
        leave,
        lambda m, x: jax.jit(jnp.matmul)(plain(m, x), m.a.kernel[...]),
    ),
    "scan": (False, leave, over_layers),
    "vmap": (False, leave, mapped),
    "not called": (False, leave, lambda m, x: m.a(x)),
    "norm first": (True, leave, first),
    "norm first, no bias": (True, put(b=no_bias), first),
    "norm first, own layer": (True, put(b=OwnLayer), first),
    "norm first, own layer without bias": (
        False,
        put(b=partial(OwnLayer, use_bias=False)),
        first,
    ),
    "norm first, jit": (True, leave, nnx.jit(first)),
    "norm first, valid": (
        True,
        put(b=lambda r: nnx.Conv(4, 4, (2,), padding="VALID", rngs=r)),
        first,
    ),
    "norm first, same": (False, put(b=lambda r: nnx.Conv(4, 4, (2,), rngs=r)), first),
    "transposed": (
        True,
        put(a=lambda r: nnx.ConvTranspose(4, 4, (3,), transpose_kernel=True, rngs=r)),
        plain,
    ),
}


@pytest.mark.parametrize("name", FOLDS)
def test_the_report_is_true_before_and_after_calls(name):
    folds, make, call = FOLDS[name]
    model = trained(Model(nnx.Rngs(0), make, call))
    norms = norms_left(model)
    folded, report = fold_batch_norms(model, rows())
    assert len(report) == norms
    (finding,) = [finding for finding in report if finding.norm == "norm"]
    assert (finding.reason is None) == folds, finding
    assert isinstance(folded.norm, FoldedBatchNorm) == folds
    assert norms_left(folded) == sum(finding.reason is not None for finding in report)
    assert check_folded(model, folded, rows()) <= (1e-5 if folds else 0)
    nnx.jit(lambda model: model(rows()))(model)
    again = fold_batch_norms(model, rows())
    assert again.report == report
    assert check_folded(folded, again.model, rows()) == 0


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("names", [("rows", "model"), P("rows", "model")])
def test_sharding_metadata_stays(names, use_bias):
    options: dict[str, Any] = {
        "kernel_metadata": {"out_sharding": names, "eager_sharding": False},
        "use_bias": use_bias,
    }
    if use_bias:
        options["bias_metadata"] = {"out_sharding": names[1:], "eager_sharding": False}
    make = put(a=partial(layer, **options))
    model = trained(Model(nnx.Rngs(0), make, plain))
    folded, (finding,) = fold_batch_norms(model, rows())
    assert finding.reason is None
    assert check_folded(model, folded, rows()) < 1e-5
    assert folded.a.kernel.get_metadata()["out_sharding"] == names
    assert folded.a.bias.get_metadata()["out_sharding"] == names[1:]


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("kind", ["no bias", "jit", "norm first", "remat"])
def test_under_debug_flags(kind, flag):
    _, make, call = FOLDS[kind]
    with FLAGS[flag]():
        model = trained(Model(nnx.Rngs(0), make, call))
        folded, (finding,) = fold_batch_norms(model, rows())
        assert finding.reason is None
        assert check_folded(model, folded, rows()) < 1e-5


def test_shapes_are_enough():
    model = trained(Network(nnx.BatchNorm, nnx.Rngs(0)))
    shape = jax.ShapeDtypeStruct(images().shape, images().dtype)
    got, expected = fold_batch_norms(model, shape), fold_batch_norms(model, images())
    assert got.report == expected.report
    assert check_folded(expected.model, got.model, images()) == 0


@pytest.mark.parametrize("given", [{"mask": True}, {"use_running_average": False}])
def test_a_folded_normalisation_refuses_what_it_was_not_folded_for(given):
    model = trained(Model(nnx.Rngs(0), leave, plain))
    folded, _ = fold_batch_norms(model, rows())
    with pytest.raises(ValueError, match=r"is folded, and is called (with mask|to)"):
        folded.norm(rows(), **given)


def test_the_check_finds_what_differs():
    model = trained(Model(nnx.Rngs(0), leave, plain))
    folded, _ = fold_batch_norms(model, rows())
    folded.a.kernel[...] *= 1.01
    with pytest.raises(ValueError, match=r"of its largest output, expected at most"):
        check_folded(model, folded, rows())
    assert 1e-4 < check_folded(model, folded, rows(), tolerance=0.1) < 0.1
