import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.distributed import parallel
from experiments.inception.config import get_config
from experiments.inception.construction import make_model
from tests.experiments.inception.tiny_inception import tiny_config


def test_the_model_is_the_configured_one():
    config = get_config("ensemble_6,small").to_dict()
    model = make_model(config | {"dtype": "bfloat16", "width": 0.5}, 7)
    assert type(model).__name__ == "Inception"
    found = {key: getattr(model, key) for key in ("num_classes", "width", "dtype")}
    assert found == {"num_classes": 7, "width": 0.5, "dtype": jnp.bfloat16}
    assert model.dropout_rate == 0.1
    assert model.per_activation_rows == ("5a", "5b")
    assert model.separable_stem
    assert not model.local_response_norm
    assert not model.auxiliary_head
    norm = model.norm()
    assert (norm.momentum, norm.epsilon) == (config["decay"], 1e-3)
    assert norm.axis_name == parallel.DEVICE_AXIS
    baseline = make_model(get_config("inception_sigmoid").to_dict(), 1000)
    assert baseline.norm is None
    assert baseline.activation == "sigmoid"
    assert baseline.local_response_norm
    assert baseline.dropout_rate == 0.4


def test_equal_configurations_share_a_model():
    config = get_config("ensemble_4").to_dict()
    model = make_model(config, 10)
    other = {"seed": 9, "learning_rate": 3.0, "num_steps": 7, "l2_weight": 0.5}
    # As a configuration that was read from JSON has it.
    assert make_model(config | other | {"per_activation_rows": ["5b"]}, 10) is model
    assert make_model(config, 11) is not model


@pytest.mark.parametrize(
    ("initialisation", "deviation"),
    [("gaussian", 0.17 * 3), ("he", np.sqrt(2 / 2_000) * 3)],
)
def test_initial_weights(initialisation, deviation):
    config = tiny_config(
        initialisation=initialisation, initial_std=0.17, initial_scale=3.0
    )
    weights = make_model(config, 10).kernel_init(
        jax.random.key(0), (2_000, 50), jnp.float32
    )
    assert weights.std() == pytest.approx(deviation, rel=0.02)
    assert abs(weights.mean()) < 0.02 * deviation
    # Not truncated.
    assert abs(weights).max() > 3.5 * deviation
