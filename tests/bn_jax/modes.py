"""Every public function in every mode that JAX runs functions in.

    python -m tests.bn_jax.modes

prints the table of docs/modes.md; `test_modes.py` runs each of its cells.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import bn_jax
from bn_jax import BatchNormParams, BatchStats, collectives
from tests.bn_jax.debug_flags import FLAGS

FEATURES, BATCH, DEVICES = 4, 16, 4
RANDOM = np.random.default_rng(0)
PARAMS = BatchNormParams(np.float32([0.5, 1, 2, -1]), np.float32([0.1, -0.2, 0.3, 0.0]))
STATS = BatchStats(np.float32([0.1, 0.2, -0.3, 0]), np.float32([1, 0.5, 2, 1]))
X = RANDOM.normal(0.5, 1.5, (BATCH, 3, FEATURES)).astype(np.float32)
WEIGHTS = RANDOM.integers(1, 3, (BATCH, 1, 1)).astype(np.float32)
KERNEL = RANDOM.normal(size=(FEATURES, FEATURES)).astype(np.float32)


class Outputs(NamedTuple):
    """What a function gives; in mapped modes the devices' examples are concatenated."""

    examples: Any = None  # arrays with x's batch axis
    features: Any = None  # arrays that are the same on every device


export.register_namedtuple_serialization(Outputs, serialized_name="tests.Outputs")

# Of x, weights, and the name of the devices' axis or None.
Function = Callable[[jax.Array, jax.Array, str | None], Outputs]


def train(x: jax.Array, weights: jax.Array, axis_name: str | None) -> Outputs:
    return Outputs(
        *bn_jax.batch_norm(
            PARAMS, STATS, x, train=True, weights=weights, axis_name=axis_name
        )
    )


def infer(x: jax.Array, weights: jax.Array, axis_name: str | None) -> Outputs:
    return Outputs(*bn_jax.batch_norm(PARAMS, STATS, x, train=False))


def gradient(x: jax.Array, weights: jax.Array, axis_name: str | None) -> Outputs:
    def loss(x: jax.Array, weights: jax.Array) -> jax.Array:
        y, _ = bn_jax.batch_norm(
            PARAMS,
            STATS,
            x,
            train=True,
            weights=weights,
            axis_name=axis_name,
            activation="silu",
        )
        return jnp.sum(jnp.sin(y))

    return Outputs(jax.grad(loss, argnums=(0, 1))(x, weights))


def renormalise(x: jax.Array, weights: jax.Array, axis_name: str | None) -> Outputs:
    y, stats = bn_jax.batch_renorm(
        PARAMS, STATS, x, train=True, r_max=1.5, d_max=0.5, axis_name=axis_name
    )
    return Outputs(y, stats)


def ghost(x: jax.Array, weights: jax.Array, axis_name: str | None) -> Outputs:
    # Virtual batches stay on their device, and so do their statistics.
    y, stats = bn_jax.ghost_batch_norm(
        PARAMS, STATS, x, train=True, virtual_batch_size=4, weights=weights
    )
    if axis_name is not None:
        stats = jax.lax.pmean(stats, axis_name)
    return Outputs(y, stats.mean if axis_name is None else None)


def moments(x: jax.Array, weights: jax.Array, axis_name: str | None) -> Outputs:
    found = bn_jax.moments(x, weights=weights, axis_name=axis_name)
    return Outputs(features=(found, bn_jax.merge_moments(found, found, found)))


def population(x: jax.Array, weights: jax.Array, axis_name: str | None) -> Outputs:
    def run(stats: Any, batch: jax.Array) -> Any:
        return bn_jax.batch_norm(PARAMS, stats, batch, train=True, axis_name=axis_name)[
            1
        ]

    return Outputs(features=bn_jax.population_statistics(run, STATS, [x, x + 1]))


def fold(x: jax.Array, weights: jax.Array, axis_name: str | None) -> Outputs:
    kernel, bias = bn_jax.fold_dense(KERNEL, None, PARAMS, STATS, eps=1e-5)
    y = jax.lax.dot_general(x, kernel, (((2,), (0,)), ((), ())))
    y = y + jnp.expand_dims(bias, (0, 1))
    others = (
        bn_jax.inference_affine(PARAMS, STATS, eps=1e-5),
        bn_jax.fold_conv(KERNEL[None], None, PARAMS, STATS, eps=1e-5),
    )
    return Outputs(y, others)


def accumulate(x: jax.Array, weights: jax.Array, axis_name: str | None) -> Outputs:
    def loss(
        params: BatchNormParams, stats: Any, batch: jax.Array
    ) -> tuple[jax.Array, Any]:
        y, stats = bn_jax.batch_norm(
            params, stats, batch, train=True, axis_name=axis_name
        )
        return jnp.sum(jnp.sin(y)), stats

    # One copy a device where `jax.shard_map` knows it: gradients are each one's part.
    params = jax.tree.map(
        lambda param: collectives.vary_over(
            jnp.asarray(param), collectives.varying_axes(x)
        ),
        PARAMS,
    )
    (_, stats), grads = bn_jax.accumulate_gradients(
        loss, params, STATS, jnp.stack([x, x + 1])
    )
    if axis_name is not None:
        grads = jax.lax.psum(grads, axis_name)
    return Outputs(features=(stats, grads))


FUNCTIONS: dict[str, Function] = {
    "`batch_norm`, training": train,
    "its gradient": gradient,
    "`batch_norm`, inference": infer,
    "`batch_renorm`": renormalise,
    "`ghost_batch_norm`": ghost,
    "`moments`, `merge_moments`": moments,
    "`population_statistics`": population,
    "`accumulate_gradients`": accumulate,
    "`fold_dense`, `fold_conv`, `inference_affine`": fold,
}


