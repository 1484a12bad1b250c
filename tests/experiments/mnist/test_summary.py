import numpy as np
import pytest

from experiments.mnist.summary import (
    as_table,
    settings,
    summarise,
    typical_unit,
)
from tests.experiments.helpers import small_config

REPLICAS = {
    "seed": np.array([5, 6, 5, 6]),
    "learning_rate": np.array([0.1, 0.1, 3.0, 3.0]),
    "initial_std": np.array([0.5] * 4),
}
ACCURACY = {
    0: [10.0, 12.0, 9.0, 8.0],
    10: [91.0, 89.0, 50.0, 96.0],
    20: [96.0, 94.0, 40.0, 98.0],
    30: [95.5, 97.0, 30.0, 89.0],
}


def make_rows(networks=("baseline", "batch_norm")):
    rows = []
    for step, accuracy in ACCURACY.items():
        for name in networks:
            row = {"step": step, "network": name, "accuracy": accuracy}
            if step in (10, 30):
                row["population_accuracy"] = [value + 1 for value in accuracy]
            rows.append(row)
    return rows


def make_percentiles(replicas=4):
    """Unit u's percentile p goes from p to p + u * (replica + 1) and halfway back."""
    rows = []
    for step, share in ((0, 0), (10, 1), (30, 0.5)):
        values = np.empty((replicas, 3, 5))
        for replica, percentile, unit in np.ndindex(values.shape):
            values[replica, percentile, unit] = percentile + share * unit * (
                replica + 1
            )
        rows += [
            {"step": step, "network": name, "values": values.tolist()}
            for name in ("baseline", "batch_norm")
        ]
    return rows


@pytest.fixture
def summary():
    return summarise(small_config(), REPLICAS, make_rows(), make_percentiles())


def test_one_entry_a_setting_with_its_seeds(summary):
    assert settings(summary) == [(0.1, 0.5), (3.0, 0.5)]
    assert summary["networks"].keys() == {"baseline", "batch_norm"}
    for entries in summary["networks"].values():
        assert [entry["seeds"] for entry in entries] == [[5, 6], [5, 6]]


def test_accuracy_at_the_milestones(summary):
    slow, fast = (entry["accuracy"] for entry in summary["networks"]["batch_norm"])
    assert list(slow) == list(fast) == ["10", "30"]
    assert slow["30"]["moving_average"] == {
        "mean": 96.25,
        "std": pytest.approx(np.std([95.5, 97.0], ddof=1)),
        "values": [95.5, 97.0],
    }
    assert slow["30"]["population"]["values"] == [96.5, 98.0]
    assert fast["10"]["moving_average"]["mean"] == 73
    assert fast["10"]["population"]["mean"] == 74


def test_steps_to_a_level_are_the_first_that_reach_it(summary):
    slow, fast = (entry["steps_to"] for entry in summary["networks"]["baseline"])
    assert slow["90"]["values"] == [10, 20]
    assert slow["90"]["mean"] == 15
    assert slow["95"]["values"] == [20, 30]
    assert slow["97"] == {"mean": None, "std": None, "values": [None, 30]}
    assert fast["90"] == {"mean": None, "std": None, "values": [None, 10]}


def test_one_seed_has_no_deviation():
    replicas = {name: values[:1] for name, values in REPLICAS.items()}
    rows = [row | {"accuracy": row["accuracy"][:1]} for row in make_rows()]
    (entry,) = summarise(small_config(), replicas, rows, [])["networks"]["baseline"]
    assert entry["steps_to"]["90"] == {"mean": 10.0, "std": None, "values": [10]}
    assert "sigmoid_input" not in entry


def test_percentiles_and_their_travel(summary):
    slow, fast = (entry["sigmoid_input"] for entry in summary["networks"]["batch_norm"])
    assert slow["steps"] == [0, 10, 30]
    # Units 0 to 4 travel 0 to 4 times 1, 2, 3 and 4 in the four replicas.
    for percentile in "15", "50", "85":
        assert slow["travel"][percentile]["values"] == [2, 4]
        assert fast["travel"][percentile]["values"] == [6, 8]
    assert slow["typical_unit"] == fast["typical_unit"] == 2
    # Averaged over units and both seeds of the setting.
    assert slow["mean_percentiles"] == [[0, 1, 2], [3, 4, 5], [1.5, 2.5, 3.5]]


def test_each_percentile_has_its_own_travel():
    rows = make_percentiles()
    for row in rows:
        row["values"] = (np.array(row["values"]) * [[0], [1], [10]]).tolist()
    networks = summarise(small_config(), REPLICAS, make_rows(), rows)["networks"]
    travel = networks["batch_norm"][0]["sigmoid_input"]["travel"]
    means = {percentile: entry["mean"] for percentile, entry in travel.items()}
    assert means == {"15": 0, "50": 3, "85": 30}


def test_typical_unit_is_the_median_of_travel():
    tracks = np.zeros((4, 3, 5))
    tracks[2] = [7.0, 1.0, 3.0, 9.0, 2.0]
    assert typical_unit(tracks) == 2
    assert typical_unit(-tracks) == 2


def test_summary_says_what_made_it(summary):
    assert summary["config"] == small_config()
    assert summary["devices"] == 8
    assert summary["platform"] == "cpu"


def test_table_shows_every_setting(summary):
    header, *lines = as_table(summary).splitlines()
    assert len(lines) == 4
    for word in ("network", "% at 10", "% at 30", "Alg. 2", "steps to 97%"):
        assert word in header
    assert "batch_norm  0.1   0.5  90.00 ± 1.41" in as_table(summary)
    assert "97.25 ± 1.06" in lines[0]
    assert lines[0].split()[-6:] == ["15", "25", "never", "3.00", "±", "1.41"]
