"""Cells of Flax linen and nnx in their scans, against the pure function."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bn_jax
import bn_jax.nnx
from bn_jax import linen_recurrent, nnx_recurrent
from bn_jax.params import BatchNormParams
from bn_jax.recurrent import (
    GRU,
    LSTM,
    RecurrentParams,
    init_carry,
    recurrent_step,
)
from bn_jax.statistics import BatchStats

BATCH, STEPS, INPUTS, UNITS, MAX_STEPS = 4, 3, 2, 3, 5
LENGTHS = np.array([3, 1, 2, 3])
XS = np.random.default_rng(0).normal(0.5, 2, (BATCH, STEPS, INPUTS)).astype(np.float32)
KINDS = {"LSTM": LSTM, "GRU": GRU}
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def unroll(kind: Any, params: Any, stats: Any, lengths: Any, train: bool) -> Any:
    """Outputs (batch, steps, units) and statistics of the pure function."""
    carry, outputs = init_carry(kind, [BATCH], UNITS, lengths), []
    for t in range(STEPS):
        carry, stats = recurrent_step(kind, params, stats, carry, XS[:, t], train=train)
        outputs.append(carry.hidden)
    return jnp.stack(outputs, axis=1), stats


def of_linen(variables: Any) -> tuple[RecurrentParams, Any]:
    params, stats = (variables[name]["cell"] for name in ("params", "batch_stats"))
    norms = {
        term: BatchNormParams(params[f"{term}_scale"], params.get(f"{term}_bias"))
        for term in stats
    }
    kernels = (params[key] for key in ("input_kernel", "recurrent_kernel", "bias"))
    return RecurrentParams(*kernels, norms), {
        term: BatchStats(of["mean"], of["var"]) for term, of in stats.items()
    }


def linen_network(name: str, train: bool, **options: Any) -> linen_recurrent.RNN:
    cell = getattr(linen_recurrent, f"BatchNorm{name}Cell")
    return linen_recurrent.RNN(cell(UNITS, MAX_STEPS, not train, **options))


@pytest.mark.parametrize(("name", "lengths"), [("LSTM", LENGTHS), ("GRU", None)])
def test_linen_is_the_pure_function_scanned(name, lengths):
    network = linen_network(name, train=True)
    variables = jax.jit(network.init)(jax.random.key(0), XS[:1])  # at one example, too
    expected, stats = unroll(KINDS[name], *of_linen(variables), lengths, True)

    @jax.jit
    def train(variables: Any) -> Any:
        return network.apply(
            variables, XS, seq_lengths=lengths, mutable=["batch_stats"]
        )

    outputs, updated = train(variables)
    close(outputs, expected)
    moved = variables | updated
    jax.tree.map(close, of_linen(moved)[1], dict(stats))

    at_inference = linen_network(name, train=False)
    expected, _ = unroll(KINDS[name], *of_linen(moved), lengths, False)
    close(at_inference.apply(moved, XS, seq_lengths=lengths), expected)


def test_flaxs_own_rnn_scans_linen_cells():
    cell = functools.partial(linen_recurrent.BatchNormGRUCell, UNITS, MAX_STEPS)
    training = nn.RNN(cell(False), variable_carry="batch_stats")
    inference = nn.RNN(cell(True), variable_broadcast=("params", "batch_stats"))
    variables = training.init(jax.random.key(0), XS)
    ours = linen_network("GRU", train=True)
    jax.tree.map(
        np.testing.assert_array_equal, variables, ours.init(jax.random.key(0), XS)
    )
    apply = functools.partial(training.apply, variables, XS, mutable=["batch_stats"])
    jax.tree.map(close, apply(), ours.apply(variables, XS, mutable=["batch_stats"]))
    close(
        inference.apply(variables, XS),
        linen_network("GRU", train=False).apply(variables, XS),
    )


def test_the_carry_of_uneven_sequences_is_that_of_their_ends():
    network = linen_network("LSTM", train=False)
    variables = network.init(jax.random.key(0), XS)
    carry, outputs = network.apply(
        variables, XS, seq_lengths=LENGTHS, return_carry=True
    )
    close(carry.hidden, outputs[np.arange(BATCH), LENGTHS - 1])
    close(outputs[:, -1], carry.hidden)  # what has ended stays


def test_a_sequence_in_two_parts_is_the_whole():
    network = linen_network("GRU", train=True)
    variables = network.init(jax.random.key(0), XS)
    apply = functools.partial(network.apply, mutable=["batch_stats"])
    whole, stats = apply(variables, XS, seq_lengths=LENGTHS)
    (carry, first), part = apply(variables, XS[:, :1], return_carry=True)
    second, part = apply(
        variables | part, XS[:, 1:], initial_carry=carry, seq_lengths=LENGTHS - 1
    )
    close(jnp.concatenate([first, second], axis=1), whole)
    jax.tree.map(close, part, stats)


def test_algorithm_2_goes_through_linens_scan():
    network = linen_network("LSTM", train=True)
    variables = network.init(jax.random.key(0), XS)
    params, stats = of_linen(variables)

    @jax.jit
    def run(stats: Any, _: Any) -> Any:
        return network.apply(
            variables | {"batch_stats": stats}, XS, mutable=["batch_stats"]
        )[1]["batch_stats"]

    found = bn_jax.population_statistics(run, variables["batch_stats"], [0, 1])
    expected = bn_jax.population_statistics(
        lambda stats, _: unroll(LSTM, params, stats, None, True)[1], stats, [0]
    )
    jax.tree.map(close, of_linen(variables | {"batch_stats": found})[1], dict(expected))


@pytest.mark.parametrize(
    ("name", "rnn"), [("LSTM", nnx_recurrent.RNN), ("GRU", nnx.RNN)]
)
def test_nnx_is_the_pure_function_scanned(name, rnn):
    cell = getattr(nnx_recurrent, f"BatchNorm{name}Cell")
    network = rnn(cell(INPUTS, UNITS, MAX_STEPS, rngs=nnx.Rngs(0)))
    lengths = LENGTHS if rnn is nnx_recurrent.RNN else None
    of_cell = network.cell
    params = RecurrentParams(
        *(of_cell.input_kernel[...], of_cell.recurrent_kernel[...], of_cell.bias[...]),
        {term: norm.params for term, norm in of_cell.norms.items()},
    )

    def stats() -> Any:
        return {
            term: norm.read_statistics(False) for term, norm in of_cell.norms.items()
        }

    expected, expected_stats = unroll(KINDS[name], params, stats(), lengths, True)
    close(network(XS, seq_lengths=lengths), expected)
    jax.tree.map(close, stats(), dict(expected_stats))

    network.eval()
    expected, same = unroll(KINDS[name], params, stats(), lengths, False)
    close(network(XS, seq_lengths=lengths), expected)
    jax.tree.map(np.testing.assert_array_equal, stats(), dict(same))


def test_algorithm_2_goes_through_nnxs_scan():
    cell = nnx_recurrent.BatchNormGRUCell(INPUTS, UNITS, MAX_STEPS, rngs=nnx.Rngs(0))
    network = nnx_recurrent.RNN(cell)
    bn_jax.nnx.population_statistics(lambda model, x: model(x), network, [XS, XS])
    x = XS[:, 0] @ cell.input_kernel[...]
    norm = cell.norms["input"]
    close(norm.mean[0], x.mean(axis=0))
    close(norm.var[0], x.var(axis=0, ddof=1))
    np.testing.assert_array_equal(norm.var[STEPS:], 1)
