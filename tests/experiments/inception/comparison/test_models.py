import json
from pathlib import Path

import numpy as np
import pytest

from experiments.configuration.fields import ConfigError
from experiments.inception.comparison.models import PAPER, compare, compare_rates
from experiments.inception.comparison.runs import Run
from tests.experiments.inception.comparison.test_runs import CONFIG, FINISHED


def make_run(variant, accuracy, *, summary=FINISHED, **changes) -> Run:
    """A run that was evaluated at some steps; finished, if nothing else is said."""
    config = CONFIG | {"variant": variant, "initialisation": "gaussian"} | changes
    folder = Path(f"{variant}_{config['seed']}")
    steps, top1 = np.array(list(accuracy)), np.array(list(accuracy.values()), float)
    return Run(folder, config, steps, top1, summary)


def diverged(step: int) -> dict:
    return {"diverged_at": step, "final": None}


# The mean is 10, 52, 72, 71: the best is 72, with the deviation of 70 and 74.
REFERENCE = [
    make_run("inception", {0: 10, 10: 50, 20: 70, 30: 72}),
    make_run("inception", {0: 10, 10: 54, 20: 74, 30: 70}, seed=1),
]


def model_of(*runs, **options) -> dict:
    """What is said of the one model that is not the reference."""
    _, model = compare([*REFERENCE, *runs], **options)["models"]
    return model


