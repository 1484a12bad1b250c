"""Every benchmark runs, tiny; and its contestants compute the same."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    compiled,
    libraries,
    mnist,
    network,
    op,
    report,
    results,
    scaling,
    targets,
)
from benchmarks import input as input_benchmark
from benchmarks.resnet import ResNet50
from tests.bn_jax.reference import lenient

TRAINING = "forward and backward"


def tiny(tmp_path, **options) -> argparse.Namespace:
    given = {"tiny": True, "rounds": 1, "output": tmp_path / "results.json"}
    return argparse.Namespace(**given, **options)


@pytest.mark.parametrize("name", libraries.JAX_LAYERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layers_compute_the_same(name, dtype):
    make = libraries.installed()[0].get(name)
    if make is None:
        pytest.skip("it is not installed")
    x = jax.random.normal(jax.random.key(0), (8, 5, 5, 4), dtype)
    expected = libraries.ours(x.shape, dtype, True)
    expected_y = expected.forward(expected.params, x)[0]
    with lenient():
        layer = make(x.shape, jnp.dtype(dtype), True)
        own = jnp.moveaxis(x, -1, 1) if layer.channels_first else x
        y = layer.forward(layer.params, own)[0]
    if layer.channels_first:
        y = jnp.moveaxis(y, 1, -1)
    # Haiku's and Equinox's statistics are in bfloat16.
    tolerance = 5e-6 if dtype == jnp.float32 else 0.06
    np.testing.assert_allclose(
        np.float32(y), np.float32(expected_y), rtol=tolerance, atol=tolerance
    )


def test_op():
    names = ("bn_jax", "flax.linen")
    rows = op.measure((4, 6, 6, 8), "bfloat16", True, TRAINING, 1, only=names)
    assert [row["name"] for row in rows] == [*names, "copy"]
    assert rows[0]["ratio"] == 1
    assert rows[0]["kept"] < rows[1]["kept"]
    assert [row["name"] for row in op.summarise(rows)] == ["flax.linen"]


def test_compiled(tmp_path):
    kept = {"target": "h200", "name": "of another target"}
    results.write(tmp_path / "results.json", {"rows": [kept]})
    flags = {"target": "cpu", "dtypes": "float32", "only": network.BARE}
    compiled.main(tiny(tmp_path, networks="inception", **flags))
    row, other = results.read(tmp_path / "results.json")["rows"]
    assert other == kept
    assert row["name"] == network.BARE
    assert row["temporary_megabytes"] > 0
    assert row["gigabytes"] > 0
    assert row["instructions"] > 100


@pytest.mark.parametrize("target", targets.TARGETS)
def test_a_compiler_that_is_not_installed(target, monkeypatch):
    missing = targets.TARGETS[target]._replace(plugin="no_such_package.no_module")
    monkeypatch.setitem(targets.TARGETS, target, missing)
    with pytest.raises(SystemExit, match=r"no compiler .* pip install 'jax\["):
        targets.devices(target)


def test_estimated_cycles():
    outside, *inside = (f'"estimated_cycles":"{cycles}"' for cycles in (7, 20, 3))
    hlo = "\n".join([outside, "ENTRY main", *inside])
    assert targets.estimated_cycles(hlo) == 23
    assert targets.estimated_cycles("a\nENTRY b") is None


def test_mnist(tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "BATCH", 16)  # which 8 devices can share
    mnist.main(tiny(tmp_path))
    rows = results.read(tmp_path / "results.json")["rows"]
    assert rows[0]["name"] == "bn_jax, scan"
    assert all(row["seconds_50000_steps"] > 0 for row in rows)


def test_input_makes_images_that_decode():
    encoded = input_benchmark.make_images(2)
    batches = input_benchmark.feed(encoded, 64, 0)
    batch = next(batches)
    batches.close()
    assert batch.images.shape == (input_benchmark.BATCH, 64, 64, 3)
    assert set(batch.labels) <= set(range(10))


def test_input_reads_a_folder_of_images(tmp_path):
    for number, image in enumerate(input_benchmark.make_images(2)):
        (tmp_path / f"{number}.JPEG").write_bytes(image)
    (tmp_path / "notes.txt").touch()
    images = input_benchmark.read_images(str(tmp_path), 7)
    assert images == input_benchmark.make_images(2)
    with pytest.raises(SystemExit, match="expected a folder of JPEGs"):
        input_benchmark.read_images(str(tmp_path / ".."), 7)


def test_resnet_50_has_its_parameters():
    def parameters(norm) -> int:
        init = ResNet50(norm=norm).init
        shapes = jax.eval_shape(
            lambda key: init(key, jnp.zeros((1, 64, 64, 3)), train=True),
            jax.random.key(0),
        )
        return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))

    assert parameters(network.FlaxNorm) == 25_557_032
    assert parameters(network.contestants()["bn_jax"].norm) == 25_557_032


@pytest.mark.parametrize("name", scaling.CONTESTANTS)
def test_collectives_of_both_passes(name):
    row = scaling.collectives_of(name, 4)
    assert row["collectives"] == 2
    assert row["bytes"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_network(mode):
    rows = network.measure(
        *("resnet50", 32, 1 / 16, 4),
        **{"dtype": "float32", "mode": mode, "rounds": 1},
        only=("bn_jax", "bn_jax, rematerialised", network.BARE),
    )
    assert rows[0]["name"] == "bn_jax"
    assert all(row["images_per_second"] > 0 for row in rows)


# Training steps of both networks take minutes to compile; ResNet's is measured above.
QUICK = {"network": ("--networks=resnet50", "--modes=inference")}


@pytest.mark.slow
@pytest.mark.parametrize("name", report.PARTS)
def test_commands(name, tmp_path):
    output = tmp_path / "results.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--tiny", "--rounds=1"]
    command += QUICK.get(name, ())
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    subprocess.run(
        [*command, f"--output={output}"],
        check=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert json.loads(output.read_text())["machine"]["packages"]["jax"]


def test_the_page_has_a_place_for_every_table():
    text = report.PAGE.read_text()
    for name, (draw, make_tables) in report.PARTS.items():
        content = results.read(results.RESULTS / f"{name}.json")
        assert draw(content).axes
        for marker, block in make_tables(content).items():
            text = report.replace_block(text, marker, block)
    # Nothing changes: the page shows the committed results.
    machines = report.replace_block
    for name in report.PARTS:
        content = results.read(results.RESULTS / f"{name}.json")
        text = machines(text, f"{name}-machine", report.describe(content["machine"]))
    for marker, block in report.compiled_tables(results.read(report.COMPILED)).items():
        text = report.replace_block(text, marker, block)
    assert text == report.PAGE.read_text()
