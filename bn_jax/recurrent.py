"""Batch-normalised LSTM and GRU: one time step, as pure functions.

What a cell normalises, each term apart and each time step by statistics of its own
(Cooijmans et al. 2016, "Recurrent Batch Normalization"):

  input      the input times its kernel
  recurrent  the hidden state times its kernel
  cell       an LSTM's cell state, before the output's tanh

The first two have no bias: their sum gets the gates' one. Laurent et al. 2015 ("Batch
Normalized Recurrent Neural Networks") normalise the input alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from bn_jax.batch_norm import batch_norm
from bn_jax.collectives import AxisIndexGroups, AxisName
from bn_jax.params import BatchNormParams
from bn_jax.statistics import AnyStats, BatchStats, init_stats

# With a scale of 1 the gates would start saturated, where gradients vanish.
INITIAL_SCALE = 0.1


class RecurrentParams(NamedTuple):
    """Of a cell; its gates lie side by side, in the order that its `Kind` says."""

    input_kernel: jax.Array  # (inputs, gates * units)
    recurrent_kernel: jax.Array  # (units, gates * units)
    bias: jax.Array  # (gates * units)
    # By term; one that is not there is not normalised.
    norms: Mapping[str, BatchNormParams]


class Carry(NamedTuple):
    """What one time step hands to the next. All have the leading axes of the batch."""

    hidden: jax.Array  # (..., units)
    cell: Any  # (..., units), of an LSTM; else None
    step: jax.Array  # (...), int32: steps done, the same for the whole batch
    length: jax.Array | None  # (...), int32: steps that count; None: all


# From a term's name and its values to what they are normalised.
Normalise = Callable[[str, jax.Array], jax.Array]
# Hidden state and cell state, by the parameters, the step before and the input.
States = tuple[jax.Array, Any]
Advance = Callable[[RecurrentParams, Carry, jax.Array, Normalise], States]


class Kind(NamedTuple):
    """A kind of cell: `LSTM` or `GRU`."""

    advance: Advance
    num_gates: int
    terms: tuple[str, ...]  # what can be normalised

    def features(self, term: str, units: int) -> int:
        """The number of features of a term.

        Raises:
          ValueError: there is no such term.
        """
        if term not in self.terms:
            raise ValueError(
                f"cannot normalise {term!r}: expected some of {', '.join(self.terms)}."
            )
        return units if term == "cell" else self.num_gates * units


def init_recurrent(
    kind: Kind,
    key: jax.Array,
    num_inputs: int,
    units: int,
    terms: Sequence[str] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> RecurrentParams:
    """Parameters of a cell before training.

    Args:
      kind: `LSTM` or `GRU`.
      key: random key of the kernels: LeCun's normal, and orthogonal.
      num_inputs: size of the input's feature axis.
      units: of the hidden state.
      terms: what is normalised; None: all. With none it is the plain cell.
      dtype: of all of them.
    """
    width = kind.num_gates * units
    keys = jax.random.split(key)
    initializers = jax.nn.initializers
    return RecurrentParams(
        initializers.lecun_normal()(keys[0], (num_inputs, width), dtype),
        initializers.orthogonal()(keys[1], (units, width), dtype),
        jnp.zeros(width, dtype),
        {
            term: BatchNormParams(
                jnp.full(kind.features(term, units), INITIAL_SCALE, dtype),
                jnp.zeros(units, dtype) if term == "cell" else None,
            )
            for term in (kind.terms if terms is None else terms)
        },
    )


def init_recurrent_stats(
    kind: Kind, max_steps: int, units: int, terms: Sequence[str] | None = None
) -> dict[str, BatchStats]:
    """Statistics before the first batch.

    Args:
      kind: as for `init_recurrent`.
      max_steps: time steps with statistics of their own. In training later steps share
        those of the last; at inference those of the last step trained on serve beyond.
      units: as for `init_recurrent`.
      terms: as for `init_recurrent`.

    Returns:
      For each term means and variances, (max_steps, features).
    """
    return {
        term: init_stats((max_steps, kind.features(term, units)))
        for term in (kind.terms if terms is None else terms)
    }


def init_carry(
    kind: Kind,
    batch_shape: Sequence[int],
    units: int,
    lengths: ArrayLike | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Carry:
    """What the first time step gets: zeros.

    Args:
      kind: as for `init_recurrent`.
      batch_shape: leading axes of the inputs of one step.
      units: as for `init_recurrent`.
      lengths: time steps of each sequence, integers (*batch_shape); None: all count.
      dtype: of the states.
    """
    zeros = jnp.zeros((*batch_shape, units), dtype)
    return Carry(
        hidden=zeros,
        cell=zeros if "cell" in kind.terms else None,
        step=jnp.zeros(tuple(batch_shape), jnp.int32),
        length=None if lengths is None else jnp.asarray(lengths, jnp.int32),
    )


def recurrent_step(
    kind: Kind,
    params: RecurrentParams,
    stats: Mapping[str, Any],
    carry: Carry,
    x: jax.Array,
    *,
    train: bool,
    decay: ArrayLike = 0.99,
    eps: float = 1e-5,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
) -> tuple[Carry, dict[str, Any]]:
    """One time step of a cell, for `jax.lax.scan`.

    A sequence that has ended keeps its states and reaches no statistic: a batch of
    uneven lengths gives what each step gives for the sequences that still go on.

    Args:
      kind: `LSTM` or `GRU`.
      params: of `init_recurrent`.
      stats: of `init_recurrent_stats`; in training also what `bn_jax.population.init`
        makes of them.
      carry: of the step before, or of `init_carry`.
      x: (..., inputs), the inputs of this step; anything where a sequence has ended.
      train: normalise by the batch (True) or by the statistics (False).
      decay: as for `bn_jax.batch_norm`.
      eps: as for `bn_jax.batch_norm`.
      axis_name: as for `bn_jax.batch_norm`.
      axis_index_groups: as for `bn_jax.batch_norm`.

    Returns:
      The carry, whose hidden state is the output, and the new statistics.

    Raises:
      TypeError, ValueError: as `bn_jax.batch_norm`.
    """
    step = jnp.max(carry.step, initial=0)
    new_stats = dict(stats)
    goes_on = None
    if carry.length is not None:
        goes_on = (carry.step < carry.length)[..., None]
        x = jnp.where(goes_on, x, 0)  # 0 times anything, in the kernel's gradient

    def normalise(term: str, values: jax.Array) -> jax.Array:
        if term not in params.norms:
            return values
        rows = stats[term]
        row = jnp.minimum(step, len(rows.mean) - 1 if train else _last_trained(rows))
        y, new = batch_norm(
            params.norms[term],
            jax.tree.map(lambda of: lax.dynamic_index_in_dim(of, row, 0, False), rows),
            values,
            train=train,
            decay=decay,
            eps=eps,
            weights=goes_on,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
        )
        if train:
            new_stats[term] = jax.tree.map(
                lambda of, new: lax.dynamic_update_index_in_dim(of, new, row, 0),
                rows,
                new,
            )
        return y

    hidden, cell = kind.advance(params, carry, x, normalise)
    if goes_on is not None:
        hidden = jnp.where(goes_on, hidden, carry.hidden)
        cell = None if cell is None else jnp.where(goes_on, cell, carry.cell)
    # Steps of sequences that have ended, too: devices that share moments keep step.
    return Carry(hidden, cell, carry.step + 1, carry.length), new_stats


def _last_trained(rows: AnyStats) -> jax.Array:
    """The last time step whose statistics are not those before the first batch."""
    trained = jnp.any((rows.mean != 0) | (rows.var != 1), axis=-1)
    return jnp.max(jnp.where(trained, jnp.arange(len(trained)), 0))


def _inputs(params: RecurrentParams, x: jax.Array, normalise: Normalise) -> jax.Array:
    """The gates' input term, with the bias of all that they sum."""
    inputs = normalise("input", x @ params.input_kernel)
    return inputs + jnp.broadcast_to(params.bias, inputs.shape)


