"""Tables as text: for Markdown, or for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

NOTHING = "—"  # in a cell: not known, or not there


def table(
    header: Sequence[str], rows: Sequence[Sequence[Any]], *, markdown: bool = True
) -> str:
    """A table, padded so that it can be read as it stands.

    Args:
      header: of the columns.
      rows: texts as they are, and numbers, which are rounded to three digits.
      markdown: with the lines that make it one in Markdown.
    """
    texts = [list(header), *([_text(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    if not markdown:
        return "\n".join("  ".join(map(str.ljust, line, widths)) for line in texts)
    texts.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in texts
    )


def spread(statistics: Mapping[str, Any], digits: int = 2) -> str:
    """A mean, and its standard deviation if there is one."""
    mean, std = statistics["mean"], statistics["std"]
    if mean is None:
        return "not finite"
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def _text(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return "" if cell is None else str(cell)
