import numpy as np
import pytest

from experiments.inception.scores import Scores, score


def test_percentages():
    found = Scores(top1=3, top5=6, loss=4.0, count=8).percentages()
    assert found == {"top1": 37.5, "top5": 75, "loss": 0.5}


def scores_of(probabilities, labels, mask=None) -> list:
    labels = np.asarray(labels, np.int32)
    mask = np.ones(len(labels), bool) if mask is None else np.asarray(mask)
    return [value.item() for value in score(np.float32(probabilities), labels, mask)]


def test_score_by_hand():
    rows = [
        [0.4, 0.3, 0.1, 0.08, 0.07, 0.05],
        [0.4, 0.3, 0.1, 0.08, 0.07, 0.05],
        [0.4, 0.3, 0.1, 0.08, 0.07, 0.05],
        [0.05, 0.05, 0.1, 0.1, 0.1, 0.6],
    ]
    labels = [0, 4, 5, 5]
    loss = -np.log([0.4, 0.07, 0.05, 0.6])
    assert scores_of(rows, labels) == [2, 3, pytest.approx(loss.sum(), rel=1e-6), 4]
    found = scores_of(rows, labels, [False, True, True, False])
    assert found == [0, 1, pytest.approx(loss[1:3].sum(), rel=1e-6), 2]
    assert scores_of(rows, labels, [False] * 4) == [0, 0, 0, 0]


def test_score_with_ties_is_a_stable_order():
    random = np.random.default_rng(0)
    # Few values, so that most rows have ties.
    rows = random.integers(1, 4, (500, 9)) / 30
    labels = random.integers(0, 9, 500)
    order = np.argsort(-rows, axis=1, kind="stable")
    top1 = (order[:, 0] == labels).sum()
    top5 = (order[:, :5] == labels[:, None]).any(axis=1).sum()
    assert scores_of(rows, labels)[:2] == [top1, top5]


def test_a_network_at_chance_is_not_always_right():
    rows = np.full((20, 10), 0.1)
    assert scores_of(rows, np.arange(20) % 10)[:2] == [2, 10]


@pytest.mark.parametrize("classes", [3, 10])
def test_a_network_that_is_not_finite_is_never_right(classes):
    rows = np.full((4, classes), np.nan)
    rows[3] = np.eye(classes)[2]
    top1, top5, loss, count = scores_of(rows, [0, 1, 2, 2])
    assert (top1, top5, count) == (1, 1, 4)
    assert np.isnan(loss)
    assert scores_of(rows, [0, 1, 2, 2], [0, 0, 0, 1])[2] == 0


def test_the_loss_of_an_impossible_answer_is_finite():
    (*_, loss, _) = scores_of([[1.0, 0.0]], [1])
    assert 80 < loss < 100