def plainly(function: Function) -> Outputs:
    return function(jnp.asarray(X), jnp.asarray(WEIGHTS), None)


def compiled(function: Function) -> Outputs:
    return jax.jit(function, static_argnums=2)(X, WEIGHTS, None)


def in_scan(function: Function) -> Outputs:
    def step(carry: None, _: None) -> tuple[None, Outputs]:
        return carry, function(jnp.asarray(X), jnp.asarray(WEIGHTS), None)

    _, outputs = jax.lax.scan(step, None, None, length=2)
    return jax.tree.map(lambda leaf: leaf[1], outputs)


def in_checkpoint(function: Function) -> Outputs:
    return jax.jit(jax.checkpoint(lambda x, w: function(x, w, None)))(X, WEIGHTS)


def over_a_further_axis(function: Function) -> Outputs:
    several = jax.vmap(lambda x, w: function(x, w, None))
    outputs = several(jnp.stack([X, X + 1]), jnp.stack([WEIGHTS, WEIGHTS]))
    return jax.tree.map(lambda leaf: leaf[0], outputs)


def exported(function: Function) -> Outputs:
    (batch,) = export.symbolic_shape("4*b")
    shapes = [(batch, *array.shape[1:]) for array in (X, WEIGHTS)]
    arguments = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    program = export.export(jax.jit(lambda x, w: function(x, w, None)))(*arguments)
    restored = export.deserialize(program.serialize(vjp_order=0))
    return restored.call(X, WEIGHTS)


def _split(array: np.ndarray) -> np.ndarray:
    return array.reshape(DEVICES, -1, *array.shape[1:])


def _joined(outputs: Outputs) -> Outputs:
    """Of results that have a leading axis of the devices."""
    outputs = jax.tree.map(np.asarray, outputs)
    for leaf in jax.tree.leaves(outputs.features):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    return Outputs(
        jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs.examples),
        jax.tree.map(lambda leaf: leaf[0], outputs.features),
    )


def by_pmap(function: Function) -> Outputs:
    mapped = jax.pmap(lambda x, w: function(x, w, "devices"), axis_name="devices")
    return _joined(mapped(_split(X), _split(WEIGHTS)))


def by_vmap(function: Function) -> Outputs:
    mapped = jax.vmap(lambda x, w: function(x, w, "devices"), axis_name="devices")
    return _joined(jax.jit(mapped)(_split(X), _split(WEIGHTS)))


def _by_shard_map(function: Function, check_vma: bool) -> Outputs:
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("devices",))

    def one_device(x: jax.Array, w: jax.Array) -> Outputs:
        outputs = function(x, w, "devices")
        return jax.tree.map(lambda leaf: leaf[None], outputs)

    mapped = jax.shard_map(
        one_device,
        mesh=mesh,
        in_specs=PartitionSpec("devices"),
        out_specs=PartitionSpec("devices"),
        check_vma=check_vma,
    )
    return _joined(jax.jit(mapped)(X, WEIGHTS))


def by_checked_shard_map(function: Function) -> Outputs:
    return _by_shard_map(function, True)


def by_unchecked_shard_map(function: Function) -> Outputs:
    return _by_shard_map(function, False)


def _over_a_mesh(function: Function, kind: AxisType, x_spec: PartitionSpec) -> Outputs:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, x_spec))
        weights = jax.device_put(WEIGHTS, NamedSharding(mesh, PartitionSpec("data")))
        outputs = jax.jit(lambda x, w: function(x, w, None))(x, weights)
        for leaf in jax.tree.leaves(outputs.examples):
            if kind == AxisType.Explicit and function not in (gradient, fold):
                assert leaf.sharding.is_equivalent_to(x.sharding, x.ndim)
    return jax.tree.map(np.asarray, outputs)


def automatic_shardings(function: Function) -> Outputs:
    return _over_a_mesh(function, AxisType.Auto, PartitionSpec("data"))


def explicit_shardings(function: Function) -> Outputs:
    return _over_a_mesh(function, AxisType.Explicit, PartitionSpec("data"))


def explicit_shardings_of_features(function: Function) -> Outputs:
    spec = PartitionSpec("data", None, "model")
    return _over_a_mesh(function, AxisType.Explicit, spec)


def under(flag: str) -> Callable[[Function], Outputs]:
    def run(function: Function) -> Outputs:
        with FLAGS[flag]():
            # A function of its own, so that nothing traced before is used.
            return jax.jit(lambda x, w: function(x, w, None))(X, WEIGHTS)

    return run


MODES: dict[str, Callable[[Function], Outputs]] = {
    "eager": plainly,
    "`jit`": compiled,
    "`scan`": in_scan,
    "`checkpoint`": in_checkpoint,
    "`vmap`": over_a_further_axis,
    "`vmap`, named axis": by_vmap,
    "`pmap`": by_pmap,
    "`shard_map`": by_checked_shard_map,
    "`shard_map`, `check_vma=False`": by_unchecked_shard_map,
    "automatic shardings": automatic_shardings,
    "explicit shardings": explicit_shardings,
    "explicit, features divided": explicit_shardings_of_features,
    "`export`, symbolic batch": exported,
    **{f"`{flag}`": under(flag) for flag in FLAGS},
}


def table() -> str:
    """The table of docs/modes.md."""
    lines = [["", *FUNCTIONS], ["---"] * (1 + len(FUNCTIONS))]
    lines += [[mode, *["yes"] * len(FUNCTIONS)] for mode in MODES]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table())
