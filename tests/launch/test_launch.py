"""The launch scripts, with stand-ins for the programs of a cluster."""

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tarfile
import tomllib
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


def launch(script, *arguments, environment, project=REPOSITORY):
    return subprocess.run(
        ["bash", str(project / "launch" / script), *arguments],
        cwd=project,
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


# Writes what it is called with; as `-m venv` it makes an environment with its own like.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *version_info*) echo "$VERSION" ;;
  "-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip"*)
    printf '%s\n' "$*" >> "$FOLDER/calls"
    exit "$PIP_CODE"
    ;;
  *) printf 'ran %s with %s\n' "$*" "$JAX_PLATFORMS" >> "$FOLDER/calls" ;;
esac
"""


@pytest.fixture
def python(tmp_path):
    """An environment in which no environment was made yet."""
    write_program(tmp_path, "python", PYTHON)
    return dict(
        os.environ,
        PYTHON=str(tmp_path / "python"),
        VENV=str(tmp_path / "new"),
        FOLDER=str(tmp_path),
        VERSION="3.11",
        PIP_CODE="0",
    )


def calls(folder):
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    ("platform", "requirement", "platforms"),
    [
        ("cpu", "jax", "cpu"),
        ("gpu", "jax[cuda12]", "cuda,cpu"),
        ("tpu", "jax[tpu]", "tpu,cpu"),
    ],
)
def test_an_environment_is_made_once(
    python, tmp_path, platform, requirement, platforms
):
    for _ in range(2):
        ended = launch("machine.sh", platform, "module", "--flag", environment=python)
        assert ended.returncode == 0, ended.stderr
    ran = f"ran -m module --flag with {platforms}"
    assert calls(tmp_path) == [
        f"-m pip install --quiet --editable .[imagenet] {requirement}",
        *[ran, ran],
    ]


def test_an_environment_that_was_not_finished_is_begun_anew(python, tmp_path):
    arguments = ("machine.sh", "cpu", "module")
    for code in ("7", "1"):
        ended = launch(*arguments, environment=python | {"PIP_CODE": code})
        assert ended.returncode == int(code)
    assert launch(*arguments, environment=python).returncode == 0
    assert [call.split()[1] for call in calls(tmp_path)] == ["pip"] * 3 + ["-m"]


def test_another_platform_in_the_same_environment(python, tmp_path):
    for platform in ("cpu", "gpu", "cpu"):
        ended = launch("machine.sh", platform, "module", environment=python)
        assert ended.returncode == 0
    installed = [call.split()[-1] for call in calls(tmp_path) if "pip" in call]
    assert installed == ["jax", "jax[cuda12]"]


@pytest.mark.parametrize("version", ["3.10", "3.9", "2.7", ""])
def test_an_unsupported_python_is_named_first(python, tmp_path, version):
    environment = python | {"VERSION": version}
    ended = launch("machine.sh", "cpu", "module", environment=environment)
    assert ended.returncode == 1
    shown = version or "no Python that runs"
    assert ended.stderr.startswith(f"error: {tmp_path / 'python'} is {shown}: expected")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("version", ["3.11", "3.14", "3.20"])
def test_supported_pythons(python, version):
    environment = python | {"VERSION": version}
    assert launch("environment.sh", "cpu", environment=environment).returncode == 0


def test_the_scripts_ask_for_the_python_of_the_package():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = project["requires-python"].removeprefix(">=")
    assert f"expected Python {needed} or" in (LAUNCH / "environment.sh").read_text()


@pytest.fixture(params=["a clone", "an unpacked archive"])
def project(request, tmp_path):
    """A small one with changes that are not committed, and with what git ignores."""
    folder = tmp_path / "project"
    shutil.copytree(LAUNCH, folder / "launch")
    shutil.copy(REPOSITORY / ".gitignore", folder)
    for name in ("kept.py", "changed.py", "deleted.py"):
        (folder / name).write_text("as committed")
    if request.param == "a clone":
        git = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e@e"]
        subprocess.run([*git, "init", "--quiet"], check=True)
        subprocess.run([*git, "add", "--all"], check=True)
        subprocess.run([*git, "commit", "--quiet", "-m", "all"], check=True)
    (folder / "changed.py").write_text("as it is here")
    (folder / "new file.py").touch()
    (folder / "deleted.py").unlink()
    for ignored in (".venv/bin/python", "runs/mnist/summary.json", "__pycache__/a.pyc"):
        (folder / ignored).parent.mkdir(parents=True)
        (folder / ignored).touch()
    return folder


COPY = """#!/usr/bin/env bash
if [ "$4" = scp ]; then cp "$5" "$FOLDER/copied.tar.gz"; fi
"""


def test_a_tpu_slice_gets_the_project_as_it_is_here(cluster, tmp_path, project):
    write_program(tmp_path / "bin", "gcloud", COPY)
    arguments = ("slice", "zone", "experiments.mnist")
    ended = launch("tpu_slice.sh", *arguments, environment=cluster, project=project)
    assert ended.returncode == 0, ended.stderr
    clone = (project / ".git").exists()
    said = "and 3 files that differ from it." if clone else "which is no clone."
    assert ended.stderr.rstrip().endswith(said)
    with tarfile.open(tmp_path / "copied.tar.gz") as archive:
        names = {os.path.normpath(name) for name in archive.getnames()}
        archive.extract(
            next(name for name in archive.getnames() if "changed" in name),
            tmp_path / "worker",
            filter="data",
        )
    assert (tmp_path / "worker/changed.py").read_text() == "as it is here"
    scripts = {f"launch/{path.name}" for path in LAUNCH.iterdir()}
    expected = {"kept.py", "changed.py", "new file.py", ".gitignore"}
    assert names == scripts | expected


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


def test_slurm_gives_each_task_its_cores(cluster, tmp_path):
    write_program(tmp_path / "bin", "srun", ECHO)
    script = (LAUNCH / "slurm.sbatch").read_text()
    (default,) = re.findall("#SBATCH --cpus-per-task=([0-9]+)", script)
    for cores in (default, "3"):
        environment = cluster | {"SLURM_CPUS_PER_TASK": cores}
        launch("slurm.sbatch", "experiments.mnist", environment=environment)
    launch("slurm.sbatch", "experiments.mnist", environment=cluster)
    words = [shlex.split(call) for call in calls(tmp_path)]
    asked = [f"--cpus-per-task={cores}" for cores in (default, "3", default)]
    assert [call[1] for call in words] == asked


@pytest.mark.parametrize("code", [0, FAILED, TRY_AGAIN, 134, 143])
def test_a_job_that_can_go_on_is_queued_again(cluster, tmp_path, code):
    write_program(tmp_path / "bin", "srun", f"#!/usr/bin/env bash\nexit {code}\n")
    ended = launch("slurm.sbatch", "experiments.mnist", environment=cluster)
    assert ended.returncode == code
    again = code in (TRY_AGAIN, 134, 143)
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
    folder = container["workingDir"]
    assert f"WORKDIR {folder}\n" in (LAUNCH / "Dockerfile").read_text()
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert any(flags["workdir"].startswith(f"{mount}/") for mount in mounts)
    rules = specification["podFailurePolicy"]["rules"]
    codes = {
        rule["action"]: rule["onExitCodes"]["values"]
        for rule in rules
        if "onExitCodes" in rule
    }
    assert codes == {"FailJob": [FAILED], "Ignore": [TRY_AGAIN, 134, 143]}


@pytest.mark.slow
def test_the_steps_of_the_image(tmp_path):
    """What the Dockerfile runs, in a copy of what it copies, for the CPU."""
    ignored = [
        line
        for line in (REPOSITORY / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    names = [pattern.removeprefix("**/") for pattern in ignored]
    work = tmp_path / "bn_jax"
    shutil.copytree(REPOSITORY, work, ignore=shutil.ignore_patterns(*names))
    assert not (work / ".git").exists()
    variables = {"PYTHON": sys.executable, "PLATFORM": "cpu"}
    for line in (LAUNCH / "Dockerfile").read_text().splitlines():
        instruction, _, words = line.partition(" ")
        # Folders of the image's own are below this test's.
        words = words.replace("=/", f"={tmp_path}/")
        if instruction == "ENV":
            name, _, value = words.partition("=")
            variables[name] = value.replace("$PATH", os.environ["PATH"])
        elif instruction == "RUN":
            done = subprocess.run(
                ["bash", "-c", words],
                cwd=work,
                env=command_environment(**variables),
                capture_output=True,
                text=True,
                check=False,
            )
            if "No matching distribution" in done.stderr:
                pytest.skip(f"no package registry answers: {done.stderr}")
            assert done.returncode == 0, done.stderr
    _, job = yaml.safe_load_all((LAUNCH / "gke.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    module = container["command"][:3]
    elsewhere = command_environment(**variables)
    elsewhere.pop("PYTHONPATH", None)
    done = subprocess.run(
        [*module, "--config=bn_x30", "--describe"],
        cwd=tmp_path,
        env=elsewhere,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "conv1" in done.stdout
