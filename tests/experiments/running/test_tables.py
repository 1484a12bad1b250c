from experiments.running.tables import spread, table

ROWS = [["a", 1234.5, 0.012345], ["long", 3, None]]


def test_tables_of_markdown_are_padded():
    assert table(["x", "y", "z"], ROWS).splitlines() == [
        "| x    | y     | z      |",
        "| ---- | ----- | ------ |",
        "| a    | 1,234 | 0.0123 |",
        "| long | 3     |        |",
    ]


def test_tables_of_a_terminal_have_no_lines():
    assert table(["x", "y", "z"], ROWS, markdown=False).splitlines() == [
        "x     y      z     ",
        "a     1,234  0.0123",
        "long  3            ",
    ]


def test_a_mean_has_its_deviation_if_there_is_one():
    assert spread({"mean": 1.234, "std": 0.5}) == "1.23 ± 0.50"
    assert spread({"mean": 1.26, "std": None}, 1) == "1.3"
    assert spread({"mean": None, "std": None}) == "not finite"