def error_of(function, *arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_reference_sets_the_level():
    comparison = compare(REFERENCE)
    (model,) = comparison["models"]
    assert comparison["references"] == [
        {"name": "inception", "role": "", "level": 72, "step": 20}
    ]
    assert comparison["baselines_tried"] == []
    assert model["name"] == "inception"
    assert model["best"] == {
        "step": 20,
        "mean": 72,
        "std": pytest.approx(np.sqrt(8)),
        "values": [70, 74],
    }
    assert model["reach"] == [{"steps": 20, "outcome": "reached", "ratio": 1}]
    assert model["seeds"] == [0, 1]
    assert model["folders"] == ["inception_0", "inception_1"]
    assert model["curve"]["steps"] == [0, 10, 20, 30]
    assert model["curve"]["mean"] == [10, 52, 72, 71]
    np.testing.assert_allclose(model["curve"]["std"], np.sqrt([0, 8, 8, 2]))


def test_steps_to_the_level_and_their_ratio():
    """The first evaluation that reaches it counts, though later ones fall below."""
    model = model_of(make_run("bn_x5", {0: 10, 5: 72, 10: 65, 30: 90}))
    assert model["reach"] == [{"steps": 5, "outcome": "reached", "ratio": 4}]
    assert model["best"] == {"step": 30, "mean": 90, "std": None, "values": [90]}
    assert model["curve"]["std"] is None


def test_a_slower_model_has_a_ratio_below_one():
    (reach,) = model_of(make_run("bn_x5", {0: 10, 80: 72.5}))["reach"]
    assert reach["ratio"] == 0.25


def test_the_mean_over_seeds_has_to_reach_the_level():
    seeds = [make_run("bn_x5", {0: 10, 10: 90, 20: 90})]
    assert model_of(*seeds)["reach"][0]["steps"] == 10
    seeds.append(make_run("bn_x5", {0: 10, 10: 53, 20: 54}, seed=1))
    assert model_of(*seeds)["reach"][0]["steps"] == 20


def test_the_last_bits_of_means_do_not_matter():
    """(0.1 + 0.2) / 2 is not 0.15 to the last bit, nor to this model's disadvantage."""
    assert np.mean([0.1, 0.2]) > 0.15
    reference = [
        make_run("inception", {0: 0, 10: 0.1}),
        make_run("inception", {0: 0, 10: 0.2}, seed=1),
    ]
    _, model = compare([*reference, make_run("bn_x5", {0: 0, 5: 0.15})])["models"]
    assert model["reach"][0]["steps"] == 5


@pytest.mark.parametrize(
    ("runs", "state", "outcome"),
    {
        "never": ([({0: 10, 30: 71.9}, FINISHED)], "finished", "never"),
        "running": (
            [({0: 10, 30: 71.9}, None)],
            "running or stopped at step 30 of 1,200",
            "not yet",
        ),
        "diverged": (
            [({0: 10, 1000: 50}, diverged(1_234))],
            "diverged at step 1,234",
            "diverged at step 1,234",
        ),
        "diverged at once": (
            [({0: 10}, diverged(0))],
            "diverged at step 0",
            "diverged at step 0",
        ),
        "diverged later": (
            [({0: 10, 30: 72}, diverged(35))],
            "diverged at step 35",
            "reached",
        ),
        "chance": (
            [({0: 10, 30: 18.9}, FINISHED)],
            "stayed at chance",
            "stayed at chance",
        ),
        "above chance": ([({0: 10, 30: 19.1}, FINISHED)], "finished", "never"),
        "chance so far": (
            [({0: 10, 30: 10}, None)],
            "running or stopped at step 30 of 1,200",
            "not yet",
        ),
        "some seeds": (
            [({0: 10, 30: 50}, FINISHED), ({0: 10, 20: 50}, None), ({0: 10}, None)],
            "2 of 3 seeds running or stopped at step 0 of 1,200",
            "not yet",
        ),
        "seeds diverged": (
            [({0: 10}, diverged(35)), ({0: 10}, diverged(21)), ({0: 10}, FINISHED)],
            "2 of 3 seeds diverged at steps 21 to 35",
            "2 of 3 seeds diverged at steps 21 to 35",
        ),
        "everything": (
            [({0: 10, 30: 50}, diverged(35)), ({0: 10, 20: 50}, None)],
            "1 of 2 seeds diverged at step 35; "
            "1 of 2 seeds running or stopped at step 20 of 1,200",
            "1 of 2 seeds diverged at step 35; "
            "1 of 2 seeds running or stopped at step 20 of 1,200",
        ),
    }.values(),
)
def test_what_happened_in_words(runs, state, outcome):
    model = model_of(
        *(
            make_run("bn_x5", accuracy, summary=summary, seed=seed)
            for seed, (accuracy, summary) in enumerate(runs)
        )
    )
    assert model["state"] == state
    (reach,) = model["reach"]
    assert reach["outcome"] == outcome
    assert (
        (reach["steps"] is None) == (reach["ratio"] is None) == (outcome != "reached")
    )
    assert model["finished"] == all(summary for _, summary in runs)
    assert model["diverged_at"] == [
        (summary or diverged(None))["diverged_at"] for _, summary in runs
    ]


@pytest.mark.parametrize(
    ("untrained", "best", "at_chance"),
    [(0.1, 0.2, True), (0.1, 0.21, False), (50, 55, True), (50, 55.1, False)],
)
def test_chance_is_what_untrained_networks_reach(untrained, best, at_chance):
    runs = [
        make_run("inception", {0: untrained - 0.1, 10: 80}),
        make_run("bn_x5", {0: untrained + 0.1, 10: best}),
    ]
    comparison = compare(runs)
    assert comparison["chance"] == pytest.approx(untrained)
    assert comparison["models"][1]["at_chance"] is at_chance


def test_without_an_evaluation_of_untrained_networks_nothing_is_chance():
    comparison = compare([make_run("inception", {10: 1})])
    assert comparison["chance"] == 0
    assert comparison["models"][0]["state"] == "finished"


@pytest.mark.parametrize("summary", [FINISHED, diverged(12), None])
def test_a_reference_that_at_chance_has_no_level(summary):
    """Everything would reach it at once."""
    runs = [
        make_run("inception", {0: 10, 10: 9}, summary=summary),
        make_run("bn_x5", {0: 11, 10: 90}),
    ]
    comparison = compare(runs)
    assert comparison["references"][0]["level"] is None
    for model in comparison["models"]:
        assert model["reach"] == [
            {"steps": None, "outcome": "the reference is at chance", "ratio": None}
        ]


# The baseline at several rates. Batches of 32 have the paper's at 0.0015.
def baselines(*best: float, batch_size: int = 32, **changes) -> list[Run]:
    rates = [0.0015 * batch_size / 32 * multiple for multiple in (1, 5, 10, 30)]
    return [
        make_run(
            "inception",
            {0: 10, 10: accuracy - 1, 10 * (place + 2): accuracy},
            batch_size=batch_size,
            learning_rate=rate,
            rate_multiple=1.0,
            **changes,
        )
        for place, (accuracy, rate) in enumerate(zip(best, rates, strict=False))
    ]


@pytest.mark.parametrize("batch_size", [32, 256])
def test_the_baseline_at_the_papers_and_at_its_best_rate(batch_size):
    runs = [
        *baselines(40, 70, 60, batch_size=batch_size),
        make_run("bn_x5", {0: 10, 5: 40, 15: 70}, batch_size=batch_size),
        make_run("bn_x5", {0: 10, 5: 50}, learning_rate=7.0, batch_size=batch_size),
    ]
    comparison = compare(runs)
    paper, best = (f"inception at {batch_size / 32 * r:g}" for r in (0.0015, 0.0075))
    assert comparison["references"] == [
        {"name": paper, "role": "the paper's rate", "level": 40, "step": 20},
        {"name": best, "role": "the best of 3", "level": 70, "step": 30},
    ]
    models = comparison["models"]
    names = [paper, best, "bn_x5 at 0.3", "bn_x5 at 21"]
    assert [model["name"] for model in models] == names
    assert models[2]["reach"] == [
        {"steps": 5, "outcome": "reached", "ratio": 4},
        {"steps": 15, "outcome": "reached", "ratio": 2},
    ]
    assert models[3]["reach"][1]["outcome"] == "never"
    tried = comparison["baselines_tried"]
    assert [rate["best"]["mean"] for rate in tried] == [40, 70, 60]


def test_one_baseline_may_have_the_papers_rate_and_be_the_best():
    (reference,) = compare(baselines(40, 30))["references"]
    assert reference["name"] == "inception at 0.0015"
    assert reference["role"] == "the paper's rate and the best of 2"


def test_he_s_weights_are_a_baseline_too():
    """They are not the paper's, but may train where its do not."""
    runs = baselines(10, 10)
    he = make_run("inception_he", {0: 10, 30: 80}, learning_rate=0.0015)
    he = he._replace(config=he.config | {"rate_multiple": 1.0})
    comparison = compare([*runs, he, make_run("bn_x5", {0: 10, 10: 80})])
    found = [
        (each["name"], each["role"], each["level"]) for each in comparison["references"]
    ]
    assert found == [
        ("inception at 0.0015", "the paper's rate", None),
        ("inception_he", "the best of 3", 80),
    ]
    assert [model["name"] for model in comparison["models"]][2:] == ["bn_x5"]
    assert len(comparison["baselines_tried"]) == 3


def test_a_rate_that_diverged_is_not_the_best():
    runs = baselines(40, 50)
    runs[1] = runs[1]._replace(summary=diverged(12))
    names = [each["name"] for each in compare(runs)["references"]]
    assert names == ["inception at 0.0015"]


def test_without_the_papers_rate_the_best_one_remains():
    runs = baselines(40, 50, 60)[1:]
    (reference,) = compare(runs)["references"]
    assert reference["role"] == "the best of 2"
    assert reference["level"] == 60


def test_a_curve_has_the_steps_that_all_seeds_have():
    model = model_of(
        make_run("bn_x5", {0: 10, 10: 20, 20: 30, 30: 40}),
        make_run("bn_x5", {0: 12, 15: 80, 20: 50}, seed=1),
    )
    assert model["curve"]["steps"] == [0, 20]
    assert model["curve"]["mean"] == [11, 40]
    assert model["best"]["values"] == [30, 50]


def test_seeds_without_a_common_step():
    runs = [make_run("inception", {10: 1}), make_run("inception", {20: 1}, seed=1)]
    assert "inception were never evaluated at the same step" in error_of(compare, runs)


def test_the_same_seed_twice():
    message = error_of(
        compare, [*REFERENCE, REFERENCE[1]._replace(folder=Path("copy"))]
    )
    assert "inception_1 and copy both hold inception with the seed 1" in message


def test_final_accuracy_by_each_kind_of_statistics():
    def final(top1, population):
        scores = {"top1": top1, "top5": top1 + 10, "loss": 0.5}
        better = {"top1": population, "top5": population + 10, "loss": 0.5}
        final = {"moving_average": scores, "population": better, "test_batch": None}
        return {"diverged_at": None, "final": final}

    seeds = [
        make_run("bn_x5", {0: 10}, summary=final(80, 81)),
        make_run("bn_x5", {0: 10}, summary=final(84, 83), seed=1),
    ]
    found = model_of(*seeds)["final"]
    assert found["moving_average"]["top1"]["values"] == [80, 84]
    assert found["moving_average"]["top1"]["mean"] == 82
    assert found["moving_average"]["top5"]["mean"] == 92
    assert found["population"]["top1"]["mean"] == 82
    assert found["population"]["top1"]["std"] == pytest.approx(np.sqrt(2))
    assert found["test_batch"] is None
    # A seed that has none, be it running or diverged, leaves no mean.
    for summary in (None, diverged(5)):
        unfinished = make_run("bn_x5", {0: 10}, summary=summary, seed=2)
        assert model_of(*seeds, unfinished)["final"] == dict.fromkeys(found)


def test_models_come_in_the_papers_order_after_the_reference():
    runs = [make_run(name, {0: 10, 10: 20}) for name in ("mine", "also_mine", *PAPER)]
    names = [model["name"] for model in compare(runs[::-1])["models"]]
    assert names == [*PAPER, "also_mine", "mine"]
    names = [model["name"] for model in compare(runs, ["bn_x30"])["models"]]
    assert names[:3] == ["bn_x30", "inception", "bn_baseline"]


def test_references_by_their_names():
    he = make_run("inception", {0: 10, 10: 90}, initialisation="he", seed=1)
    names = [f"inception (initialisation={kind})" for kind in ("he", "gaussian")]
    comparison = compare([*REFERENCE, he], names)
    assert [each["level"] for each in comparison["references"]] == [90, 72]
    assert [model["name"] for model in comparison["models"]] == names


@pytest.mark.parametrize(
    ("runs", "name"),
    {
        "none": ([make_run("bn_x5", {0: 1}), make_run("bn_x30", {0: 1})], None),
        "two": ([*REFERENCE, make_run("inception", {0: 1}, batch_size=64)], None),
        "unknown": (REFERENCE, "nosuch"),
    }.values(),
)
def test_no_reference(runs, name):
    message = error_of(compare, runs, [name] if name else [])
    names = {
        "bn_x5": "bn_x5; bn_x30.",
        "inception": "inception (batch_size=32); inception (batch_size=64).",
    }
    expected = "inception." if name else names[runs[0].config["variant"]]
    assert message.endswith(f"give --reference=NAME, once or twice, of: {expected}")


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"dataset": "cifar10"}, "dataset: cluttered_mnist in inception_0, cifar10 in"),
        ({"image_size": 32}, "image_size: 64 in inception_0, 32 in bn_x5_0"),
        ({"eval_examples": 0}, "eval_examples: 2000 in inception_0, 0 in bn_x5_0"),
        ({"crop_fraction": 0.5}, "crop_fraction: 1.0 in inception_0, 0.5 in bn_x5_0"),
        ({"data": {"test_examples": 3}}, "data: None in inception_0, {'test_examples'"),
    ],
)
@pytest.mark.parametrize("function", [compare, compare_rates])
def test_other_data_are_not_compared(function, change, difference):
    message = error_of(function, [*REFERENCE, make_run("bn_x5", {0: 1}, **change)])
    assert "not evaluated on the same data" in message
    assert difference in message


