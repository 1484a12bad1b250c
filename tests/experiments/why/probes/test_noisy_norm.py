"""The noise is as wide as it is said to be, and nothing else differs."""

import jax
import numpy as np
import pytest

import bn_jax
from experiments.why.probes.noisy_norm import DEFAULT_NOISE, Noise, noisy_batch_norm

X = jax.random.normal(jax.random.key(0), (400, 50)) * 3 + 2
PARAMS, STATS = bn_jax.init_params(50), bn_jax.init_stats(50)


def test_without_noise_it_is_batch_normalisation():
    none = Noise(0.0, 1.0, 0.0, 0.0)
    y, stats = noisy_batch_norm(jax.random.key(1), PARAMS, STATS, X, noise=none)
    expected, expected_stats = bn_jax.batch_norm(PARAMS, STATS, X, train=True)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(stats.mean, expected_stats.mean)
    np.testing.assert_array_equal(stats.var, expected_stats.var)


@pytest.mark.parametrize("noise", [DEFAULT_NOISE, Noise(2.0, 3.0, 0.2, 0.3)])
def test_what_each_unit_is_shifted_and_scaled_by(noise):
    y, stats = noisy_batch_norm(jax.random.key(1), PARAMS, STATS, X, noise=noise)
    plain, expected_stats = bn_jax.batch_norm(PARAMS, STATS, X, train=True)
    np.testing.assert_array_equal(stats.var, expected_stats.var)
    # By least squares, unit by unit: 400 examples average their own noise away.
    fits = [np.polyfit(plain[:, i], y[:, i], 1) for i in range(50)]
    scales, shifts = np.transpose(fits)
    for values, low, high in (
        (shifts, -noise.shift, noise.shift),
        (scales, 1, noise.scale),
    ):
        width = high - low
        assert low - 0.05 < values.min() < low + 0.15 * width
        assert high - 0.15 * width < values.max() < high + 0.05
    rest = np.array(y) - np.array(plain) * scales - shifts
    # A uniform number from -a to a has the variance a^2 / 3.
    example = noise.shift_of_example, noise.scale_of_example
    assert rest.var() == pytest.approx((example[0] ** 2 + example[1] ** 2) / 3, rel=0.1)


def test_another_key_is_other_noise():
    one, other = (
        noisy_batch_norm(jax.random.key(seed), PARAMS, STATS, X)[0] for seed in (1, 2)
    )
    assert abs(one - other).min(0).max() > 0.1
