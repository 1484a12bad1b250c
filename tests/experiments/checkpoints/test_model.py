"""A run's network in one call, and as a program: both see what training saw."""

import json
import shutil
import subprocess
import sys
from typing import Any

import jax
import jax.export
import numpy as np
import pytest

from experiments.checkpoints import export
from experiments.checkpoints.load import load_variables
from experiments.checkpoints.model import load_model
from experiments.checkpoints.networks import InputForm
from experiments.checkpoints.stored import CheckpointError
from experiments.inception.training import POPULATION
from tests.experiments.helpers import (
    ORBAX_LEFTOVERS,
    command_environment,
    make_image_set,
)
from tests.experiments.inception.tiny_inception import (
    NUM_CLASSES,
    TinyInception,
    run_tiny,
    tiny_config,
    tiny_data,
)

pytestmark = pytest.mark.filterwarnings(ORBAX_LEFTOVERS)


@pytest.mark.parametrize("network", ["baseline", "batch_norm"])
@pytest.mark.parametrize("replica", [0, 1])
def test_it_classifies_as_the_run_did(finished, network, replica):
    """The accuracy on the test set is that of the run's last evaluation."""
    model = load_model(finished, network=network, replica=replica)
    data = make_image_set()
    predicted = model.predict(data.test_images)
    assert predicted.shape == (len(data.test_images), 4)
    np.testing.assert_allclose(predicted.sum(1), 1, rtol=1e-5)
    accuracy = 100 * np.mean(predicted.argmax(1) == data.test_labels)
    rows = map(json.loads, (finished / "metrics.jsonl").read_text().splitlines())
    *_, last = (row for row in rows if row["network"] == network)
    assert accuracy == pytest.approx(last["accuracy"][replica])
    assert model.class_names == ("0", "1", "2", "3")


def test_the_network_is_a_flax_module(finished):
    model = load_model(str(finished), network="batch_norm")
    pixels = model.inputs.cut(make_image_set().test_images[:5])
    inputs = model.inputs.from_pixels(pixels)
    logits = model.network.apply(model.variables, inputs, train=False)
    np.testing.assert_allclose(
        jax.nn.softmax(logits),
        model.predict(make_image_set().test_images[:5]),
        rtol=1e-5,
    )
    # And trains further, on one device.
    model.network.apply(model.variables, inputs, train=True, mutable=["batch_stats"])


def test_what_is_not_there(finished):
    with pytest.raises(CheckpointError, match="expected one of baseline, batch_norm"):
        load_model(finished)
    with pytest.raises(CheckpointError, match="no replica 2: expected 0 to 1"):
        load_model(finished, network="baseline", replica=2)


@pytest.mark.parametrize("binarise", [True, False])
def test_inputs_are_those_of_training(binarise):
    from experiments.data.image_set import to_inputs

    images = make_image_set().test_images
    scale = 1.0 if binarise else 1 / 255
    form = InputForm((20,), scale, 0.0, threshold=127 if binarise else None)
    expected = scale * to_inputs(images, binarise)
    found = form.from_pixels(form.cut(images))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("form", "image", "expected"),
    [
        (InputForm((20,), 1.0, 0.0), np.zeros((5, 5, 1), np.uint8), "expected 20 pix"),
        (InputForm((20,), 1.0, 0.0), np.zeros((5, 4, 1)), "is float64: expected uint8"),
        (
            InputForm((8, 8, 3), 1.0, 0.0, crop_fraction=1.0),
            np.zeros((9, 9), np.uint8),
            r"expected \(height, width, 3\)",
        ),
    ],
)
def test_other_images_are_refused(form, image, expected):
    with pytest.raises(ValueError, match=expected):
        form.cut([image])


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("tiny")
    run_tiny(tiny_config("bn_x5"), workdir)
    return workdir


def test_inception(tiny_run):
    """Statistics of the population where there are any, and images of any size."""
    model = load_model(tiny_run, inception=TinyInception)
    of_population = load_variables(tiny_run / POPULATION)
    for one, other in zip(
        jax.tree.leaves(model.variables), jax.tree.leaves(of_population), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    averages = load_model(tiny_run / "checkpoints", inception=TinyInception)
    mean = [
        loaded.variables["batch_stats"]["conv1"]["norm"]["mean"]
        for loaded in (averages, model)
    ]
    assert not np.array_equal(*mean)
    test: Any = tiny_data(tiny_config()).test
    right = model.predict(test.images).argmax(1) == test.labels
    summary = json.loads((tiny_run / "summary.json").read_text())
    assert 100 * right.mean() == pytest.approx(summary["final"]["population"]["top1"])
    images = [np.full((40, 50, 3), 7, np.uint8), np.full((64, 33, 1), 9, np.uint8)]
    assert model.predict(images).shape == (2, NUM_CLASSES)


SERVE = """
import sys, jax.export, numpy as np
program = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
for batch in (1, 3):
    print(program.call(np.full((batch, 20), 200, np.uint8)).shape)
images = np.load(sys.argv[2])
np.save(sys.argv[3], program.call(images))
print([name for name in sys.modules if name.split(".")[0] in ("bn_jax", "flax")])
"""


@pytest.mark.parametrize("fold", [False, True])
def test_a_program_runs_without_the_package(finished, tmp_path, fold, capsys):
    output = tmp_path / "network.stablehlo"
    export.export(finished, "newest", str(output), "batch_norm", fold, replica=1)
    out = capsys.readouterr().out
    assert ("BatchNorm_1: folded into Dense_1" in out) == fold
    assert f"{output}: a program for cpu, cuda, rocm, tpu, " in out
    images = make_image_set().test_images
    np.save(tmp_path / "images.npy", images.reshape(len(images), -1))
    files = [str(tmp_path / name) for name in ("images.npy", "found.npy")]
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(output), *files],
        cwd=tmp_path,
        env=command_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["(1, 4)", "(3, 4)", "[]"]
    expected = load_model(finished, network="batch_norm", replica=1).predict(images)
    np.testing.assert_allclose(np.load(files[1]), expected, rtol=1e-4, atol=1e-6)


def test_a_program_of_no_experiment_here(finished, tmp_path):
    copied = shutil.copytree(finished / "checkpoints", tmp_path / "copied")
    output = str(tmp_path / "network.stablehlo")
    with pytest.raises(CheckpointError, match="expected one of baseline"):
        export.export(copied, "newest", output, None, False)
    assert not list(tmp_path.glob("network*"))
