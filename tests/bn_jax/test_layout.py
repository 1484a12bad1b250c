"""Feature and position axes."""

import jax.numpy as jnp
import numpy as np
import pytest

from bn_jax.layout import Layout, make_layout


@pytest.mark.parametrize(
    ("shape", "axis", "expected"),
    [
        ((8, 3), -1, Layout((1,), (0,), (3,), 8)),
        ((2, 4, 5, 3), -1, Layout((3,), (0, 1, 2), (3,), 40)),
        ((2, 3, 4, 5), 1, Layout((1,), (0, 2, 3), (3,), 40)),
        ((8, 2, 3), (1, 2), Layout((1, 2), (0,), (2, 3), 8)),
        ((8, 2, 3), [2, 1], Layout((1, 2), (0,), (2, 3), 8)),
        ((8, 2, 3), (-1, 0), Layout((0, 2), (1,), (8, 3), 2)),
        ((8, 2), (), Layout((), (0, 1), (), 16)),
        ((8, 2), (0, 1), Layout((0, 1), (), (8, 2), 1)),
        ((0, 3), 1, Layout((1,), (0,), (3,), 0)),
        ((5,), 0, Layout((0,), (), (5,), 1)),
        ((8, 3), np.int64(1), Layout((1,), (0,), (3,), 8)),
    ],
)
def test_layout_of_shape_and_axes(shape, axis, expected):
    layout = make_layout(shape, axis)
    assert layout == expected
    assert hash(layout) == hash(expected)
    assert all(type(i) is int for i in layout.feature_axes)


def test_expand_aligns_features_with_their_axes():
    layout = make_layout((2, 3, 4, 5), (1, 3))
    per_feature = jnp.arange(15.0).reshape(3, 5)
    expanded = layout.expand(per_feature)
    assert expanded.shape == (1, 3, 1, 5)
    np.testing.assert_array_equal(expanded[0, :, 0], per_feature)


@pytest.mark.parametrize("axis", [2, -3, (0, 5)])
def test_axis_out_of_range(axis):
    with pytest.raises(ValueError, match=r"out of range.*\(8, 3\).*from -2 to 1"):
        make_layout((8, 3), axis)


@pytest.mark.parametrize("axis", [(1, 1), (1, -1), [0, -2]])
def test_axis_named_twice(axis):
    with pytest.raises(ValueError, match=r"names one axis .*\(8, 3\) twice"):
        make_layout((8, 3), axis)


@pytest.mark.parametrize("axis", ["channels", 1.0, None, (0, "c"), np.array([0, 1])])
def test_axis_is_not_an_integer(axis):
    with pytest.raises(TypeError, match="axis must be an integer or a sequence"):
        make_layout((8, 3), axis)
