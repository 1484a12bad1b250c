"""Recurrent cells against float64: NumPy, finite differences, torch, and identities.

Both references take masks literally: a sequence that has ended is no longer there.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import bn_jax
from bn_jax.recurrent import (
    GRU,
    LSTM,
    Kind,
    RecurrentParams,
    init_carry,
    init_recurrent,
    init_recurrent_stats,
    recurrent_step,
)
from tests.bn_jax.reference import enable_x64

BATCH, STEPS, INPUTS, UNITS = 5, 4, 3, 4
EPS, DECAY = 1e-5, 0.9
UNEVEN = np.array([4, 1, 3, 2, 4])  # two or more at every step
CASES = {
    "lstm": (LSTM, LSTM.terms, None),
    "lstm-uneven": (LSTM, LSTM.terms, tuple(UNEVEN)),
    "lstm-input": (LSTM, ("input",), tuple(UNEVEN)),
    "gru-uneven": (GRU, GRU.terms, tuple(UNEVEN)),
    "gru-plain": (GRU, (), None),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
Case = tuple[Kind, tuple[str, ...], tuple[int, ...] | None]


def make_problem(
    kind: Kind, terms: Sequence[str], seed: int = 0, dtype: Any = np.float64
) -> tuple[RecurrentParams, Any, np.ndarray]:
    """Parameters and statistics with values that are easy to miss, and inputs."""
    rng = np.random.default_rng(seed)
    params = init_recurrent(kind, jax.random.key(seed), INPUTS, UNITS, terms)
    params = jax.tree.map(
        lambda leaf: (np.asarray(leaf) + rng.normal(0, 0.3, leaf.shape)).astype(dtype),
        params,
    )
    stats = init_recurrent_stats(kind, STEPS, UNITS, terms)
    stats = jax.tree.map(
        lambda leaf: (np.asarray(leaf) + rng.uniform(0, 0.5, leaf.shape)).astype(dtype),
        stats,
    )
    xs = rng.normal(0.5, 2, (STEPS, BATCH, INPUTS)).astype(dtype)
    return params, stats, xs


def unroll(
    kind: Kind,
    params: RecurrentParams,
    stats: Any,
    xs: Any,
    lengths: Any = None,
    train: bool = True,
    **options: Any,
) -> tuple[jax.Array, Any]:
    """Outputs (steps, batch, units) and new statistics."""

    def step(state: Any, x: jax.Array) -> Any:
        carry, stats = recurrent_step(
            kind, params, state[1], state[0], x, train=train, eps=EPS, **options
        )
        return (carry, stats), carry.hidden

    xs = jnp.asarray(xs)
    carry = init_carry(kind, xs.shape[1:-1], UNITS, lengths, xs.dtype)
    (_, stats), outputs = jax.lax.scan(step, (carry, stats), xs)
    return outputs, stats


def reference(
    library: Any, kind: Kind, params: Any, stats: Any, xs: Any, lengths: Any = None
) -> tuple[list[Any], Any]:
    """The same with NumPy's functions or torch's, a loop over the living sequences."""
    sigmoid = getattr(library, "sigmoid", lambda x: 1 / (1 + np.exp(-x)))
    tanh = library.tanh
    kernel_x, kernel_h, bias, norms = params
    new = {
        term: [np.array(field, np.float64) for field in of]
        for term, of in stats.items()
    }

    def normalise(term: str, x: Any, t: int) -> Any:
        if term not in norms:
            return x
        scale, shift = norms[term]
        mean = x.mean(0)
        var = ((x - mean) ** 2).mean(0)
        means, variances = new[term]
        m = len(x)
        means[t] = DECAY * means[t] + (1 - DECAY) * np.array(mean.tolist())
        correction = m / max(m - 1, 1)
        variances[t] = DECAY * variances[t] + (1 - DECAY) * correction * np.array(
            var.tolist()
        )
        y = (x - mean) / (var + EPS) ** 0.5 * scale
        return y if shift is None else y + shift

    lengths = [len(xs)] * BATCH if lengths is None else lengths
    zero = library.zeros(UNITS, dtype=library.float64)
    hidden, cell = [zero] * BATCH, [zero] * BATCH
    outputs = []
    for t in range(len(xs)):
        living = [i for i in range(BATCH) if t < lengths[i]]
        h = library.stack([hidden[i] for i in living])
        c = library.stack([cell[i] for i in living])
        from_x = normalise("input", xs[t][living] @ kernel_x, t)
        from_h = normalise("recurrent", h @ kernel_h, t)
        if kind is LSTM:
            i, f, g, o = (
                (from_x + from_h + bias)[:, k * UNITS : (k + 1) * UNITS]
                for k in range(4)
            )
            c = sigmoid(f) * c + sigmoid(i) * tanh(g)
            h = sigmoid(o) * tanh(normalise("cell", c, t))
        else:
            (xr, hr), (xz, hz), (xn, hn) = (
                (
                    of_x[:, k * UNITS : (k + 1) * UNITS],
                    of_h[:, k * UNITS : (k + 1) * UNITS],
                )
                for k in range(3)
                for of_x, of_h in [(from_x + bias, from_h)]
            )
            z = sigmoid(xz + hz)
            h = (1 - z) * tanh(xn + sigmoid(xr + hr) * hn) + z * h
        for row, example in enumerate(living):
            hidden[example], cell[example] = h[row], c[row]
        outputs.append(library.stack(hidden))
    return outputs, new


class Result(NamedTuple):
    """Of `unroll` in float64, with the gradients of its outputs times a cotangent."""

    params: RecurrentParams
    stats: Any
    xs: np.ndarray
    lengths: tuple[int, ...] | None
    cotangent: np.ndarray
    outputs: np.ndarray
    new_stats: Any
    gradients: Any  # by parameters and inputs


@functools.cache
def result_of(case: Case) -> Result:
    kind, terms, lengths = case
    params, stats, xs = make_problem(kind, terms)
    cotangent = np.random.default_rng(1).normal(size=(STEPS, BATCH, UNITS))

    def loss(params: Any, xs: Any) -> Any:
        outputs, new = unroll(kind, params, stats, xs, lengths, decay=DECAY)
        return jnp.vdot(outputs, cotangent), (outputs, new)

    with enable_x64(True):
        differentiated = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
        gradients, (outputs, new) = jax.device_get(differentiated(params, xs))
    return Result(params, stats, xs, lengths, cotangent, outputs, new, gradients)


@EVERY_CASE
def test_values_and_statistics_are_those_of_float64(case):
    found = result_of(case)
    outputs, stats = reference(
        np, case[0], found.params, found.stats, found.xs, found.lengths
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12)
    close(found.outputs, np.stack(outputs))
    for term, fields in found.new_stats.items():
        for field, expected in zip(fields, stats[term], strict=True):
            close(field, expected)


@EVERY_CASE
def test_gradients_are_those_of_finite_differences(case):
    found = result_of(case)
    rng = np.random.default_rng(2)

    def product(by: float, direction: Any) -> float:
        params, xs = jax.tree.map(
            lambda leaf, step: leaf + by * step, (found.params, found.xs), direction
        )
        outputs, _ = reference(np, case[0], params, found.stats, xs, found.lengths)
        return float(np.vdot(np.stack(outputs), found.cotangent))

    for _ in range(3):
        direction = jax.tree.map(
            lambda leaf: rng.normal(size=leaf.shape), found.gradients
        )
        slope = (product(1e-6, direction) - product(-1e-6, direction)) / 2e-6
        leaves = map(jax.tree.leaves, (found.gradients, direction))
        along = sum(map(np.vdot, *leaves))
        np.testing.assert_allclose(along, slope, rtol=1e-6, atol=1e-7)


@EVERY_CASE
def test_gradients_are_those_of_torch(case):
    torch = pytest.importorskip("torch", reason="torch comes with the extra `peers`")
    found = result_of(case)
    params, xs = jax.tree.map(
        lambda leaf: torch.tensor(leaf, requires_grad=True), (found.params, found.xs)
    )
    outputs, _ = reference(torch, case[0], params, found.stats, xs, found.lengths)
    (torch.stack(outputs) * torch.tensor(found.cotangent)).sum().backward()
    for mine, theirs in zip(
        jax.tree.leaves(found.gradients), jax.tree.leaves((params, xs)), strict=True
    ):
        np.testing.assert_allclose(mine, theirs.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_rematerialised_gradients_are_the_same(x64):
    kind, terms, lengths = CASES["lstm-uneven"]
    found = result_of((kind, terms, lengths))

    @jax.checkpoint
    def loss(params: Any, xs: Any) -> jax.Array:
        outputs, _ = unroll(kind, params, found.stats, xs, lengths)
        return jnp.vdot(outputs, found.cotangent)

    gradients = jax.jit(jax.grad(loss, (0, 1)))(found.params, found.xs)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12),
        jax.device_get(gradients),
        found.gradients,
    )


@pytest.mark.parametrize(("kind", "layer"), [(LSTM, "LSTM"), (GRU, "GRU")])
def test_plain_cells_are_torchs_own(kind, layer, x64):
    torch = pytest.importorskip("torch", reason="torch comes with the extra `peers`")
    params, stats, xs = make_problem(kind, ())
    theirs = getattr(torch.nn, layer)(INPUTS, UNITS, dtype=torch.float64)
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(torch.tensor(params.input_kernel.T))
        theirs.weight_hh_l0.copy_(torch.tensor(params.recurrent_kernel.T))
        theirs.bias_ih_l0.copy_(torch.tensor(params.bias))
        theirs.bias_hh_l0.zero_()
        expected = theirs(torch.tensor(xs))[0].numpy()
    np.testing.assert_allclose(unroll(kind, params, stats, xs)[0], expected, rtol=1e-12)


def test_one_time_step_is_feed_forward(x64):
    params, stats, xs = make_problem(LSTM, LSTM.terms)
    hidden, cell = np.random.default_rng(5).normal(size=(2, BATCH, UNITS))
    carry = init_carry(LSTM, [BATCH], UNITS, dtype=xs.dtype)
    carry = carry._replace(hidden=jnp.asarray(hidden), cell=jnp.asarray(cell))
    after, new = recurrent_step(LSTM, params, stats, carry, xs[0], train=True)

    def layer(term: str, x: Any) -> tuple[jax.Array, bn_jax.BatchStats]:
        of_first = bn_jax.BatchStats(*(field[0] for field in stats[term]))
        return bn_jax.batch_norm(params.norms[term], of_first, x, train=True)

    from_x, of_x = layer("input", xs[0] @ params.input_kernel)
    from_h, of_h = layer("recurrent", hidden @ params.recurrent_kernel)
    gates = from_x + from_h + params.bias[None]
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    normed, of_c = layer("cell", cell)
    np.testing.assert_allclose(after.hidden, jax.nn.sigmoid(o) * jnp.tanh(normed))
    for term, moved in (("input", of_x), ("recurrent", of_h), ("cell", of_c)):
        for field, first, old in zip(new[term], moved, stats[term], strict=True):
            np.testing.assert_allclose(field[0], first)
            np.testing.assert_array_equal(field[1:], old[1:])


@pytest.mark.parametrize(("kind", "train"), [(LSTM, True), (GRU, False)])
def test_what_lies_beyond_a_sequence_reaches_nothing(kind, train):
    params, stats, xs = make_problem(kind, kind.terms, dtype=np.float32)
    beyond = np.arange(STEPS)[:, None] >= UNEVEN

    @jax.jit
    def gradients_and_results(xs: Any) -> Any:
        def loss(params: Any, xs: Any) -> Any:
            outputs, new = unroll(kind, params, stats, xs, UNEVEN, train)
            return jnp.sum(jnp.square(outputs)), (outputs, new)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, xs)

    clean = gradients_and_results(np.where(beyond[..., None], np.float32(0), xs))
    for rubbish in (np.nan, np.inf, 1e30):
        dirty = gradients_and_results(
            np.where(beyond[..., None], np.float32(rubbish), xs)
        )
        jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert not np.any(clean[1][1][beyond])


def test_padding_is_shorter_sequences():
    kind = LSTM
    params, stats, xs = make_problem(kind, kind.terms, dtype=np.float32)
    padded, padded_stats = unroll(kind, params, stats, xs, np.full(BATCH, 2))
    short, short_stats = unroll(kind, params, stats, xs[:2])
    np.testing.assert_allclose(padded[:2], short, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(padded[2:], [padded[1]] * 2)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        padded_stats,
        short_stats,
    )


def test_beyond_the_last_step_trained_on_its_statistics_serve():
    kind = LSTM
    params, _, xs = make_problem(kind, kind.terms, dtype=np.float32)
    fresh = init_recurrent_stats(kind, 9, UNITS)  # more than are ever trained
    _, trained = unroll(kind, params, fresh, xs[:3])
    longer = np.concatenate([xs] * 3)
    outputs, same = unroll(kind, params, trained, longer, train=False)
    jax.tree.map(np.testing.assert_array_equal, same, trained)
    by_last = jax.tree.map(
        lambda rows: jnp.stack([*rows[:3], *[rows[2]] * (len(longer) - 3)]), trained
    )
    expected, _ = unroll(kind, params, by_last, longer, train=False)
    np.testing.assert_array_equal(outputs, expected)


def test_in_training_steps_beyond_share_the_last_ones_statistics():
    params, _, xs = make_problem(LSTM, ("input",), dtype=np.float32)
    fresh = init_recurrent_stats(LSTM, 2, UNITS, ("input",))
    _, new = unroll(LSTM, params, fresh, xs, decay=DECAY)
    expected = bn_jax.init_stats(4 * UNITS)
    for x in xs[1:]:
        _, expected = bn_jax.batch_norm(
            params.norms["input"],
            expected,
            x @ params.input_kernel,
            train=True,
            decay=DECAY,
        )
    np.testing.assert_allclose(new["input"].mean[1], expected.mean, rtol=1e-5)
    np.testing.assert_allclose(new["input"].var[1], expected.var, rtol=1e-5)


def test_population_statistics_are_algorithm_2_at_every_step(x64):
    kind = GRU
    params, stats, _ = make_problem(kind, kind.terms)
    batches = [make_problem(kind, (), seed)[2] for seed in range(3)]

    def run(gathered: Any, xs: Any) -> Any:
        return unroll(kind, params, gathered, xs)[1]

    found = bn_jax.population_statistics(jax.jit(run), stats, batches)
    # With decay 0 the moving average is the last batch's moments, unbiased.
    each = [
        jax.jit(functools.partial(unroll, kind, decay=0.0))(params, stats, xs)[1]
        for xs in batches
    ]
    expected = jax.tree.map(lambda *values: np.mean(values, axis=0), *each)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9), found, expected
    )


@pytest.mark.slow
def test_micro_batches_get_the_moments_of_the_whole_batch(x64):
    params, stats, xs = make_problem(LSTM, LSTM.terms)
    examples = np.moveaxis(np.concatenate([xs, xs + 1], axis=1), 1, 0)

    def loss(params: Any, stats: Any, examples: Any) -> Any:
        outputs, new = unroll(LSTM, params, stats, jnp.moveaxis(examples, 1, 0))
        return jnp.sum(jnp.square(outputs)), new

    expected = jax.value_and_grad(loss, has_aux=True)(params, stats, examples)
    parts = examples.reshape(2, BATCH, STEPS, INPUTS)
    found = bn_jax.accumulate_gradients(loss, params, stats, parts)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-12),
        found,
        expected,
    )


def test_an_exported_step_gives_the_same():
    params, stats, xs = make_problem(LSTM, LSTM.terms, dtype=np.float32)
    step = jax.jit(functools.partial(recurrent_step, LSTM, train=False))
    arguments = (params, stats, init_carry(LSTM, [BATCH], UNITS), xs[0])
    exported = jax.export.export(step)(*arguments).serialize()
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.export.deserialize(exported).call(*arguments),
        step(*arguments),
    )


@pytest.mark.slow
def test_devices_that_share_moments_keep_step_though_theirs_have_ended():
    params, stats, xs = make_problem(LSTM, LSTM.terms, dtype=np.float32)
    xs, lengths = np.concatenate([xs, xs + 1], axis=1), np.repeat([1, STEPS], BATCH)
    expected = unroll(LSTM, params, stats, xs, lengths)

    def on_device(xs: Any, lengths: Any) -> Any:
        return unroll(LSTM, params, stats, xs, lengths, axis_name="devices")

    found = jax.vmap(on_device, (1, 0), (1, 0), axis_name="devices")(
        xs.reshape(STEPS, 2, BATCH, INPUTS), lengths.reshape(2, BATCH)
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(found[0].reshape(expected[0].shape), expected[0])
    for device in range(2):
        of_device = jax.tree.map(operator.itemgetter(device), found[1])
        jax.tree.map(close, of_device, expected[1])


@pytest.mark.parametrize(("kind", "term"), [(LSTM, "gate"), (GRU, "cell")])
def test_terms_that_a_cell_has_not_are_named(kind, term):
    with pytest.raises(
        ValueError, match=f"cannot normalise '{term}': expected some of"
    ):
        init_recurrent(kind, jax.random.key(0), INPUTS, UNITS, (term,))
