"""Batch-normalised LSTM and GRU cells for Flax linen: variables, no arithmetic."""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from bn_jax.collectives import AxisIndexGroups, AxisName
from bn_jax.gathering import GATHERING
from bn_jax.params import BatchNormParams
from bn_jax.recurrent import (
    GRU,
    INITIAL_SCALE,
    LSTM,
    Carry,
    Kind,
    RecurrentParams,
    init_carry,
    recurrent_step,
)
from bn_jax.statistics import BatchStats, init_stats


class RecurrentCell(nn.RNNCellBase):
    """A cell of `bn_jax.recurrent`, for `nn.RNN` and the `RNN` of this module.

    In the collection `params` it has `input_kernel`, `recurrent_kernel`, `bias`, and
    for each term that is normalised `TERM_scale` (and `cell_bias`); in `batch_stats`
    for each such term `mean` and `var`, (max_steps, features).

    Attributes:
      features: units of the hidden state, which is the output.
      max_steps: time steps with statistics of their own; see
        `bn_jax.recurrent.init_recurrent_stats`.
      use_running_average: normalise by the statistics (inference) rather than by the
        batch (training).
      terms: what is normalised; None: all that the cell can. ("input",) is Laurent et
        al. 2015's form, () the plain cell.
      momentum: the statistics' decay.
      epsilon: added to the variance.
      axis_name: mapped axis or axes to share moments over. Ignored in `init`.
      axis_index_groups: groups along that axis that share among themselves only.
      kernel_init: initialises the input's kernel.
      recurrent_kernel_init: initialises the hidden state's kernel, of all gates.
      bias_init: initialises the gates' bias.
      scale_init: initialises the scales of the norms.
      param_dtype: of the parameters.
    """

    kind: ClassVar[Kind]

    features: int
    max_steps: int
    use_running_average: bool
    terms: tuple[str, ...] | None = None
    momentum: float = 0.99
    epsilon: float = 1e-5
    axis_name: AxisName | None = None
    axis_index_groups: AxisIndexGroups | None = None
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    recurrent_kernel_init: nn.initializers.Initializer = nn.initializers.orthogonal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    scale_init: nn.initializers.Initializer = nn.initializers.constant(INITIAL_SCALE)
    param_dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Makes the statistics, whose shapes need no input."""
        shapes = {
            term: (self.max_steps, self.kind.features(term, self.features))
            for term in (self.kind.terms if self.terms is None else self.terms)
        }
        self.statistics = {
            term: self.variable("batch_stats", term, _fresh_statistics, shape)
            for term, shape in shapes.items()
        }

    @nn.compact
    def __call__(self, carry: Carry, inputs: jax.Array) -> tuple[Carry, jax.Array]:
        """One time step.

        Args:
          carry: of the step before, or of `initialize_carry`.
          inputs: (..., inputs).

        Returns:
          The carry, and the output (..., features).
        """
        width = self.kind.num_gates * self.features

        def parameter(name: str, init: Any, *shape: int) -> jax.Array:
            return self.param(name, init, shape, self.param_dtype)

        params = RecurrentParams(
            parameter("input_kernel", self.kernel_init, inputs.shape[-1], width),
            parameter(
                "recurrent_kernel", self.recurrent_kernel_init, self.features, width
            ),
            parameter("bias", self.bias_init, width),
            {
                term: BatchNormParams(
                    parameter(
                        f"{term}_scale",
                        self.scale_init,
                        self.kind.features(term, self.features),
                    ),
                    parameter("cell_bias", nn.initializers.zeros, self.features)
                    if term == "cell"
                    else None,
                )
                for term in self.statistics
            },
        )
        # `init` runs outside any map over devices, and perhaps at one example.
        initialising = self.is_initializing()
        train = not (self.use_running_average or initialising)
        carry, stats = recurrent_step(
            self.kind,
            params,
            {
                term: _statistics(variable.value, train)
                for term, variable in self.statistics.items()
            },
            carry,
            inputs,
            train=train,
            decay=self.momentum,
            eps=self.epsilon,
            axis_name=None if initialising else self.axis_name,
            axis_index_groups=None if initialising else self.axis_index_groups,
        )
        if train:
            for term, variable in self.statistics.items():
                variable.value = _with(variable.value, stats[term])
        return carry, carry.hidden

    @nn.nowrap
    def initialize_carry(
        self,
        rng: jax.Array,
        input_shape: tuple[int, ...],
        lengths: ArrayLike | None = None,
    ) -> Carry:
        """What the first time step gets.

        Args:
          rng: of no effect: the states are zeros.
          input_shape: of the inputs of one step, (..., inputs).
          lengths: time steps of each sequence, integers (...); None: all count.
        """
        del rng
        if self.scope is not None:
            # A scan carries only variables that are there before it: see `setup`.
            _ = self.statistics
        return init_carry(
            self.kind, input_shape[:-1], self.features, lengths, self.param_dtype
        )

    @property
    def num_feature_axes(self) -> int:
        """One axis of features."""
        return 1


class BatchNormLSTMCell(RecurrentCell):
    """An LSTM whose input, recurrent term and cell state are normalised."""

    kind = LSTM


class BatchNormGRUCell(RecurrentCell):
    """A GRU whose input and recurrent term are normalised."""

    kind = GRU


class RNN(nn.RNN):
    """`flax.linen.RNN` for the cells of this module.

    It scans with their statistics, which Flax's own must be asked to: in training
    `variable_carry="batch_stats"`, at inference `variable_broadcast=("params",
    "batch_stats")`. And it tells the cell the lengths, without which padding would
    reach the statistics.
    """

    def __post_init__(self) -> None:
        if self.cell.use_running_average:
            self.variable_broadcast = ("params", "batch_stats")
        else:
            self.variable_carry = "batch_stats"
        super().__post_init__()

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: Carry | None = None,
        seq_lengths: ArrayLike | None = None,
        **options: Any,
    ) -> Any:
        """Applies the cell over a sequence; as `flax.linen.RNN` does."""
        if seq_lengths is not None:
            seq_lengths = jnp.asarray(seq_lengths)
            carry = initial_carry or self.cell.initialize_carry(
                jax.random.key(0), (*seq_lengths.shape, inputs.shape[-1])
            )
            initial_carry = carry._replace(length=carry.step + seq_lengths)
        return super().__call__(
            inputs, initial_carry=initial_carry, seq_lengths=seq_lengths, **options
        )


def _fresh_statistics(shape: tuple[int, ...]) -> dict[str, jax.Array]:
    return dict(init_stats(shape)._asdict())


def _statistics(values: Mapping[str, Any], train: bool) -> Any:
    if train and GATHERING in values:
        return values[GATHERING]
    return BatchStats(values["mean"], values["var"])


def _with(values: Mapping[str, Any], stats: Any) -> dict[str, Any]:
    new = stats._asdict() if isinstance(stats, BatchStats) else {GATHERING: stats}
    return {**values, **new}
