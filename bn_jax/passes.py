"""The four passes over memory that a training step of one layer makes.

Forward: `moments_pass` reads x, `normalise_pass` reads x and writes y. Backward:
`gradient_sums_pass` reads x and dy, `input_gradient_pass` reads both again and writes
dx. Each is called by `forms.run`, with the `Form` of the platform. Arguments of one
name are the same everywhere:

  layout: of x.
  x: the input, in its own dtype; dy: the cotangent of y, of x's shape.
  weights: of the statistics' dtype, broadcastable to x, or None.
  mean, slope, shift: (features), in the statistics' dtype. What the activation is
    applied to is z = (x - mean) * slope + shift.

A deviation from a mean does not overflow, however large finite values of x are: it is
computed in the form's unit, halved or smaller. That is exact, and takes no instruction
more where x * 0.5 - c is one.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bn_jax.activations import Activation
from bn_jax.forms import Form
from bn_jax.layout import Layout

# An expected mean is near if what cancels in the variance is at most so many times what
# remains. The mean of an eighth of the values always is.
MAX_CANCELLED = 7


def statistics_dtype(x: jax.Array) -> jnp.dtype:
    """The dtype of sums and statistics: float32, or float64 for float64 input.

    Raises:
      TypeError: x is not floating point.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"x must be floating point, got {x.dtype}; convert it first, for example "
            "x.astype(jnp.float32)."
        )
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def total_weight(layout: Layout, x: jax.Array, weights: jax.Array | None) -> jax.Array:
    """The number of values per feature, (features), each as often as it weighs."""
    if weights is None:
        return jnp.full(layout.feature_shape, layout.num_positions, statistics_dtype(x))
    repeats = math.prod(
        x.shape[axis] for axis in layout.position_axes if weights.shape[axis] == 1
    )
    total = jnp.sum(weights, axis=layout.position_axes) * repeats
    return jnp.broadcast_to(total, layout.feature_shape)


def nonzero(count: jax.Array) -> jax.Array:
    """The count to divide by: 1 where there is nothing, and so only zeros to divide."""
    return jnp.where(count == 0, 1, count)


def saturated(var: jax.Array) -> jax.Array:
    """A variance, at most the largest finite number; NaN stays NaN."""
    return jnp.minimum(var, jnp.finfo(var.dtype).max)


def overflowed(var: jax.Array) -> jax.Array:
    """Whether a variance is one that was saturated, or an average with such a one."""
    return var >= jnp.finfo(var.dtype).max / 2


def inverse_std(var: jax.Array, eps: float) -> jax.Array:
    """1 / sqrt(var + eps), and 0 for a variance that overflowed."""
    return jnp.where(overflowed(var), 0, lax.rsqrt(var + eps))


