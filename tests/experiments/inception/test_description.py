import flax.linen as nn
import jax
import pytest

from experiments.inception.description import Layer, as_table, describe
from experiments.inception.layers import Convolution, SeparableConv


class Classifier(nn.Module):
    """A convolution, a separable one, dropout and a dense layer."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = Convolution(4, 3, 2, name="first")(images)
        x = SeparableConv(5, (3, 3), (1, 1), name="second")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(7, name="last")(x.reshape(len(x), -1))


LAYERS = (
    Layer("first", (6, 5, 4), 3 * 3 * 3 * 4 + 4, 1, 6 * 5 * 3 * 3 * 3 * 4),
    Layer(
        "second",
        (6, 5, 5),
        3 * 3 * 4 * 8 + 32 * 5 + 5,
        2,
        6 * 5 * (3 * 3 * 4 * 8 + 32 * 5),
    ),
    Layer("last", (7,), 150 * 7 + 7, 1, 150 * 7),
)


def test_layers_counted_by_hand():
    assert describe(Classifier(), (12, 10, 3)) == LAYERS


def test_table():
    assert as_table(LAYERS).splitlines() == [
        "layer   output  parameters  weight layers  multiply-adds",
        "first   6x5x4          112              1          3,240",
        "second  6x5x5          453              2         13,440",
        "last    7            1,057              1          1,050",
        "total                1,622              4         17,730",
    ]


@pytest.mark.parametrize("parameters", [1, 1_234_567_890])
def test_columns_fit_their_widest_number(parameters):
    layer = Layer("name_of_a_layer", (1_000, 1_000, 64), parameters, 3, 10**12)
    lines = as_table([layer]).splitlines()
    assert len({len(line) for line in lines}) == 1
    for line in lines[1:]:
        assert line.split()[-3:] == [f"{parameters:,}", "3", "1,000,000,000,000"]
    assert "1000x1000x64" in lines[1]
