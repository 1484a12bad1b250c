"""From a published file to a run that is evaluated and gone on with."""

import json

import numpy as np
import pytest

from experiments.checkpoints.load import load_variables
from experiments.running.metrics import read_rows
from experiments.running.workdir import WorkdirError
from experiments.weights.errors import WeightsError
from experiments.weights.importing import import_weights
from tests.experiments.helpers import ORBAX_LEFTOVERS
from tests.experiments.inception.ensembles.test_trained_networks import load
from tests.experiments.inception.tiny_inception import (
    NUM_CLASSES,
    TinyInception,
    load_tiny,
    run_tiny,
    tiny_config,
)

pytestmark = pytest.mark.filterwarnings(ORBAX_LEFTOVERS)
CONFIG = tiny_config("bninception", num_steps=4, eval_every=4, checkpoint_every=4)


def write(path, classes=NUM_CLASSES):
    """What of bninception the tiny network has."""
    random = np.random.default_rng(0)
    name = "conv1_7x7_s2"
    shapes = {
        f"{name}.weight": (4, 3, 3, 3),
        **{f"{name}.bias": 4, f"{name}_bn.weight": 4, f"{name}_bn.bias": 4},
        **{f"{name}_bn.running_mean": 4, f"{name}_bn.running_var": 4},
        **{"last_linear.weight": (classes, 4), "last_linear.bias": classes},
    }
    arrays = {key: random.uniform(0.5, 1, shape) for key, shape in shapes.items()}
    np.savez(path, **arrays)
    return arrays


def import_tiny(path, workdir, config=CONFIG):
    import_weights(path, config, workdir, None, network=TinyInception, load=load_tiny())


def test_an_imported_network_is_evaluated_and_trained_further(tmp_path, capsys):
    arrays, workdir = write(tmp_path / "a.npz"), tmp_path / "run"
    import_tiny(tmp_path / "a.npz", workdir)
    variables = load_variables(workdir)
    np.testing.assert_allclose(
        variables["batch_stats"]["conv1"]["norm"]["mean"],
        arrays["conv1_7x7_s2_bn.running_mean"] - arrays["conv1_7x7_s2.bias"],
        atol=1e-7,
    )
    np.testing.assert_array_equal(
        variables["params"]["classifier"]["kernel"],
        arrays["last_linear.weight"].T.astype(np.float32),
    )
    (row,) = read_rows(workdir / "metrics.jsonl")
    assert row["step"] == 0
    assert f"top-1 {row['top1']:.2f}%" in capsys.readouterr().out

    (network,) = load(workdir, statistics="moving_average")
    assert (network.step, network.config["padding"]) == (0, "caffe")

    with pytest.raises(WorkdirError, match="holds a run that has begun"):
        import_tiny(tmp_path / "a.npz", workdir)

    run_tiny(CONFIG, workdir)
    assert "Going on from the checkpoint of step 0" in capsys.readouterr().out
    assert json.loads((workdir / "summary.json").read_text())["steps"] == 4
    assert [row["step"] for row in read_rows(workdir / "metrics.jsonl")] == [0, 4]


def test_other_classes_start_anew(tmp_path, capsys):
    write(tmp_path / "a.npz", classes=9)
    import_tiny(tmp_path / "a.npz", tmp_path / "run")
    assert "has 9 classes, the data 6" in capsys.readouterr().out
    classifier = load_variables(tmp_path / "run")["params"]["classifier"]
    assert classifier["bias"].shape == (NUM_CLASSES,)


def test_a_configuration_of_another_network(tmp_path):
    write(tmp_path / "a.npz")
    config = tiny_config("bn_x5")
    with pytest.raises(
        WeightsError, match=r"padding=tensorflow .*--config=bninception"
    ):
        import_tiny(tmp_path / "a.npz", tmp_path / "run", config)
    assert not (tmp_path / "run").exists()
