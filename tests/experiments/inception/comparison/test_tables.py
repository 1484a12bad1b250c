import pytest

from experiments.inception.comparison.models import PAPER, compare, compare_rates
from experiments.inception.comparison.tables import comparison_page, rates_page
from tests.experiments.inception.comparison.test_models import (
    REFERENCE,
    baselines,
    diverged,
    make_run,
)


def tables_of(page: str) -> list[list[list[str]]]:
    """The cells of the tables of a page, without the rule below the header."""
    tables: list[list[list[str]]] = [[]]
    for line in page.splitlines():
        if line.startswith("|"):
            tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif tables[-1]:
            tables.append([])
    return [[header, *rows] for header, _, *rows in filter(None, tables)]


def final(**accuracy: float) -> dict:
    scores = {
        kind: None if top1 is None else {"top1": top1, "top5": top1 + 10, "loss": 0.5}
        for kind, top1 in accuracy.items()
    }
    return {"diverged_at": None, "final": scores}


def test_figure_3s_table_with_the_papers_beside_it():
    runs = [
        *REFERENCE,
        make_run("bn_x5", {0: 10, 1_000: 71, 2_000: 73.456}),
        make_run("bn_x5_sigmoid", {0: 10, 20: 71.9}),
        make_run("inception_x5", {0: 10}, summary=diverged(1_234)),
        make_run("inception_sigmoid", {0: 10, 30: 9.9}),
        make_run("mine", {0: 10, 3: 72}, learning_rate=0.0002, rate_multiple=1.0),
    ]
    table, _ = tables_of(comparison_page(compare(runs)))
    rate, nothing = "0.3", "—"
    assert table == [
        [
            *("model", "initial rate", "paper", "steps to 72.00% (inception)"),
            *("ratio", "paper, to 72.2%", "ratio", "best accuracy, %", "at step"),
            *("in the end, %", "paper"),
        ],
        [
            *("inception", rate, "0.0015", "20", "1.00", "31.0M", "1.0"),
            *("72.00 ± 2.83", "20", nothing, "72.2"),
        ],
        [
            *("bn_x5", rate, "0.0075", "2,000", "0.01", "2.1M", "14.8"),
            *("73.46", "2,000", nothing, "73.0"),
        ],
        [
            *("bn_x5_sigmoid", rate, "0.0075", "never", nothing, "never", nothing),
            *("71.90", "20", nothing, "69.8"),
        ],
        [
            *("inception_x5", rate, "0.0075", "diverged at step 1,234", nothing),
            *("reached machine infinity", nothing, "10.00", "0", nothing, nothing),
        ],
        [
            *("inception_sigmoid", rate, nothing, "stayed at chance", nothing),
            *("stayed at chance", nothing, "10.00", "0", nothing, nothing),
        ],
        [
            *("mine", "0.0002", nothing, "3", "6.67", nothing, nothing),
            *("72.00", "3", nothing, nothing),
        ],
    ]


def test_rounding_never_hides_who_reached_the_level():
    """71.996% is not 72%, and the table has to show it."""
    runs = [*REFERENCE, make_run("bn_x5", {0: 10, 20: 71.996})]
    page = comparison_page(compare(runs))
    (header, reference, model), _ = tables_of(page)
    assert header[3] == "steps to 72.000% (inception)"
    assert "its best accuracy, 72.000%, at step 20, is to be reached" in page
    assert reference[7] == "72.000 ± 2.828"
    assert model[3] == "never"
    assert model[7] == "71.996"


def test_final_accuracy_and_states():
    runs = [
        make_run("inception", {0: 10, 20: 60}, summary=final(moving_average=61.5)),
        make_run("bn_x5", {0: 10, 20: 60}, summary=None),
        *(
            make_run("bn_x30", {0: 10, 20: 60}, seed=seed, summary=final(**accuracy))
            for seed, accuracy in {
                3: {"moving_average": 70, "population": 71, "test_batch": 50},
                7: {"moving_average": 72, "population": 71, "test_batch": 54.125},
            }.items()
        ),
    ]
    comparison, table = tables_of(comparison_page(compare(runs)))
    nothing = "—"
    # By Algorithm 2's statistics, and the baseline, which has none, as it is.
    in_the_end = [row[9] for row in comparison]
    assert in_the_end == ["in the end, %", "61.50", nothing, "71.00 ± 0.00"]
    assert table == [
        ["model", "seeds", "state", "moving average", "Algorithm 2", "test batch"],
        ["inception", "0", "finished", "61.50 / 71.50", nothing, nothing],
        [
            *("bn_x5", "0", "running or stopped at step 20 of 1,200"),
            *(nothing, nothing, nothing),
        ],
        [
            *("bn_x30", "3, 7", "finished", "71.00 ± 1.41 / 81.00 ± 1.41"),
            *("71.00 ± 0.00 / 81.00 ± 0.00", "52.06 ± 2.92 / 62.06 ± 2.92"),
        ],
    ]