def _lstm(
    params: RecurrentParams, carry: Carry, x: jax.Array, normalise: Normalise
) -> States:
    recurrent = normalise("recurrent", carry.hidden @ params.recurrent_kernel)
    gates = _inputs(params, x, normalise) + recurrent
    admit, keep, candidate, emit = jnp.split(gates, 4, axis=-1)
    cell = jax.nn.sigmoid(keep) * carry.cell
    cell += jax.nn.sigmoid(admit) * jnp.tanh(candidate)
    return jax.nn.sigmoid(emit) * jnp.tanh(normalise("cell", cell)), cell


def _gru(
    params: RecurrentParams, carry: Carry, x: jax.Array, normalise: Normalise
) -> States:
    inputs = _inputs(params, x, normalise)
    recurrent = normalise("recurrent", carry.hidden @ params.recurrent_kernel)
    x_reset, x_update, x_candidate = jnp.split(inputs, 3, axis=-1)
    h_reset, h_update, h_candidate = jnp.split(recurrent, 3, axis=-1)
    reset = jax.nn.sigmoid(x_reset + h_reset)
    update = jax.nn.sigmoid(x_update + h_update)
    # The reset gate acts on the candidate's recurrent term after its normalisation.
    candidate = jnp.tanh(x_candidate + reset * h_candidate)
    return (1 - update) * candidate + update * carry.hidden, None


# Gates in this order: input, forget, candidate, output.
LSTM = Kind(_lstm, 4, ("input", "recurrent", "cell"))
# Reset, update, candidate.
GRU = Kind(_gru, 3, ("input", "recurrent"))
