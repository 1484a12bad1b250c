"""One process of several that gather a population; started by test_population.

    python -m tests.bn_jax.population_process NUM_PROCESSES ID PORT

Reads batches, (batches, examples, features), as JSON; each process takes its share of
every batch, and all share moments. Prints, as one line of JSON, each layer's mean and
variance by pmap and by shard_map.
"""

import json
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import bn_jax


def network(stats, x):
    new = {}
    for name, features in (("first", 3), ("second", 3)):
        params = bn_jax.init_params(features)
        x, new[name] = bn_jax.batch_norm(
            params, stats[name], x, train=True, eps=1e-3, axis_name="all"
        )
        x = jax.numpy.tanh(x)[:, ::-1] ** 2
    return new


def main():
    num_processes, process, port = (int(argument) for argument in sys.argv[1:])
    jax.distributed.initialize(f"localhost:{port}", num_processes, process)
    batches = np.asarray(json.load(sys.stdin), np.float32)
    share = np.array_split(batches, num_processes, axis=1)[process]
    devices = jax.local_device_count()
    mesh = Mesh(np.array(jax.devices()), ("all",))
    placement = NamedSharding(mesh, PartitionSpec("all"))
    mapped = jax.pmap(network, axis_name="all", in_axes=(None, 0), out_axes=None)
    sharded = jax.jit(
        jax.shard_map(
            network,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec("all")),
            out_specs=PartitionSpec(),
        )
    )

    def by_pmap(stats, x):
        return mapped(stats, x.reshape(devices, -1, x.shape[-1]))

    def by_shard_map(stats, x):
        x = jax.make_array_from_process_local_data(placement, x)
        return jax.block_until_ready(sharded(stats, x))

    # Replicated over all processes, as the state of a training run is.
    stats = jax.device_put(
        {name: bn_jax.init_stats(3) for name in ("first", "second")},
        NamedSharding(mesh, PartitionSpec()),
    )
    found = [
        bn_jax.population_statistics(run, stats, share)
        for run in (by_pmap, by_shard_map)
    ]
    print(json.dumps(jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), found)))


if __name__ == "__main__":
    main()
