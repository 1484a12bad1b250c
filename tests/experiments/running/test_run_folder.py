import json

import jax
import pytest

from experiments.configuration.fields import Configuration, Field, Role
from experiments.distributed.processes import KNOWN_TO_ALL, ProcessesError
from experiments.running import run_folder
from experiments.running.run_folder import FAILURE_FILE, LostProcessError, open_run
from experiments.running.workdir import WorkdirError

CONFIG = {"rate": 0.1, "workers": 4}
CHOICES = Configuration(
    {
        "rate": Field(0.5, "a number"),
        "late": Field(3, "a field that earlier versions lacked"),
        "workers": Field(4, "a number", role=Role.LAUNCH, formerly="threads"),
    },
    lambda variant: {},
)


@pytest.fixture
def second_of_two(monkeypatch):
    """As if this process were one of two; it sees what the first has written."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(run_folder, "SECONDS_FOR_NEWS", 0.3)
    monkeypatch.setattr(run_folder.processes, "in_first_process", lambda function: None)
    monkeypatch.setattr(
        run_folder.processes, "in_every_process", lambda function: function()
    )


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_alone_an_error_stays_what_it_is(tmp_path):
    with pytest.raises(KeyError), open_run(tmp_path / "run", CONFIG, CHOICES):
        raise KeyError
    assert not (tmp_path / "run" / FAILURE_FILE).exists()


def test_the_lock_ends_with_the_run(tmp_path):
    second = pytest.raises(WorkdirError, match="another process is writing")
    with (
        open_run(tmp_path, CONFIG, CHOICES),
        second,
        open_run(tmp_path, CONFIG, CHOICES),
    ):
        pass
    with open_run(tmp_path, CONFIG, CHOICES):
        pass


def test_a_folder_that_is_not_there(tmp_path, second_of_two):
    with (
        pytest.raises(WorkdirError, match=r"is not to be seen; give all processes"),
        open_run(tmp_path, CONFIG, CHOICES),
    ):
        pass


def test_another_configuration(workdir, second_of_two):
    with (
        pytest.raises(WorkdirError, match=r"rate: 0.1 there, 0.2 now"),
        open_run(workdir, CONFIG | {"rate": 0.2}, CHOICES),
    ):
        pass
    with open_run(workdir, CONFIG | {"workers": 9}, CHOICES):
        pass


def test_an_error_of_its_own_is_left_for_the_others(workdir, second_of_two):
    with pytest.raises(ZeroDivisionError), open_run(workdir, CONFIG, CHOICES):
        raise ZeroDivisionError("a defect")
    note = json.loads((workdir / FAILURE_FILE).read_text())
    assert note == {"process": 1, "error": "a defect"}
    assert len(list(workdir.iterdir())) == 2


def test_the_error_of_another(workdir, second_of_two):
    note = {"process": 0, "error": "the disk is full"}
    (workdir / FAILURE_FILE).write_text(json.dumps(note))
    with (
        pytest.raises(ProcessesError, match=r"^process 0 failed: the disk is full$"),
        open_run(workdir, CONFIG, CHOICES),
    ):
        raise ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed")
    assert json.loads((workdir / FAILURE_FILE).read_text()) == note


@pytest.mark.parametrize(
    "message",
    [
        "UNKNOWN: Gloo all-reduce failed: [...] Read error: Connection reset by peer",
        "NCCL operation ncclAllReduce failed: unhandled system error",
        "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats)",
    ],
)
def test_another_that_left_no_word(workdir, second_of_two, message):
    with (
        pytest.raises(LostProcessError, match="lost contact with another process"),
        open_run(workdir, CONFIG, CHOICES),
    ):
        raise ValueError(message)
    assert not (workdir / FAILURE_FILE).exists()


def test_what_all_know_is_not_explained(workdir, second_of_two):
    error = WorkdirError("the disk is full")
    error.add_note(KNOWN_TO_ALL)
    with (
        pytest.raises(WorkdirError, match="the disk is full"),
        open_run(workdir, CONFIG, CHOICES),
    ):
        raise error
    assert not (workdir / FAILURE_FILE).exists()