def moments_pass(
    form: Form,
    layout: Layout,
    x: jax.Array,
    weights: jax.Array | None,
    expected_mean: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance, (features) each, in the statistics' dtype.

    From the deviations from a shift, whose own mean then corrects mean and variance
    (Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", the
    shifted form). The shift is the mean of a sample. With weights, of which those of
    the sample may all be 0, it is that of all values.
    """
    total = total_weight(layout, x, weights)
    if not form.expects_mean or expected_mean is None:
        return _moments_about_sample(form, layout, x, weights, total)
    expected_mean = expected_mean.astype(total.dtype)
    if x.dtype == jnp.bfloat16:
        return _moments_about_the_nearer(expected_mean, form, layout, x, weights, total)
    mean, var, near = _moments_about(expected_mean, form, layout, x, weights, total)
    # Of no values there is no mean, whatever was expected.
    mean = jnp.where(total == 0, 0, mean)
    # The other branch is computed only if some feature needs it.
    return lax.cond(
        jnp.all(near),
        lambda: (mean, var),
        lambda: _moments_about_sample(form, layout, x, weights, total),
    )


def _moments_about_sample(
    form: Form,
    layout: Layout,
    x: jax.Array,
    weights: jax.Array | None,
    total: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    if weights is not None:
        scale = _sum_scale(layout)
        values = weights * (_unmasked(x, weights) * scale)
        (shift,) = form.sums(layout, values)
        shift = shift / (nonzero(total) * scale)
    elif layout.position_axes:
        sample = form.sample(layout, x).astype(total.dtype)
        number = math.prod(sample.shape[axis] for axis in layout.position_axes)
        # Divided first, so that no sum overflows and nothing follows the sum.
        share = 1 / jnp.maximum(jnp.full((), number, total.dtype), 1)
        (shift,) = form.sums(layout, sample * share)
    else:
        shift = x.astype(total.dtype)
    # The barrier keeps the compiler from computing the shift twice with two roundings:
    # for the deviations, and for the mean.
    shift = lax.optimization_barrier(lax.stop_gradient(shift))
    mean, var, _ = _moments_about(shift, form, layout, x, weights, total)
    return mean, var


def _moments_about(
    shift: jax.Array,
    form: Form,
    layout: Layout,
    x: jax.Array,
    weights: jax.Array | None,
    total: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean and variance from deviations from a shift, and whether that was near."""
    scale = _sum_scale(layout)
    deviation = _unmasked(x, weights) * scale - layout.expand(shift * scale)
    weighted = deviation if weights is None else weights * deviation
    sums = form.sums(layout, weighted, weighted * deviation)
    # In units of 1 / scale.
    correction, square = (value / nonzero(total) for value in sums)
    cancelled = correction * correction
    finite = jnp.isfinite(square)
    near = finite & (cancelled <= MAX_CANCELLED / (MAX_CANCELLED + 1) * square)
    # Infinity minus infinity would be NaN.
    remaining = jnp.maximum(square - jnp.where(finite, cancelled, 0), 0)
    var = saturated(remaining / scale / scale)
    return shift + correction / scale, var, near


def _moments_about_the_nearer(
    expected_mean: jax.Array,
    form: Form,
    layout: Layout,
    x: jax.Array,
    weights: jax.Array | None,
    total: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance from deviations from an expected mean, or from 0.

    For bfloat16, without the condition, for whose sake XLA's TPU compiler would change
    the layout of x. About 0, a mean of k standard deviations cancels to some
    k^2 * 2^-24 of the variance; the rounding of x itself to 8 bits has already moved
    that by some k^2 * 2^-18.
    """
    scale = _sum_scale(layout)
    expected = jnp.where(jnp.isfinite(expected_mean), expected_mean, 0) * scale
    from_zero = _unmasked(x, weights) * scale
    deviation = from_zero - layout.expand(expected)
    values = [deviation, deviation * deviation, from_zero, from_zero * from_zero]
    if weights is not None:
        values = [weights * value for value in values]
    sums = form.sums(layout, *values)
    # In units of 1 / scale.
    correction, square, mean, square_about_zero = (v / nonzero(total) for v in sums)
    nearer = jnp.abs(correction) <= jnp.abs(mean)
    square = jnp.where(nearer, square, square_about_zero)
    cancelled = jnp.square(jnp.where(nearer, correction, mean))
    mean = jnp.where(nearer & (total != 0), correction + expected, mean)
    # Infinity minus infinity would be NaN.
    remaining = square - jnp.where(jnp.isfinite(square), cancelled, 0)
    return mean / scale, saturated(jnp.maximum(remaining, 0) / scale / scale)


def _sum_scale(layout: Layout) -> float:
    """A power of two that keeps the sum of so many deviations from overflowing."""
    known = isinstance(layout.num_positions, int)
    return 2.0 ** -(layout.num_positions.bit_length() + 1 if known else 32)


def _unmasked(x: jax.Array, weights: jax.Array | None) -> jax.Array:
    """The input in the statistics' dtype, with 0 for padding, whatever that holds."""
    x = x.astype(statistics_dtype(x))
    return x if weights is None else jnp.where(weights == 0, 0, x)


def _hoisted(
    form: Form, mean: jax.Array, slope: jax.Array, shift: jax.Array
) -> jax.Array:
    """The table of per-feature arrays, (3, features), for deviations in form.unit."""
    return form.hoist(jnp.stack([mean * form.unit, slope / form.unit, shift]))


class _Deviations(NamedTuple):
    """What a pass computes of x and a hoisted table, for every position."""

    from_mean: jax.Array  # (x - mean) * unit, and 0 for padding
    scaled: jax.Array  # (x - mean) * slope
    shift: jax.Array  # broadcastable to them


def _deviations(
    form: Form,
    layout: Layout,
    x: jax.Array,
    weights: jax.Array | None,
    table: jax.Array,
) -> _Deviations:
    mean, slope, shift = (layout.expand(row) for row in table)
    # Centred before anything else is done to it: x * slope alone rounds away the
    # difference from the mean when the mean is large.
    from_mean = x.astype(table.dtype) * form.unit - mean
    if weights is not None:
        from_mean = jnp.where(weights == 0, 0, from_mean)
    return _Deviations(from_mean, from_mean * slope, shift)


def normalise_pass(
    form: Form,
    layout: Layout,
    activation: Activation,
    x: jax.Array,
    weights: jax.Array | None,
    mean: jax.Array,
    slope: jax.Array,
    shift: jax.Array,
) -> jax.Array:
    """The output activation(z), like x; 0 where the weight is 0."""
    table = _hoisted(form, mean, slope, shift)
    _, scaled, row = _deviations(form, layout, x, None, table)
    y = activation.apply(scaled + row)
    if weights is not None:
        y = jnp.where(weights == 0, 0, y)
    return y.astype(x.dtype)


class _Gate(NamedTuple):
    """What an activation, and weights of 0, do to the cotangent of y; None for nothing.

    Kept apart, so that a pass can choose by `passes` as late as possible.
    """

    passes: jax.Array | None
    slope: jax.Array | None

    def times_slope(self, dy: jax.Array) -> jax.Array:
        """The cotangent of z where it passes."""
        return dy if self.slope is None else dy * self.slope

    def __call__(self, dy: jax.Array) -> jax.Array:
        """The cotangent g of z."""
        g = self.times_slope(dy)
        return g if self.passes is None else jnp.where(self.passes, g, 0)


def _deviation_and_gate(
    form: Form,
    layout: Layout,
    activation: Activation,
    x: jax.Array,
    weights: jax.Array | None,
    table: jax.Array,
) -> tuple[jax.Array, _Gate]:
    from_mean, scaled, shift = _deviations(form, layout, x, weights, table)
    passes = slope = None
    if activation.passes is not None:
        passes = activation.passes(scaled, shift)
    if activation.slope is not None:
        slope = activation.slope(scaled + shift)
    if weights is not None:
        counts = jnp.broadcast_to(weights != 0, x.shape)
        passes = counts if passes is None else passes & counts
    return from_mean, _Gate(passes, slope)


def gradient_sums_pass(
    form: Form,
    layout: Layout,
    activation: Activation,
    x: jax.Array,
    dy: jax.Array,
    weights: jax.Array | None,
    mean: jax.Array,
    slope: jax.Array,
    shift: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums over the positions: of g, and of g * (x - mean); (features) each.

    With them comes the table for `input_gradient_pass`.
    """
    dy = dy.astype(mean.dtype)
    # Each sum computes what it needs again, so that no mask is stored.
    first = form.hide(_hoisted(form, mean, slope, shift))
    _, gate = _deviation_and_gate(form, layout, activation, x, weights, first)
    second = form.hide(first)
    from_mean, gate_again = _deviation_and_gate(
        form, layout, activation, x, weights, second
    )
    g_sum, product_sum = form.sums(layout, gate(dy), gate_again(dy) * from_mean)
    return g_sum, product_sum / form.unit, second


def input_gradient_pass(
    form: Form,
    layout: Layout,
    activation: Activation,
    x: jax.Array,
    dy: jax.Array,
    weights: jax.Array | None,
    table: jax.Array,
    moments_slope: jax.Array,
    moments_shift: jax.Array,
) -> jax.Array:
    """The gradient of x, like x.

      dx = slope * g - w * ((x - mean) * moments_slope + moments_shift)

    `table` is as `gradient_sums_pass` returned it; `moments_slope` and `moments_shift`,
    (features), are what flows through the moments.
    """
    dy = dy.astype(table.dtype)
    table = form.hide(table)
    from_mean, gate = _deviation_and_gate(form, layout, activation, x, weights, table)
    unit = form.unit
    direct, through_var, through_mean = form.hoist(
        jnp.stack([table[1] * unit, moments_slope / unit, moments_shift])
    )
    through_moments = from_mean * layout.expand(through_var)
    through_moments += layout.expand(through_mean)
    if weights is not None:
        through_moments = weights * through_moments
    dx = layout.expand(direct) * gate.times_slope(dy) - through_moments
    if gate.passes is not None:
        # Rather than gate(dy): XLA's CPU compiler would load dy under a mask, and this
        # pass would take a third longer in float32.
        dx = jnp.where(gate.passes, dx, -through_moments)
    return dx.astype(x.dtype)


def weights_gradient_pass(
    form: Form,
    layout: Layout,
    x: jax.Array,
    weights: jax.Array,
    mean: jax.Array,
    inverse_std: jax.Array,
    var_share: jax.Array,
    g_mean: jax.Array,
    product_mean: jax.Array,
) -> jax.Array:
    """The gradient of the weights, like them.

      dw = -(g_mean * xhat + product_mean * (xhat^2 - var_share) / 2)

    0 where the weight is 0: what padding holds is not known.
    """
    table = _hoisted(form, mean, inverse_std, jnp.zeros_like(mean))
    _, xhat, _ = _deviations(form, layout, x, weights, table)
    through_var = (jnp.square(xhat) - layout.expand(var_share)) / 2
    dw = layout.expand(g_mean) * xhat + layout.expand(product_mean) * through_var
    dw = jnp.where(weights == 0, 0, -dw)
    shared_axes = [i for i, size in enumerate(weights.shape) if size == 1]
    return jnp.sum(dw, axis=shared_axes, keepdims=True)
