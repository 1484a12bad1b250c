"""The launch scripts, with stand-ins for the programs of a cluster."""

import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from experiments.running.stopping import FAILED, TRY_AGAIN
from tests.experiments.helpers import REPOSITORY, command_environment

LAUNCH = REPOSITORY / "launch"
SMALL = [
    *("--config.hidden=(8,)", "--config.batch_size=64", "--config.num_seeds=1"),
    *("--config.num_steps=20", "--config.population_batches=4"),
]
# What Slurm sets for a task, as far as JAX reads it.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do
  SLURM_JOB_ID=4242 SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_PROCID=$task \\
    SLURM_LOCALID=$task SLURM_STEP_NUM_NODES=1 "$@" > "$FOLDER/task$task.log" 2>&1 &
  pids[task]=$!
done
code=0
for task in 0 1; do
  wait "${pids[task]}" || code=$?
done
exit $code
"""
ECHO = """#!/usr/bin/env bash
printf '%s\\n' "${0##*/} $(printf '%q ' "$@")" >> "$FOLDER/calls"
"""


def write_program(folder: Path, name: str, content: str) -> None:
    path = folder / name
    path.write_text(content)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def cluster(tmp_path):
    """An environment whose programs write what they are called with to a file."""
    programs = tmp_path / "bin"
    programs.mkdir()
    write_program(programs, "srun", SRUN)
    for name in ("scontrol", "gcloud"):
        write_program(programs, name, ECHO)
    # As it stands in a virtual environment.
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    python = f'#!/usr/bin/env bash\nexec {shlex.quote(sys.executable)} "$@"\n'
    write_program(tmp_path / "venv" / "bin", "python", python)
    return command_environment(
        PATH=f"{programs}:{os.environ['PATH']}",
        FOLDER=str(tmp_path),
        VENV=str(tmp_path / "venv"),
        SLURM_JOB_ID="4242",
        # JAX gives each task one device of its node.
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )


def launch(script, *arguments, environment):
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("script", ["machine.sh", "tpu_slice.sh", "slurm.sbatch"])
def test_without_arguments(script, cluster):
    ended = launch(script, environment=cluster)
    assert ended.returncode == 2
    assert "usage: " in ended.stderr
    assert "MODULE [ARGUMENTS ...]" in ended.stderr


def test_one_machine(cluster, tmp_path):
    ended = launch(
        *("machine.sh", "cpu", "experiments.mnist", *SMALL),
        *(f"--workdir={tmp_path / 'run'}", "--config.dry_run=True"),
        environment=cluster,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Dry run: nothing was written." in ended.stdout
    assert not (tmp_path / "run").exists()


def test_an_unknown_platform(cluster):
    ended = launch("machine.sh", "abacus", "experiments.mnist", environment=cluster)
    assert ended.returncode == 2
    assert "cpu|gpu|tpu" in ended.stderr


def test_a_tpu_slice_receives_the_arguments_as_they_are(cluster, tmp_path):
    arguments = ["experiments.inception", "--config=a b.py:x", "--workdir=/mnt/it's"]
    ended = launch("tpu_slice.sh", "slice", "zone", *arguments, environment=cluster)
    assert ended.returncode == 0, ended.stderr
    copy, command = (tmp_path / "calls").read_text().splitlines()
    assert copy.startswith("gcloud compute tpus tpu-vm scp ")
    assert copy.rstrip().endswith("slice:bn_jax.tar.gz --zone=zone --worker=all")
    *words, script = shlex.split(command)
    assert words[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh"]
    assert words[5:] == ["slice", "--zone=zone", "--worker=all", "--command"]
    *_, on_worker = script.split("&&")
    expected = ["bn_jax/launch/machine.sh", "tpu", *arguments, "--distributed=on"]
    assert shlex.split(on_worker) == expected


@pytest.mark.slow
def test_two_tasks_under_slurm(cluster, tmp_path):
    """With the variables that Slurm sets; JAX finds the processes by them."""
    workdir = f"--workdir={tmp_path / 'run'}"
    ended = launch(
        *("slurm.sbatch", "experiments.mnist", *SMALL, workdir), environment=cluster
    )
    logs = [(tmp_path / f"task{task}.log").read_text() for task in (0, 1)]
    assert ended.returncode == 0, logs
    assert "summary.json, metrics and checkpoints are in" in logs[0]
    assert "summary.json, metrics" not in logs[1]
    assert '"processes": 2' in (tmp_path / "run" / "summary.json").read_text()
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize("code", [0, FAILED, TRY_AGAIN, 134])
def test_a_job_that_can_go_on_is_queued_again(cluster, tmp_path, code):
    write_program(tmp_path / "bin", "srun", f"#!/usr/bin/env bash\nexit {code}\n")
    ended = launch("slurm.sbatch", "experiments.mnist", environment=cluster)
    assert ended.returncode == code
    again = code in (TRY_AGAIN, 134)
    assert (tmp_path / "calls").exists() == again
    if again:
        assert (tmp_path / "calls").read_text() == "scontrol requeue 4242 \n"


def test_the_job_for_kubernetes():
    service, job = yaml.safe_load_all((LAUNCH / "gke.yaml").read_text())
    specification = job["spec"]
    pod = specification["template"]["spec"]
    (container,) = pod["containers"]
    flags = dict(
        argument.removeprefix("--").split("=", 1)
        for argument in container["command"]
        if argument.startswith("--")
    )
    assert flags["num_processes"] == str(specification["completions"])
    assert specification["parallelism"] == specification["completions"]
    # The name of pod 0, by way of the service.
    host, port = flags["coordinator_address"].split(":")
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert int(port) == container["ports"][0]["containerPort"]
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert any(flags["workdir"].startswith(f"{mount}/") for mount in mounts)
    rules = specification["podFailurePolicy"]["rules"]
    codes = {
        rule["action"]: rule["onExitCodes"]["values"]
        for rule in rules
        if "onExitCodes" in rule
    }
    assert codes == {"FailJob": [FAILED], "Ignore": [TRY_AGAIN, 134]}
