import json
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from experiments.running import dry_run
from experiments.running.dry_run import Measured, count, report, seconds
from tests.experiments.helpers import run_small, small_config
from tests.experiments.inception.tiny_inception import run_tiny, tiny_config

MEASURED = Measured(
    parameters={"small": 1_234_567, "large": 89},
    num_networks=6,
    memory=SimpleNamespace(
        argument_size_in_bytes=5 * 2**20,
        output_size_in_bytes=3 * 2**20,
        alias_size_in_bytes=2 * 2**20,
        temp_size_in_bytes=10 * 2**20,
    ),
    seconds_per_step=0.25,
    num_evaluations=10,
    seconds_per_evaluation=6.0,
)
CONFIG = {
    "num_steps": 20_000,
    "batch_size": 64,
    "parallelism": "pmap",
    "moments": "global",
}


def test_report():
    text = report(CONFIG, MEASURED)
    assert json.loads(text[text.index("{") : text.rindex("}") + 1]) == CONFIG
    assert "devices:      8 x cpu (cpu), pmap, moments=global, 8 examples each" in text
    assert "parameters:   small 1,234,567, large 89" in text
    assert "memory:       16.0 MiB a device" in text
    assert "250 ms a step, 256 examples/s" in text
    assert (
        "whole run:    1:24:20: 1:23:20 for 20,000 steps, 0:01:00 for 10 eval" in text
    )


def test_seconds_leaves_compilation_out():
    calls = []

    def function():
        calls.append(1)
        time.sleep(0.3 if len(calls) == 1 else 0.01)

    assert 0.01 <= seconds(function) < 0.2
    assert len(calls) == dry_run.WARM_UP + dry_run.REPEATS


def test_count():
    assert count({"a": jnp.zeros((3, 4)), "b": [jnp.zeros(5)]}) == 17


def test_inception_writes_nothing(tmp_path, capsys):
    workdir = tmp_path / "run"
    run_tiny(tiny_config(dry_run=True), workdir)
    assert not workdir.exists()
    text = capsys.readouterr().out
    assert "parameters:   bn_x5 " in text
    assert "for 10 steps" in text
    # Before the first step, and after 5 and 10.
    assert "for 3 evaluations" in text


def test_mnist_writes_nothing(tmp_path, capsys):
    run_small(small_config(dry_run=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    text = capsys.readouterr().out
    # 20 x 8 + 8 x 6 + 6 x 4 weights, 8 + 6 + 4 biases; scales and biases of 8 and 6.
    assert "parameters:   baseline 250, batch_norm 264" in text
    assert "networks:     4" in text
    assert jax.device_count() == 8


@pytest.mark.parametrize("key", ["parallelism", "moments"])
def test_a_wrong_word(key, tmp_path):
    with pytest.raises(ValueError, match=f"--config.{key}=alone: expected"):
        run_small(small_config(**{key: "alone"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
