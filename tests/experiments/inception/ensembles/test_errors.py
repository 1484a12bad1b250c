import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments.data.errors import DataError
from experiments.data.file_feed import ImageBatch
from experiments.inception.data import Data
from experiments.inception.ensembles import errors as ensemble
from experiments.inception.ensembles.trained_networks import Network
from experiments.inception.training import POPULATION
from tests.experiments.helpers import ORBAX_LEFTOVERS
from tests.experiments.inception.ensembles.test_trained_networks import (
    MOVING_AVERAGE,
    load,
    train,
)
from tests.experiments.inception.tiny_inception import (
    NUM_TEST,
    tiny_config,
    tiny_data,
)

pytestmark = [
    pytest.mark.filterwarnings(ORBAX_LEFTOVERS),
    pytest.mark.usefixtures("collect_dropped_coroutines"),
]

# Probabilities of three classes, worked by hand. The third example is one where the
# geometric mean would prefer another class than the arithmetic one.
LABELS = [0, 0, 1, 1]
ONE = [[0.6, 0.4, 0.0], [0.3, 0.7, 0.0], [0.2, 0.8, 0.0], [0.5, 0.4, 0.1]]
OTHER = [[0.2, 0.2, 0.6], [0.8, 0.1, 0.1], [0.5, 0.05, 0.45], [0.4, 0.1, 0.5]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two networks and the data to tell them apart."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "bn", num_steps=8, eval_every=8)
    train(folder / "mirrored", seed=1, flip=True)
    return folder


def make_data(broken: tuple[int, ...] = (), **changes: object) -> Data:
    return tiny_data(tiny_config(**changes), broken_test=broken)


def make_network(name: str, probabilities: list[list[float]]) -> Network:
    """One that has the same answer to whatever it sees."""

    def answer(state: object, images: np.ndarray) -> np.ndarray:
        assert state == f"state of {name}"
        return np.array(probabilities, np.float32)

    return Network(
        name=name,
        folder=Path("runs") / name,
        config=tiny_config(seed=3),
        step=10,
        statistics=None,
        experiment=SimpleNamespace(probabilities=answer),
        state=f"state of {name}",
    )


class Examples(list):
    num_classes = 3


def make_batch(crops: int, counted: list[bool]) -> ImageBatch:
    images = np.zeros((4, crops, 2, 2, 3), np.uint8)
    return ImageBatch(images, np.array(LABELS, np.int32), np.array(counted))


def data_by_hand(*counted: list[bool]) -> SimpleNamespace:
    """Batches of the four examples, of which some may not count."""

    def testing(num_examples: int, crops: int) -> Iterator[ImageBatch]:
        assert num_examples == 4 * len(counted)
        yield from (make_batch(crops, batch) for batch in counted)

    return SimpleNamespace(test=Examples(range(4 * len(counted))), testing=testing)


def errors_of(numbers: dict) -> dict[tuple[str, int], float]:
    return {(row["model"], row["crops"]): row["top1_error"] for row in numbers["rows"]}


@pytest.mark.parametrize(
    ("counted", "one", "other", "together"),
    [
        ([[True] * 4], 50, 75, 25),
        ([[False, False, True, True]], 50, 100, 50),
        ([[False, True, True, True], [True, True, True, False]], 50, 200 / 3, 100 / 6),
    ],
)
def test_an_ensemble_is_the_mean_of_probabilities(counted, one, other, together):
    networks = [make_network("one", ONE), make_network("other", OTHER)]
    numbers = ensemble.evaluate(networks, data_by_hand(*counted), [1])
    expected = {("one", 1): one, ("other", 1): other, ("ensemble", 1): together}
    assert errors_of(numbers) == pytest.approx(expected)
    assert [row["models"] for row in numbers["rows"]] == [1, 1, 2]
    assert {row["top5_error"] for row in numbers["rows"]} == {0}
    assert numbers["test_set"]["evaluated"] == np.sum(counted)
    assert numbers["test_set"]["undecodable"] == 4 * len(counted) - np.sum(counted)


def test_a_network_alone_is_no_ensemble():
    numbers = ensemble.evaluate(
        [make_network("one", ONE)], data_by_hand([True] * 4), [1]
    )
    assert numbers == {
        "test_set": {
            "dataset": "cluttered_mnist",
            "classes": 3,
            "examples": 4,
            "evaluated": 4,
            "undecodable": 0,
            "crop_fraction": 1.0,
            "flip": False,
        },
        "networks": [
            {
                "name": "one",
                "folder": "runs/one",
                "seed": 3,
                "step": 10,
                "num_steps": 10,
                "statistics": None,
            }
        ],
        "rows": [
            {
                "model": "one",
                "resolution": 32,
                "crops": 1,
                "models": 1,
                "top1_error": 50,
                "top5_error": 0,
            }
        ],
    }
    assert json.loads(json.dumps(numbers)) == numbers


@pytest.mark.parametrize("statistics", [POPULATION, MOVING_AVERAGE])
def test_errors_are_those_of_the_summary(runs, statistics):
    summary = json.loads((runs / "bn" / "summary.json").read_text())
    accuracy = summary["final"][statistics]
    assert 0 < accuracy["top1"] < accuracy["top5"] <= 100
    numbers = ensemble.evaluate(
        load(runs / "bn", statistics=statistics), make_data(), [1]
    )
    (row,) = numbers["rows"]
    assert row["top1_error"] == 100 - accuracy["top1"]
    assert row["top5_error"] == 100 - accuracy["top5"]
    assert numbers["test_set"]["evaluated"] == NUM_TEST


def test_a_network_with_itself_is_itself(runs):
    (network,) = load(runs / "bn")
    numbers = ensemble.evaluate([network, network], make_data(), [1, 10])
    assert [row["models"] for row in numbers["rows"]] == [1, 1, 2] * 2
    for row in numbers["rows"]:
        same = next(
            other for other in numbers["rows"] if other["crops"] == row["crops"]
        )
        assert row["top1_error"] == same["top1_error"]
        assert row["top5_error"] == same["top5_error"]


def test_an_ensemble_of_different_networks_on_the_same_images(runs):
    """Against probabilities of each network on its own, gathered by other means."""
    networks = [*load(runs / "bn"), *load(runs / "mirrored")]
    data = make_data()
    numbers = ensemble.evaluate(networks, data, [10])
    found, labels = [], []
    for index in range(NUM_TEST):
        example = data.test.evaluation_example(index, 10)
        images = 2 * example.images.astype(np.float32) / 255 - 1
        labels.append(example.label)
        logits = [
            network.experiment.model.clone(auxiliary_head=False).apply(
                network.state.variables, images, train=False
            )
            for network in networks
        ]
        found.append(np.mean(jax.nn.softmax(np.array(logits)), axis=(0, 1)))
    right = np.argmax(found, axis=-1) == labels
    row = numbers["rows"][-1]
    assert len({other["top1_error"] for other in numbers["rows"]}) == 3
    assert row["model"] == "ensemble"
    assert row["top1_error"] == pytest.approx(100 - 100 * right.mean())


@pytest.mark.parametrize(("flip", "crops"), [(True, [1, 10, 144]), (False, [1, 5, 72])])
def test_crops_are_those_that_were_used(runs, flip, crops):
    networks = load(runs / ("mirrored" if flip else "bn"))
    numbers = ensemble.evaluate(networks, make_data(flip=flip), [1, 10, 144], 3)
    assert [row["crops"] for row in numbers["rows"]] == crops
    assert numbers["test_set"]["flip"] == flip
    assert numbers["test_set"]["evaluated"] == 3
    assert numbers["test_set"]["examples"] == NUM_TEST


@pytest.mark.parametrize(
    ("eval_batch_size", "crops", "examples"),
    [
        (16, 1, 16),
        (16, 10, 8),  # one a device
        (16, 144, 8),
        (160, 10, 16),
        (250, 10, 24),  # 25 do not divide over the devices
        (2_304, 144, 16),
        (23, 1, 16),
    ],
)
def test_a_batch_holds_as_many_images_whatever_the_crops(
    eval_batch_size, crops, examples
):
    data = make_data(eval_batch_size=eval_batch_size)
    batches = list(data.testing(crops=crops))
    assert {len(batch.images) for batch in batches} == {examples}
    assert sum(batch.mask.sum() for batch in batches) == NUM_TEST


def test_images_that_cannot_be_decoded_do_not_count(runs, capsys):
    networks = load(runs / "bn")
    data = make_data(broken=(1, 20))
    numbers = ensemble.evaluate(networks, data, [1, 10])
    assert numbers["test_set"]["undecodable"] == 2
    assert numbers["test_set"]["evaluated"] == NUM_TEST - 2
    data.report_undecodable()
    assert "2 images could not be decoded" in capsys.readouterr().out
    # Of the others the errors are as if there were no more.
    summary = ensemble.evaluate(networks, make_data(), [1])
    wrong = summary["rows"][0]["top1_error"] * NUM_TEST / 100
    found = numbers["rows"][0]["top1_error"] * (NUM_TEST - 2) / 100
    assert found == pytest.approx(round(found))
    assert wrong - 2 <= round(found) <= wrong


def test_no_image_at_all(runs):
    with pytest.raises(DataError, match="none of the first 2 test images") as caught:
        ensemble.evaluate(load(runs / "bn"), make_data(broken=(0, 1)), [1], 2)
    assert "\n" not in str(caught.value)


def test_progress_is_shown(runs, capsys):
    ensemble.evaluate(load(runs / "bn"), make_data(), [1, 10], 20)
    shown = capsys.readouterr().err
    assert "1 crop:" in shown
    assert "10 crops: 100%" in shown
    assert "20/20" in shown
