"""The networks that are measured, as pure functions."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import bn_jax
import bn_jax.linen
from bn_jax import BatchNormParams, BatchStats
from experiments.inception.layers import ACTIVATIONS
from experiments.inception.network import Inception
from experiments.inception.table import table_rows
from experiments.why.probes.noisy_norm import noisy_batch_norm
from experiments.why.probes.outside_gradient import normalise_outside_gradient


class Model(NamedTuple):
    """A network. Equal options give the same object, which is compiled once.

    Attributes:
      init: from a random key and the standard deviation of the initial weights to
        parameters and statistics.
      apply: (params, stats, inputs, train=, key=) -> logits and new statistics. The key
        is for dropout and noise.
      over_replicas: makes a function of one replica one of many, with a leading axis.
    """

    init: Callable[[jax.Array, jax.Array], tuple[Any, Any]]
    apply: Callable[..., tuple[jax.Array, Any]]
    over_replicas: Callable[[Callable[..., Any]], Callable[..., Any]] = jax.vmap


def one_after_another(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `jax.vmap`, in a loop."""
    return lambda *arrays: jax.lax.map(lambda each: function(*each), arrays)


class Layer(NamedTuple):
    """A dense layer; what it does not have is None."""

    kernel: jax.Array  # (inputs, outputs)
    bias: jax.Array | None
    norm: BatchNormParams | None


class Norm(NamedTuple):
    """What a normalisation has to know beside its input."""

    train: bool
    key: jax.Array
    decay: float
    epsilon: float


Normalisation = Callable[
    [BatchNormParams, BatchStats, jax.Array, Norm], tuple[jax.Array, BatchStats]
]


def _batch_norm(
    params: BatchNormParams, stats: BatchStats, x: jax.Array, norm: Norm
) -> tuple[jax.Array, BatchStats]:
    return bn_jax.batch_norm(
        params, stats, x, train=norm.train, decay=norm.decay, eps=norm.epsilon
    )


def _in_training(of_batch: Normalisation) -> Normalisation:
    """One that is batch normalisation at inference."""

    def normalise(
        params: BatchNormParams, stats: BatchStats, x: jax.Array, norm: Norm
    ) -> tuple[jax.Array, BatchStats]:
        return (of_batch if norm.train else _batch_norm)(params, stats, x, norm)

    return normalise


def _outside(centre_only: bool) -> Normalisation:
    return _in_training(
        lambda params, stats, x, norm: normalise_outside_gradient(
            params,
            stats,
            x,
            centre_only=centre_only,
            decay=norm.decay,
            eps=norm.epsilon,
        )
    )


NORMALISATIONS: Mapping[str, Normalisation] = {
    "batch_norm": _batch_norm,
    "noisy": _in_training(
        lambda params, stats, x, norm: noisy_batch_norm(
            norm.key, params, stats, x, decay=norm.decay, eps=norm.epsilon
        )
    ),
    "mean_outside": _outside(centre_only=True),
    "moments_outside": _outside(centre_only=False),
}
WITHOUT = "without"  # the name of a network without normalisation


@functools.lru_cache
def mlp(
    num_inputs: int,
    hidden: tuple[int, ...],
    num_classes: int,
    *,
    normalisation: str = "batch_norm",
    activation: str = "sigmoid",
    norm_first: bool = True,
    biased: bool = False,
    dropout_rate: float = 0.0,
    decay: float = 0.99,
    epsilon: float = 1e-3,
) -> Model:
    """The network of section 4.1: dense layers, then a linear one.

    Args:
      num_inputs: of an example.
      hidden: units of the hidden layers.
      num_classes: outputs.
      normalisation: a key of `NORMALISATIONS`, or `WITHOUT`.
      activation: "sigmoid", "relu" or "tanh".
      norm_first: g(BN(W u)), or else BN(g(W u + b)).
      biased: add a bias before the normalisation that comes first, which takes it away.
      dropout_rate: after each hidden layer, in training.
      decay: of the moving averages.
      epsilon: added to the variance.

    Returns:
      A model whose parameters are a tuple of `Layer`, and statistics one of
      `BatchStats` for each hidden layer that normalises.
    """
    nonlinearity = ACTIVATIONS[activation]
    normalises = normalisation != WITHOUT
    has_bias = biased or not (normalises and norm_first)

    def init(key: jax.Array, std: jax.Array) -> tuple[Any, Any]:
        sizes = (num_inputs, *hidden, num_classes)
        keys = jax.random.split(key, len(sizes) - 1)
        layers = [
            Layer(
                std * jax.random.normal(each, (inputs, outputs)),
                jnp.zeros(outputs) if has_bias else None,
                bn_jax.init_params(outputs) if normalises else None,
            )
            for each, inputs, outputs in zip(keys, sizes[:-1], sizes[1:], strict=True)
        ]
        layers[-1] = layers[-1]._replace(bias=jnp.zeros(num_classes), norm=None)
        stats = tuple(bn_jax.init_stats(units) for units in hidden if normalises)
        return tuple(layers), stats

    def apply(
        params: Sequence[Layer],
        stats: Sequence[BatchStats],
        inputs: jax.Array,
        *,
        train: bool,
        key: jax.Array,
    ) -> tuple[jax.Array, Any]:
        x, new_stats = inputs, []
        for number, layer in enumerate(params[:-1]):
            noise_key, dropout_key = jax.random.split(jax.random.fold_in(key, number))
            x = affine(layer, x)
            x = x if norm_first else nonlinearity(x)
            if layer.norm is not None:
                norm = Norm(train, noise_key, decay, epsilon)
                x, new = NORMALISATIONS[normalisation](
                    layer.norm, stats[number], x, norm
                )
                new_stats.append(new)
            x = nonlinearity(x) if norm_first else x
            if train and dropout_rate:
                kept = jax.random.bernoulli(dropout_key, 1 - dropout_rate, x.shape)
                x = jnp.where(kept, x / (1 - dropout_rate), 0)
        return affine(params[-1], x), tuple(new_stats)

    return Model(init, apply)


