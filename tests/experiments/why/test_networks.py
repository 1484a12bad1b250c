"""The networks compute what they say, by NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.why.networks import WITHOUT, deep_mlp, inception, mlp, only_biases

KEY = jax.random.key(0)
INPUTS = jax.random.normal(jax.random.key(1), (20, 5))
ACTIVATIONS = {"sigmoid": lambda x: 1 / (1 + np.exp(-x)), "relu": lambda x: x.clip(0)}


def forward(layers, x, activation, norm_first=True, eps=1e-3):
    """Hidden layers, normalised by the batch where they have a norm, and the last."""
    x = np.asarray(x, np.float64)
    *hidden, last = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), layers)
    for layer in hidden:
        x = x @ layer.kernel + (0 if layer.bias is None else layer.bias)

        def norm(x, layer=layer):
            if layer.norm is None:
                return x
            xhat = (x - x.mean(0)) / np.sqrt(x.var(0) + eps)
            return layer.norm.scale * xhat + layer.norm.bias

        g = ACTIVATIONS[activation]
        x = g(norm(x)) if norm_first else norm(g(x))
    return x @ last.kernel + last.bias


def shaken(params):
    """With no parameter that is 0 or 1."""
    leaves, structure = jax.tree.flatten(params)
    return structure.unflatten(
        [leaf + 0.2 * jax.random.normal(KEY, leaf.shape) for leaf in leaves]
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normalisation", [WITHOUT, "batch_norm", "moments_outside"])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_mlp(activation, normalisation, norm_first, biased):
    options = {"activation": activation, "norm_first": norm_first, "biased": biased}
    model = mlp(5, (7, 6), 3, normalisation=normalisation, **options)
    assert model is mlp(5, (7, 6), 3, normalisation=normalisation, **options)
    params, stats = model.init(KEY, jnp.float32(0.5))
    assert (params[0].norm is None) == (normalisation == WITHOUT)
    has_bias = biased or not norm_first or normalisation == WITHOUT
    assert (params[0].bias is not None) == has_bias
    params = shaken(params)
    logits, new = model.apply(params, stats, INPUTS, train=True, key=KEY)
    expected = forward(params, INPUTS, activation, norm_first)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert len(new) == (0 if normalisation == WITHOUT else 2)


def test_noise_and_dropout_are_of_training_alone():
    noisy = mlp(5, (7, 6), 3, normalisation="noisy", dropout_rate=0.3)
    plain = mlp(5, (7, 6), 3)
    params, stats = plain.init(KEY, jnp.float32(0.5))
    for train in (True, False):
        one, other = (
            model.apply(params, stats, INPUTS, train=train, key=KEY)[0]
            for model in (noisy, plain)
        )
        assert (abs(one - other).max() > 0.01) == train


def test_dropout_leaves_its_share_out_and_the_mean_as_it_is():
    model = mlp(5, (400,), 400, normalisation=WITHOUT, dropout_rate=0.3)
    params, _ = model.init(KEY, jnp.float32(0))  # every unit is 1/2
    params = (params[0], params[1]._replace(kernel=jnp.eye(400)))
    units, _ = model.apply(params, (), INPUTS, train=True, key=KEY)
    assert set(np.unique(units.round(4))) == {0, np.float32(0.7143)}
    assert (units == 0).mean() == pytest.approx(0.3, abs=0.03)


def test_only_biases_train():
    whole = mlp(5, (7, 6), 3, biased=True)
    part = only_biases(whole)
    params, stats = whole.init(KEY, jnp.float32(0.5))
    biases, rest = part.init(KEY, jnp.float32(0.5))
    assert [bias.shape for bias in biases] == [(7,), (6,)]
    # Batch normalisation takes them away, whatever they are.
    other = tuple(bias + 5 for bias in biases)
    for chosen in (biases, other):
        logits, (_, new) = part.apply(chosen, rest, INPUTS, train=True, key=KEY)
        expected, _ = whole.apply(params, stats, INPUTS, train=True, key=KEY)
        np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert new[0].mean.shape == (7,)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_deep_mlp(batch_norm):
    model = deep_mlp(5, 4, 6, 3, batch_norm=batch_norm, activation="relu")
    params, stats = model.init(KEY, jnp.float32(1.5))
    start, middle, end = params
    for kernel, inputs in ((start.kernel, 5), (middle.kernel, 6), (end.kernel, 6)):
        deviation = float(kernel.std()) * inputs**0.5
        assert deviation == pytest.approx(1.5, rel=0.35)
    start, middle, end = params = shaken(params)
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], middle) for i in range(3)]
    logits, _ = model.apply(params, stats, INPUTS, train=True, key=KEY)
    expected = forward([start, *each, end], INPUTS, "relu")
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)
    inferred, _ = model.apply(params, stats, INPUTS, train=False, key=KEY)
    assert bool(abs(inferred - logits).max() > 0.01) == batch_norm


def test_inceptions_layers_are_all_there():
    model = inception(10, batch_norm=True, width=1 / 32)
    params, stats = jax.eval_shape(model.init, KEY, jnp.float32(1))
    assert len(params) == 14
    # From the input to the classifier.
    assert jax.tree.leaves(params[0])[0].shape[0] == 7
    assert params[-1]["kernel"].shape[-1] == 10
    assert len(jax.tree.leaves(stats)) > 20
    logits, new = jax.eval_shape(
        lambda *arguments: model.apply(*arguments, train=True, key=KEY),
        *(params, stats, jnp.zeros((2, 32, 32, 3))),
    )
    assert logits.shape == (2, 10)
    assert jax.tree.structure(new) == jax.tree.structure(stats)
