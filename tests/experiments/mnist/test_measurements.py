from experiments.mnist.measurements import evaluation_steps, milestone_steps
from tests.experiments.helpers import small_config


def test_evaluations_are_dense_early_and_include_the_ends_and_milestones():
    config = small_config(
        num_steps=95, early_eval_every=5, early_steps=20, eval_every=30, milestones=(7,)
    )
    assert evaluation_steps(config) == {0, 5, 7, 10, 15, 20, 30, 60, 90, 95}


def test_milestones_end_with_the_run():
    steps = (1_000, 10, 40)
    assert milestone_steps(small_config(num_steps=40, milestones=steps)) == [10, 40]
    assert milestone_steps(small_config(num_steps=41, milestones=steps)) == [10, 40, 41]
    assert milestone_steps(small_config(milestones=())) == [40]