def test_two_references_and_the_rates_they_were_chosen_from():
    runs = [*baselines(10, 70, 60), make_run("bn_x5", {0: 10, 10: 65, 15: 71})]
    page = comparison_page(compare(runs))
    table, rates, _ = tables_of(page)
    nothing = "—"
    assert table[0][3:7] == [
        *("steps to no level: at chance (inception at 0.0015)", "ratio"),
        *("steps to 70.00% (inception at 0.0075)", "ratio"),
    ]
    assert [row[0] for row in table[1:]] == [
        *("inception at 0.0015", "inception at 0.0075", "bn_x5"),
    ]
    at_chance = "the reference is at chance"
    assert [row[3:7] for row in table[1:]] == [
        [at_chance, nothing, "stayed at chance", nothing],
        [at_chance, nothing, "30", "1.00"],
        [at_chance, nothing, "15", "2.00"],
    ]
    assert rates == [
        ["model", "initial rate", "best accuracy, %", "state"],
        ["inception at 0.0015", "0.0015", "10.00", "stayed at chance"],
        ["inception at 0.0075", "0.0075", "70.00", "finished"],
        ["inception at 0.015", "0.015", "60.00", "finished"],
    ]
    assert "inception at 0.0015 (the paper's rate): it stayed at chance" in page
    assert "inception at 0.0075 (the best of 3): its best accuracy" in page


@pytest.mark.parametrize(
    ("runs", "said"),
    {
        "interval": (REFERENCE, "Evaluations are 10 steps apart"),
        "intervals": (
            [*REFERENCE, make_run("bn_x5", {0: 1, 2_500: 3})],
            "Evaluations are 10 to 2,500 steps apart",
        ),
        "seeds": (REFERENCE, "mean ± sample standard deviation over seeds"),
        "last": ([make_run("inception", {0: 1, 5: 20})], "more steps might raise it"),
        "running": (
            [make_run("inception", {0: 1, 5: 20}, summary=None)],
            "not finished, so that the level may still rise",
        ),
        "chance": (
            [make_run("inception", {0: 1, 5: 1})],
            "stayed at chance, so that there is nothing to reach",
        ),
        "chance so far": (
            [make_run("inception", {0: 1, 5: 1}, summary=None)],
            "is not finished, and so far at chance, so that there is nothing",
        ),
        "batches": (
            [*REFERENCE, make_run("bn_x5", {0: 1}, batch_size=1_024)],
            "Batch sizes differ (32, 1,024)",
        ),
        "examples": (REFERENCE, "cluttered_mnist at 64 x 64, 2,000 test examples"),
        "all examples": (
            [make_run("inception", {0: 1}, eval_examples=0)],
            "all test examples",
        ),
    }.values(),
)
def test_what_the_page_says_of_the_comparison(runs, said):
    assert said in comparison_page(compare(runs))


def test_what_the_page_does_not_say_without_need():
    page = comparison_page(compare([make_run("inception", {0: 1, 5: 20, 10: 19})]))
    for words in (
        "not finished",
        "might raise",
        "Batch sizes",
        "nothing to reach",
        "seeds,",
    ):
        assert words not in page.split("## Runs")[0]
    assert "standard deviation" not in page


def test_rates_in_rows_and_families_in_columns():
    runs = [
        make_run("inception", {0: 10, 10: 60}, learning_rate=0.01),
        make_run("inception", {0: 10, 10: 70}, learning_rate=0.1),
        make_run("inception", {0: 10, 10: 71}, learning_rate=1.0, summary=diverged(12)),
        make_run("bn_x5", {0: 10, 10: 80}, learning_rate=0.1),
        make_run("bn_x5", {0: 10, 10: 84}, learning_rate=0.1, seed=1),
        make_run("bn_x5", {0: 10, 10: 85}, learning_rate=1.0, summary=None),
        make_run("bn_x5", {0: 10, 10: 9}, learning_rate=10.0),
    ]
    page = rates_page(compare_rates(runs))
    (table,) = tables_of(page)
    assert table == [
        ["initial rate", "inception", "bn_x5"],
        ["0.03", "60.00", "—"],
        ["0.3", "**70.00**", "**82.00 ± 2.83**"],
        [
            *("3", "diverged at step 12 (71.00)"),
            "running or stopped at step 10 of 1,200 (85.00)",
        ],
        ["30", "—", "stayed at chance (10.00)"],
    ]
    assert "chance (about 10.00%)" in page
    assert "rates.png" in page


def test_all_seven_variants_have_a_row_of_the_paper():
    runs = [make_run(name, {0: 10, 20: 50}) for name in PAPER]
    table, _ = tables_of(comparison_page(compare(runs)))
    assert [row[0] for row in table[1:]] == list(PAPER)
    assert [row[6] for row in table[1:]] == ["1.0", "2.3", "14.8", "11.5", *"———"]
