"""The table of the paper's appendix: the channels of Inception, row by row."""

from typing import Any, NamedTuple


class Row(NamedTuple):
    """A row of the table: the channels of four branches that are concatenated."""

    name: str
    conv1x1: int  # 0: the row has no such branch
    reduce3x3: int
    conv3x3: int
    reduce_double3x3: int
    double3x3: int
    pool: str  # "average" or "max", 3x3
    pool_projection: int  # 0: the pooled input passes through
    stride: int = 1  # of the last convolution of each branch, and of the pool


STEM_CHANNELS = (64, 64, 192)  # first convolution, 1x1 reduction, 3x3 convolution
TABLE = (
    Row("3a", 64, 64, 64, 64, 96, "average", 32),
    Row("3b", 64, 64, 96, 64, 96, "average", 64),
    Row("3c", 0, 128, 160, 64, 96, "max", 0, stride=2),
    Row("4a", 224, 64, 96, 96, 128, "average", 128),
    Row("4b", 192, 96, 128, 96, 128, "average", 128),
    Row("4c", 160, 128, 160, 128, 160, "average", 128),
    Row("4d", 96, 128, 192, 160, 192, "average", 128),
    Row("4e", 0, 128, 192, 192, 256, "max", 0, stride=2),
    Row("5a", 352, 192, 320, 160, 224, "average", 128),
    Row("5b", 352, 192, 320, 192, 224, "max", 128),
)
# The paper prints 128 for the pool projections of these rows, and outputs of 576, 576
# and (4e) 1024 channels, which only 96 adds up to. TF-Slim's, Torch's and Caffe's
# networks have 96; MXNet's and Cadene's 128.
CONTRADICTORY_ROWS = ("4c", "4d")
POOL_PROJECTIONS = (96, 128)


def table_rows(width: float, pool_projection: int) -> tuple[Row, ...]:
    """The table, in one of its two readings, with channels multiplied.

    Args:
      width: what every number of channels is multiplied by.
      pool_projection: 96 or 128, of rows 4c and 4d.

    Raises:
      ValueError: another pool projection, or a width that leaves no channel.
    """
    if pool_projection not in POOL_PROJECTIONS:
        raise ValueError(
            f"pool_projection={pool_projection}: the table of the paper can be read as "
            f"one of {POOL_PROJECTIONS}."
        )
    if scaled(32, width) < 1:
        raise ValueError(f"width={width} leaves no channels; use 1/32 or more.")
    fields = ("conv1x1", "reduce3x3", "conv3x3", "reduce_double3x3", "double3x3")

    def make(row: Row) -> Row:
        projection = row.pool_projection
        if row.name in CONTRADICTORY_ROWS:
            projection = pool_projection
        channels: dict[str, Any] = {
            field: scaled(getattr(row, field), width) for field in fields
        }
        return row._replace(pool_projection=scaled(projection, width), **channels)

    return tuple(make(row) for row in TABLE)


def scaled(channels: int, width: float) -> int:
    """Channels of a network of another width."""
    return round(channels * width)
