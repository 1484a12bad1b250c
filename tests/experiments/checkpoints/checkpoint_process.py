"""One process of several that save and restore; started by test_saving_processes.

    python -m tests.experiments.checkpoints.checkpoint_process NUM ID PORT FOLDER ACTION

Prints what came of it as one line of JSON.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.checkpoints import save as saving
from experiments.checkpoints.save import Checkpoints
from experiments.checkpoints.stored import CheckpointError, DamagedError
from experiments.training.state import TrainState


def make_states(mesh: Mesh, value: float) -> dict[str, TrainState]:
    """Replicated over all devices of all processes, and told apart by one value."""
    host = TrainState(
        step=np.int32(value),
        params={"dense": {"kernel": np.full((3, 2), value, np.float32)}},
        batch_stats={},
        opt_state=(np.full(5, value, np.float32),),
    )
    placement = NamedSharding(mesh, PartitionSpec())
    return {
        "network": jax.tree.map(
            lambda leaf: jax.make_array_from_callback(
                np.shape(leaf), placement, lambda index: np.asarray(leaf)[index]
            ),
            host,
        )
    }


def damage_seen_by_last_process_alone() -> None:
    read = saving.read_arrays

    def read_badly(folder, metadata):
        if folder.name == "3" and jax.process_index() == jax.process_count() - 1:
            raise DamagedError("a bad cable")
        return read(folder, metadata)

    saving.read_arrays = read_badly


def main() -> None:
    num_processes, process, port = (int(argument) for argument in sys.argv[1:4])
    folder, action = Path(sys.argv[4]), sys.argv[5]
    if num_processes > 1:
        jax.distributed.initialize(f"localhost:{port}", num_processes, process)
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    checkpoints = Checkpoints(folder)
    if action == "damage":
        damage_seen_by_last_process_alone()
    if action == "elsewhere" and process:
        checkpoints = Checkpoints(folder / "elsewhere")
    try:
        found = checkpoints.restore_newest(make_states(mesh, 0.0))
    except CheckpointError as error:
        print(json.dumps({"error": str(error)}))
        return
    if action == "save" or (action == "damage" and found is not None):
        first = found[0] + 1 if found else 1
        for step in range(first, 4):
            checkpoints.save(step, make_states(mesh, step), float(step))
        checkpoints.close()
    result = None
    if found is not None:
        state = found[1]["network"]
        result = {
            "step": found[0],
            "values": sorted(
                {float(x) for leaf in jax.tree.leaves(state) for x in np.ravel(leaf)}
            ),
            "devices": len(state.step.sharding.device_set),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