def affine(layer: Layer, x: jax.Array) -> jax.Array:
    """W u, and the bias if there is one."""
    y: jax.Array = x @ layer.kernel
    return y if layer.bias is None else y + layer.bias


@functools.lru_cache
def only_biases(model: Model) -> Model:
    """An `mlp` that trains its hidden layers' biases, and nothing else.

    All else counts as statistics, which training does not touch.
    """

    def init(key: jax.Array, std: jax.Array) -> tuple[Any, Any]:
        layers, stats = model.init(key, std)
        return tuple(layer.bias for layer in layers[:-1]), (layers, stats)

    def apply(params: Any, stats: Any, inputs: jax.Array, **options: Any) -> Any:
        layers, old = stats
        hidden = [
            layer._replace(bias=bias)
            for layer, bias in zip(layers[:-1], params, strict=True)
        ]
        logits, new = model.apply((*hidden, layers[-1]), old, inputs, **options)
        return logits, (layers, new)

    return Model(init, apply)


@functools.lru_cache
def deep_mlp(
    num_inputs: int,
    depth: int,
    width: int,
    num_classes: int,
    *,
    batch_norm: bool,
    activation: str,
    decay: float = 0.99,
    epsilon: float = 1e-3,
) -> Model:
    """As `mlp`, for many hidden layers of one width: a loop that is compiled once.

    The standard deviation of the initial weights is in units of 1 / sqrt(inputs of the
    layer).

    Args:
      num_inputs: of an example.
      depth: hidden layers, at least 2.
      width: units of each.
      num_classes: outputs.
      batch_norm: normalise before each nonlinearity.
      activation: "sigmoid", "relu" or "tanh".
      decay: of the moving averages.
      epsilon: added to the variance.
    """
    name = "batch_norm" if batch_norm else WITHOUT
    options: dict[str, Any] = {"decay": decay, "epsilon": epsilon}
    options |= {"normalisation": name, "activation": activation}
    # As a network of one hidden layer, whose last one is the next layer's product.
    first = mlp(num_inputs, (width,), num_classes, **options)
    nonlinearity = ACTIVATIONS[activation]

    def init(key: jax.Array, std: jax.Array) -> tuple[Any, Any]:
        first_key, key = jax.random.split(key)
        (start, end), stats = first.init(first_key, std)
        start = start._replace(kernel=start.kernel / num_inputs**0.5)
        end = end._replace(kernel=end.kernel / width**0.5)
        units = jnp.zeros((depth - 1, width))
        middle = Layer(
            std / width**0.5 * jax.random.normal(key, (depth - 1, width, width)),
            None if batch_norm else units,
            BatchNormParams(units + 1, units) if batch_norm else None,
        )
        more = (BatchStats(units, units + 1),) if batch_norm else ()
        return (start, middle, end), (*stats, *more)

    def apply(
        params: Any, stats: Any, inputs: jax.Array, *, train: bool, key: jax.Array
    ) -> Any:
        norm = Norm(train, key, decay, epsilon)

        def layer_of(x: jax.Array, both: tuple[Layer, Any]) -> tuple[jax.Array, Any]:
            layer, old = both
            x = affine(layer, x)
            if layer.norm is None:
                return nonlinearity(x), None
            x, new = _batch_norm(layer.norm, old, x, norm)
            return nonlinearity(x), new

        start, middle, end = params
        of_first, of_middle = stats if batch_norm else (None, None)
        x, new_first = layer_of(inputs, (start, of_first))
        x, new_middle = jax.lax.scan(layer_of, x, (middle, of_middle))
        new_stats = (new_first, new_middle) if batch_norm else ()
        return affine(end, x), new_stats

    return Model(init, apply)


@functools.lru_cache
def inception(
    num_classes: int,
    *,
    batch_norm: bool,
    width: float,
    decay: float = 0.99,
    epsilon: float = 1e-3,
) -> Model:
    """A narrow Inception with He's initial weights.

    Its parameters are a tuple of layers, from the input on: each of the stem's
    convolutions, each row of the table, the classifier.

    Args:
      num_classes: outputs.
      batch_norm: normalise before each nonlinearity.
      width: what the paper's channels are multiplied by.
      decay: of the moving averages.
      epsilon: added to the variance.
    """
    norm = functools.partial(bn_jax.linen.BatchNorm, momentum=decay, epsilon=epsilon)
    network = Inception(num_classes, norm=norm if batch_norm else None, width=width)
    rows = [f"row_{row.name}" for row in table_rows(width, network.pool_projection)]
    names = ("conv1", "conv2_reduce", "conv2", *rows, "classifier")

    def init(key: jax.Array, std: jax.Array) -> tuple[Any, Any]:
        del std
        variables = network.init(key, jnp.zeros((2, 32, 32, 3)), train=True)
        layers = tuple(variables["params"][name] for name in names)
        return layers, variables.get("batch_stats", {})

    def apply(
        params: Any, stats: Any, inputs: jax.Array, *, train: bool, key: jax.Array
    ) -> Any:
        del key  # there is no dropout
        variables = {
            "params": dict(zip(names, params, strict=True)),
            "batch_stats": stats,
        }
        logits, updated = network.apply(
            variables, inputs, train=train, mutable=["batch_stats"]
        )
        return logits, updated.get("batch_stats", {})

    # Side by side, convolutions would be grouped ones, which are slow on a CPU.
    return Model(init, apply, one_after_another)
