"""Sharing among more devices than gather: 32 of them, whole and in groups of 16.

Run by test_sharing.py in a process of its own, since the number of devices is fixed
when JAX starts.
"""

import jax
import numpy as np

from tests.bn_jax.reference import assert_close, expected_step, make_problem
from tests.bn_jax.sharing import shared_step

GROUPS = (tuple(range(0, 32, 2)), tuple(range(1, 32, 2)))


def main() -> None:
    """Compares every mode with one device that holds the group's examples."""
    assert jax.device_count() == 32
    problem = make_problem((96, 5), mean=300, seed=1)
    weights = np.float32(np.random.default_rng(0).integers(0, 3, (96, 1)))
    weights[3:9] = 0  # two devices have padding alone
    device = np.arange(96) // 3
    for mode in ("pmap", "vmap", "checked", "unchecked"):
        for groups in (None, GROUPS):
            if mode == "vmap" and groups:
                continue
            step = shared_step(mode, problem, 32, weights, axis_index_groups=groups)
            for group in groups or (tuple(range(32)),):
                rows = np.isin(device, group)
                part = problem._replace(x=problem.x[rows], dy=problem.dy[rows])
                expected = expected_step(part, weights=weights[rows])
                devices = list(group)
                for name in ("mean", "var"):
                    field = getattr(step, name)[devices]
                    same = np.broadcast_to(field[:1], field.shape)
                    np.testing.assert_array_equal(field, same)
                    assert_close(field[0], getattr(expected, name), 2e-6, name)
                # Half a unit in the last place of the mean, twice.
                assert_close(step.y[rows], expected.y, 6e-5, "y")
                assert_close(step.dx[rows], expected.dx, 6e-5, "dx")
    print("all the same")


if __name__ == "__main__":
    main()
