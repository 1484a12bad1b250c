import os
import shutil

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.checkpoints.load import adapt, load_variables
from experiments.checkpoints.save import Checkpoints
from experiments.checkpoints.stored import CheckpointError, named_leaves
from experiments.mnist.network import MLP
from experiments.training.optimisers import make_optimiser
from experiments.training.steps import init_state
from tests.experiments.helpers import (
    ORBAX_LEFTOVERS,
    assert_trees_identical,
    make_models,
    make_states,
)

MODEL = MLP(hidden=(3, 2), num_classes=4)
OPTIMISER = make_optimiser(momentum=0.9)

pytestmark = pytest.mark.filterwarnings(ORBAX_LEFTOVERS)


def make_state(model=MODEL, seed=0):
    return init_state(model, (4,), jax.random.key(seed), 0.1, OPTIMISER)


@pytest.fixture(scope="module")
def state():
    return make_state()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, state):
    """Checkpoints of one network, the best of which is not the newest."""
    folder = tmp_path_factory.mktemp("one") / "checkpoints"
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, {"network": jax.tree.map(lambda x: x + 1, state)}, 90.0)
    checkpoints.save(2, {"network": state}, 80.0)
    checkpoints.close()
    return folder


def error_of(*arguments, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_variables(*arguments, **options)
    return str(caught.value)


def test_variables_are_plain_and_those_that_were_saved(folder, state):
    for place in (folder, str(folder), folder.parent, folder / "2"):
        variables = load_variables(place)
        assert_trees_identical(variables, jax.device_get(state.variables))
        for leaf in jax.tree.leaves(variables):
            assert type(leaf) is np.ndarray


def test_a_relative_folder(folder, state, monkeypatch):
    monkeypatch.chdir(folder.parent)
    found = load_variables(folder.name)
    assert_trees_identical(found, jax.device_get(state.variables))
    assert_trees_identical(load_variables(os.path.join(folder.name, "2")), found)


def test_the_best_or_any_step(folder, state):
    best = load_variables(folder, step="best")
    expected = jax.tree.map(lambda x: np.asarray(x) + 1, state.variables)
    assert_trees_identical(best, expected)
    assert_trees_identical(load_variables(folder, step=1), best)
    assert_trees_identical(load_variables(folder, step=2), load_variables(folder))


def test_one_of_several_networks(tmp_path):
    states = make_states(make_models(hidden=(3,)), num_inputs=4)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, states)
    checkpoints.close()
    for name, state in states.items():
        found = load_variables(tmp_path, network=name)
        assert_trees_identical(found, jax.device_get(state.variables))
    assert load_variables(tmp_path, network="baseline")["batch_stats"] == {}
    assert "holds no network None: expected one of baseline, batch_norm." in (
        error_of(tmp_path)
    )


def test_what_is_not_there(folder, tmp_path):
    assert f"{tmp_path} holds no checkpoint: expected a run's work" in error_of(
        tmp_path
    )
    assert "none holds no checkpoint" in error_of(tmp_path / "none")
    for step in (3, "last"):
        message = error_of(folder, step=step)
        assert f"no checkpoint of step {step}: expected newest, best (where" in message
        assert message.endswith("or one of 1, 2.")
    shutil.copytree(folder, tmp_path / "checkpoints")
    shutil.copytree(folder, tmp_path / "population")
    assert f"give one of {tmp_path / 'checkpoints'}, {tmp_path}" in error_of(tmp_path)


def test_damage_is_an_error(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "2" / "params" / "manifest.ocdbt").unlink()
    message = error_of(copy)
    assert message.startswith(f"checkpoint {copy / '2'} is damaged (params cannot be")
    assert message.endswith("choose another step.")
    assert load_variables(copy, step=1)
    # What is not read does not matter: the optimiser's state.
    shutil.rmtree(copy / "1" / "opt_state")
    assert load_variables(copy, step=1)
    # The best is that of those whose score is known.
    (copy / "1" / "metadata" / "metadata").write_text("{")
    assert "2 is damaged (params" in error_of(copy, step="best")


def test_training_goes_on_with_another_optimiser(folder, state):
    optimiser = optax.adam(1e-3)
    fresh = make_state(seed=1)._replace(opt_state=optimiser.init(state.params))
    restored = fresh._replace(**load_variables(folder))
    assert_trees_identical(
        jax.device_get(restored.variables), jax.device_get(state.variables)
    )
    inputs = jax.random.normal(jax.random.key(0), (8, 4))

    @jax.jit
    def loss_of(params):
        variables = {"params": params, "batch_stats": restored.batch_stats}
        logits, _ = MODEL.apply(variables, inputs, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.arange(8) % 4
        ).mean()

    params, opt_state = restored.params, restored.opt_state
    for _ in range(5):
        grads = jax.grad(loss_of)(params)
        updates, opt_state = optimiser.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    assert loss_of(params) < loss_of(restored.params)


def test_another_number_of_classes(folder, state, capsys):
    fresh = make_state(MODEL.clone(num_classes=7), seed=5).variables
    loaded = load_variables(folder)
    variables, reinitialised = adapt(loaded, fresh, ["Dense_2"])
    head = ("params/Dense_2/bias", "params/Dense_2/kernel")
    assert reinitialised == head
    assert capsys.readouterr().out == f"Initialised anew: {', '.join(head)}.\n"
    assert jax.tree.structure(variables) == jax.tree.structure(fresh)
    found, old, new = (named_leaves(tree) for tree in (variables, loaded, fresh))
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, (new if name in head else old)[name])
    inputs = np.ones((2, 4), np.float32)
    logits = MODEL.clone(num_classes=7).apply(variables, inputs, train=False)
    assert logits.shape == (2, 7)


def test_nothing_is_initialised_anew_unasked(folder, capsys):
    fresh = make_state(MODEL.clone(num_classes=7)).variables
    loaded = load_variables(folder)
    with pytest.raises(CheckpointError) as caught:
        adapt(loaded, fresh)
    assert str(caught.value) == (
        "the checkpoint is of another network: "
        "shape of params/Dense_2/bias: (4,) there, (7,) here; "
        "shape of params/Dense_2/kernel: (2, 4) there, (2, 7) here. "
        "Name the modules that are to be initialised anew."
    )
    assert_trees_identical(adapt(loaded, loaded).variables, loaded)
    assert capsys.readouterr().out == ""


def test_missing_extra_and_dtype_are_listed(folder):
    loaded = load_variables(folder)
    flat = flax.traverse_util.flatten_dict(loaded, sep="/")
    flat["params/Dense_9/bias"] = flat.pop("params/Dense_1/kernel")
    flat["params/Dense_0/kernel"] = flat["params/Dense_0/kernel"].astype(np.float16)
    other = flax.traverse_util.unflatten_dict(flat, sep="/")
    with pytest.raises(CheckpointError) as caught:
        adapt(loaded, other)
    for line in (
        "missing: params/Dense_9/bias",
        "extra: params/Dense_1/kernel",
        "dtype of params/Dense_0/kernel: float32 there, float16 here",
    ):
        assert line in str(caught.value)
    variables, anew = adapt(loaded, other, ["Dense_0", "Dense_1", "Dense_9"])
    assert anew == ("params/Dense_0/kernel", "params/Dense_9/bias")
    assert jax.tree.structure(variables) == jax.tree.structure(other)
