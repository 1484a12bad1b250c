"""Singular values of layers' Jacobians, while networks train."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import bn_jax
from bn_jax import BatchNormParams, BatchStats
from experiments.configuration.fields import as_tuple
from experiments.mnist.experiment import make_replicas
from experiments.running.tables import table
from experiments.training.state import TrainState
from experiments.why.data import Data, first
from experiments.why.figures import LABELS, add_legend, draw_line, grid
from experiments.why.networks import WITHOUT, Layer, affine
from experiments.why.part import Config, Measured, Part, Row, Setting
from experiments.why.probes.layer_jacobians import singular_values
from experiments.why.subjects import looks_of, mnist_network
from experiments.why.training import States, train

EXAMPLES = 8  # that Jacobians are taken at
PERCENTILES = (10, 50, 90)
# A name in the figure: the network, and whether its vectors are normalised first.
CURVES = {
    "without": (WITHOUT, False),
    "normalised": (WITHOUT, True),
    "batch_norm": ("batch_norm", True),
}


def settings(config: Config) -> list[dict[str, Any]]:
    """Each learning rate."""
    return [{"learning_rate": rate} for rate in as_tuple(config["learning_rates"])]


def measure(config: Config, data: Data, setting: Setting) -> Measured:
    """Percentiles, (looks, seeds, pairs of layers, percentiles), for every curve."""
    models = {
        name: mnist_network(config, data, normalisation=name)
        for name in (WITHOUT, "batch_norm")
    }
    replicas = make_replicas({**config, "learning_rate": setting["learning_rate"]})
    probe = first(data.training, config["probe_examples"]).images
    steps = looks_of(config["num_steps"], config["num_looks"])
    seen: dict[str, list[Any]] = {curve: [] for curve in CURVES}

    def look(_: int, states: States) -> None:
        for curve, (name, normalised) in CURVES.items():
            found = _look(normalised, config["epsilon"], states[name], probe)
            seen[curve].append(np.asarray(found).tolist())

    train(
        models,
        replicas,
        data.training,
        num_steps=config["num_steps"],
        batch_size=config["batch_size"],
        look=look,
        looks=steps,
    )
    return {"steps": steps, "networks": seen}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _look(normalised: bool, eps: float, states: TrainState, images: Any) -> jax.Array:
    def of_replica(state: TrainState) -> jax.Array:
        pairs = transformations(
            state.params[:-1], images.astype(jnp.float32), normalised, eps
        )
        return jnp.stack(
            [
                jnp.percentile(
                    singular_values(layer, x[:EXAMPLES]), jnp.array(PERCENTILES)
                )
                for layer, x in pairs
            ]
        )

    return jax.vmap(of_replica)(states)


def transformations(
    layers: Sequence[Layer], images: jax.Array, normalised: bool, eps: float
) -> Iterator[tuple[Callable[[jax.Array], jax.Array], jax.Array]]:
    """What sigmoid layers make of their inputs: from each to the next.

    Args:
      layers: the hidden ones of `networks.mlp` that normalises first, or not at all.
      images: (examples, inputs), a batch.
      normalised: take the vectors as the batch's moments normalise them.
      eps: added to the variance.

    Yields:
      For each pair of consecutive layers the transformation of one vector, and the
      vectors, (examples, units), that the earlier layer's nonlinearity is given,
      before scale and bias.
    """
    u = affine(layers[0], images)
    for layer, following in itertools.pairwise(layers):
        by = _moments_of(u, normalised, eps)
        x = _normalise(by, eps, u)
        # A network that does not normalise is given back what it knows.
        norm = layer.norm or BatchNormParams(jnp.sqrt(by.var + eps), by.mean)
        u = affine(following, _activate(norm, x))
        by_following = _moments_of(u, normalised, eps)
        yield functools.partial(_transform, norm, following, by_following, eps), x


def _moments_of(u: jax.Array, normalised: bool, eps: float) -> BatchStats:
    """The batch's, or those that normalise to the same again."""
    _, mean, var = bn_jax.moments(u)
    if normalised:
        return BatchStats(mean, var)
    return BatchStats(jnp.zeros_like(mean), jnp.full_like(var, 1 - eps))


def _normalise(by: BatchStats, eps: float, u: jax.Array) -> jax.Array:
    plain = BatchNormParams(None, None)
    return bn_jax.batch_norm(plain, by, u, train=False, eps=eps)[0]


def _activate(norm: Any, x: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(x * norm.scale + norm.bias)


def _transform(
    norm: Any, following: Layer, by: BatchStats, eps: float, x: jax.Array
) -> jax.Array:
    return _normalise(by, eps, affine(following, _activate(norm, x)))


def draw(rows: Sequence[Row]) -> Figure:
    """A column a pair of layers, a row a rate; medians, and bands of 10 to 90%."""
    pairs = np.shape(rows[0]["measured"]["networks"]["batch_norm"])[2]
    figure, panels = grid(len(rows), pairs, sharey=True)
    for line, row in zip(panels, rows, strict=True):
        for curve, values in row["measured"]["networks"].items():
            means = np.array(values, float).mean(1)  # (looks, pairs, percentiles)
            for panel, (low, middle, high) in zip(
                line, np.moveaxis(means, (1, 2), (0, 1)), strict=True
            ):
                draw_line(panel, row["measured"]["steps"], curve, middle, low, high)
        rate = row["setting"]["learning_rate"]
        for pair, panel in enumerate(line):
            panel.axhline(1, color="0.4", lw=0.8)
            panel.set_yscale("log")
            panel.set_title(
                f"layer {pair + 1} to {pair + 2}, rate {rate:g}",
                fontsize="medium",
            )
        line[0].set_ylabel("singular values")
    for panel in panels[-1]:
        panel.set_xlabel("training steps")
    add_legend(figure)
    return figure


def tables(rows: Sequence[Row]) -> str:
    """Percentiles at the start and at the end, means over seeds and layers."""
    cells = []
    for row in rows:
        for curve, values in row["measured"]["networks"].items():
            means = np.array(values, float).mean((1, 2))
            for when, (low, middle, high) in (("start", means[0]), ("end", means[-1])):
                cells.append(
                    [
                        f"{row['setting']['learning_rate']:g}",
                        LABELS[curve],
                        when,
                        *(float(low), float(middle), float(high), float(high / low)),
                    ]
                )
    header = ["rate", "network", "at the", "10%", "median", "90%", "90% / 10%"]
    return table(header, cells)


PART = Part("Singular values of layers' Jacobians", settings, measure, draw, tables)