def test_resolution_and_batch_sizes():
    runs = [
        *REFERENCE,
        make_run("bn_x5", {0: 1, 100: 5, 105: 6}, batch_size=128),
        make_run("bn_x30", {0: 1}),
    ]
    comparison = compare(runs)
    assert comparison["evaluation_interval"] == [5, 100]
    assert comparison["batch_sizes"] == [32, 128]
    assert compare(runs[-1:], ["bn_x30"])["evaluation_interval"] is None


def test_a_comparison_is_json():
    runs = [*REFERENCE, make_run("bn_x5", {0: 1, 10: 5}, summary=diverged(12))]
    for comparison in (compare(runs), compare_rates(runs)):
        assert json.loads(json.dumps(comparison, allow_nan=False)) == comparison


def test_rates_of_families():
    """0.1 * 3 and 0.3 * 1 are one rate; variants and other keys make families."""
    runs = [
        make_run("bn_x5", {0: 10, 10: 60, 20: 50}),
        make_run(
            "bn_x5",
            {0: 10, 10: 80, 20: 50},
            rate_multiple=1.0,
            learning_rate=0.3,
            seed=1,
        ),
        make_run("bn_x5", {0: 10, 10: 40}, learning_rate=0.01),
        make_run("bn_x5", {0: 10, 10: 11}, learning_rate=0.02, batch_size=64),
        make_run("inception", {0: 10, 10: 20}, summary=diverged(12)),
    ]
    inception, small, large = compare_rates(runs[::-1])["families"]
    assert inception["name"] == "inception"
    assert [point["state"] for point in inception["points"]] == ["diverged at step 12"]
    assert small["name"] == "bn_x5 (batch_size=32)"
    assert [point["initial_rate"] for point in small["points"]] == [0.03, 0.3]
    assert [point["best"]["mean"] for point in small["points"]] == [40, 70]
    assert small["points"][1]["seeds"] == [0, 1]
    assert small["points"][1]["best"]["std"] == pytest.approx(np.sqrt(200))
    assert large["name"] == "bn_x5 (batch_size=64)"
    assert [point["state"] for point in large["points"]] == ["stayed at chance"]


def test_the_same_seed_twice_at_one_rate():
    runs = [
        make_run("bn_x5", {0: 1}, learning_rate=0.3, rate_multiple=1.0),
        make_run("bn_x5", {0: 1}, learning_rate=0.1, rate_multiple=3.0),
    ]
    assert "both hold bn_x5 at 0.3 with the seed 0" in error_of(compare_rates, runs)


def test_the_papers_numbers():
    """From its figure 3: 14 times fewer steps, and 2.6 points more."""
    baseline, fast, best = (PAPER[name] for name in ("inception", "bn_x5", "bn_x30"))
    assert baseline.steps // fast.steps == 14
    assert best.best - baseline.best == pytest.approx(2.6)
    rates = [
        PAPER[name].initial_rate / baseline.initial_rate for name in ("bn_x5", "bn_x30")
    ]
    assert rates == pytest.approx([5, 30])
