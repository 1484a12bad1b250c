import jax
import numpy as np
import pytest

from experiments.checkpoints.folded_network import fold_variables
from experiments.checkpoints.stored import CheckpointError
from experiments.inception.construction import make_model
from experiments.mnist.network import MLP
from tests.experiments.helpers import make_models, make_states, small_config
from tests.experiments.inception.tiny_inception import (
    NUM_CLASSES,
    TinyInception,
    tiny_config,
)

HIDDEN = (3, 2)


def shaken(variables):
    """Other values everywhere: statistics that are not 0 and 1."""
    leaves, structure = jax.tree.flatten(variables)
    random = np.random.default_rng(0)
    values = [
        random.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype) for leaf in leaves
    ]
    return structure.unflatten(values)


def test_replicas_of_the_mnist_experiment(capsys):
    """Folded, they are networks of the same layers with biases in place of BN."""
    models = make_models(hidden=HIDDEN)
    states = make_states(models, num_inputs=4)
    config = small_config(hidden=HIDDEN)
    variables = jax.device_get(states["batch_norm"].variables)
    folded = fold_variables(config, "batch_norm", variables)
    assert capsys.readouterr().out == (
        "BatchNorm_0: folded into Dense_0\nBatchNorm_1: folded into Dense_1\n"
    )
    inputs = np.linspace(-1, 1, 20, dtype=np.float32).reshape(5, 4)
    plain = MLP(hidden=HIDDEN, num_classes=4, batch_norm=False)
    for replica in range(2):
        one, other = (
            jax.tree.map(lambda leaf, i=replica: leaf[i], tree)
            for tree in (variables, folded)
        )
        expected = models["batch_norm"].apply(one, inputs, train=False)
        found = plain.apply({"params": other["params"]}, inputs, train=False)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_inception_experiment(capsys):
    config = tiny_config("bn_x5")
    inputs = np.random.default_rng(1).normal(size=(3, 32, 32, 3)).astype(np.float32)
    model = make_model(config, NUM_CLASSES, TinyInception)
    variables = shaken(
        jax.device_get(model.init(jax.random.key(0), inputs, train=False))
    )
    folded = fold_variables(config, "network", variables, TinyInception)
    assert capsys.readouterr().out == "conv1/norm: folded into conv1/conv\n"
    assert not jax.tree.leaves(folded["batch_stats"])
    plain = TinyInception(NUM_CLASSES)
    expected = model.apply(variables, inputs, train=False)
    found = plain.apply({"params": folded["params"]}, inputs, train=False)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_without_normalisation_nothing_changes(capsys):
    variables = {"params": {"Dense_0": {"bias": np.ones(2)}}, "batch_stats": {}}
    assert fold_variables({}, "baseline", variables) == variables
    assert capsys.readouterr().out == (
        "baseline: there is no batch normalisation to fold.\n"
    )


def test_a_network_of_no_experiment_here():
    variables = {"params": {}, "batch_stats": {"norm": {"mean": np.ones(2)}}}
    with pytest.raises(CheckpointError, match="no experiment here: export it without"):
        fold_variables({"learning_rate": 0.1}, "network", variables)
