"""Sharing among more devices than gather: 32 of them, whole and in groups of 16.

Run by test_sharing.py in a process of its own, since the number of devices is fixed
when JAX starts.
"""

import re

import jax
import numpy as np

from tests.bn_jax.reference import Problem, assert_close, expected_step, make_problem
from tests.bn_jax.sharing import map_devices, shared_step, step_on_device

GROUPS = (tuple(range(0, 32, 2)), tuple(range(1, 32, 2)))


def assert_constant_size(problem: Problem) -> None:
    """Three collectives, of at most 4 numbers per feature each."""
    mapped = map_devices("unchecked", step_on_device(axis_name="a"), 32, replicated=2)
    parts = (np.reshape(array, (32, 3, 5)) for array in (problem.x, problem.dy))
    text = mapped.lower(*problem[:2], *parts).as_text()
    sums = re.findall(r'"stablehlo.all_reduce".*?-> tensor<([\dx]+)xf32>', text, re.S)
    assert sorted(sums) == ["2x5", "2x5", "4x5"], sums
    assert "all_gather" not in text


def main() -> None:
    """Compares every mode with one device that holds the group's examples."""
    assert jax.device_count() == 32
    problem = make_problem((96, 5), mean=300, seed=1)
    weights = np.float32(np.random.default_rng(0).integers(0, 3, (96, 1)))
    weights[3:9] = 0  # two devices have padding alone
    device = np.arange(96) // 3
    assert_constant_size(problem)
    for mode in ("pmap", "vmap", "checked", "unchecked"):
        for groups in (None, GROUPS):
            if mode == "vmap" and groups:
                continue
            step = shared_step(mode, problem, 32, weights, axis_index_groups=groups)
            sums = [0.0, 0.0]
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
                sums = [
                    total + part
                    for total, part in zip(sums, expected[-2:], strict=True)
                ]
            # Each device's gradients are its own part, but where they are summed.
            assert_close(step.dscale, sums[0], 6e-5, "dscale")
            assert_close(step.dbias, sums[1], 6e-5, "dbias")
    print("all the same")


if __name__ == "__main__":
    main()
