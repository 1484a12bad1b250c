"""Batch-normalised LSTM and GRU cells for Flax nnx: variables, no arithmetic."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from bn_jax.collectives import AxisIndexGroups, AxisName
from bn_jax.nnx import Normalising
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
from bn_jax.statistics import init_stats

KERNEL_INIT = nnx.initializers.lecun_normal()
RECURRENT_KERNEL_INIT = nnx.initializers.orthogonal()
SCALE_INIT = nnx.initializers.constant(INITIAL_SCALE)


class StepNorm(Normalising, nnx.Module):
    """Variables of one term's norm: `scale`, perhaps `bias`, and `mean` and `var`."""

    def __init__(
        self,
        max_steps: int,
        features: int,
        scale_init: nnx.Initializer,
        has_bias: bool,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the variables."""
        self.scale = nnx.Param(scale_init(rngs.params(), (features,), param_dtype))
        self.bias = nnx.data(
            nnx.Param(jnp.zeros(features, param_dtype)) if has_bias else None
        )
        mean, var = init_stats((max_steps, features))
        self.mean, self.var = nnx.BatchStat(mean), nnx.BatchStat(var)

    @property
    def params(self) -> BatchNormParams:
        """Scale and bias."""
        bias = None if self.bias is None else self.bias[...]
        return BatchNormParams(self.scale[...], bias)


class RecurrentCell(nnx.RNNCellBase):
    """A cell of `bn_jax.recurrent`, for `nnx.RNN` and the `RNN` of this module.

    Its variables are `nnx.Param`s `input_kernel`, `recurrent_kernel` and `bias`, and
    for each term that is normalised, in `norms`, `scale` (of an LSTM's cell also
    `bias`) and the `nnx.BatchStat`s `mean` and `var`, (max_steps, features).
    """

    kind: ClassVar[Kind]

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        max_steps: int,
        *,
        use_running_average: bool = False,
        terms: tuple[str, ...] | None = None,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        axis_name: AxisName | None = None,
        axis_index_groups: AxisIndexGroups | None = None,
        kernel_init: nnx.Initializer = KERNEL_INIT,
        recurrent_kernel_init: nnx.Initializer = RECURRENT_KERNEL_INIT,
        bias_init: nnx.Initializer = nnx.initializers.zeros,
        scale_init: nnx.Initializer = SCALE_INIT,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the variables.

        Args:
          in_features: of the inputs.
          hidden_features: units of the hidden state, which is the output.
          max_steps: time steps with statistics of their own; see
            `bn_jax.recurrent.init_recurrent_stats`.
          use_running_average: normalise by the statistics rather than by the batch;
            `model.train()` and `model.eval()` set it.
          terms: what is normalised; None: all that the cell can. ("input",) is Laurent
            et al. 2015's form, () the plain cell.
          momentum: the statistics' decay.
          epsilon: added to the variance.
          axis_name: mapped axis or axes to share moments over.
          axis_index_groups: groups along that axis that share among themselves only.
          kernel_init: initialises the input's kernel.
          recurrent_kernel_init: initialises the hidden state's kernel, of all gates.
          bias_init: initialises the gates' bias.
          scale_init: initialises the scales of the norms.
          param_dtype: of the parameters.
          rngs: its stream `params` draws the kernels.
        """
        width = self.kind.num_gates * hidden_features

        def parameter(init: nnx.Initializer, *shape: int) -> nnx.Param[jax.Array]:
            return nnx.Param(init(rngs.params(), shape, param_dtype))

        self.input_kernel = parameter(kernel_init, in_features, width)
        self.recurrent_kernel = parameter(recurrent_kernel_init, hidden_features, width)
        self.bias = parameter(bias_init, width)
        self.norms = nnx.Dict(
            {
                term: StepNorm(
                    max_steps,
                    self.kind.features(term, hidden_features),
                    scale_init,
                    term == "cell",
                    param_dtype,
                    rngs,
                )
                for term in (self.kind.terms if terms is None else terms)
            }
        )
        self.hidden_features = hidden_features
        self.use_running_average = use_running_average
        self.momentum = momentum
        self.epsilon = epsilon
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.param_dtype = param_dtype

    def __call__(self, carry: Carry, inputs: jax.Array) -> tuple[Carry, jax.Array]:
        """One time step.

        Args:
          carry: of the step before, or of `initialize_carry`.
          inputs: (..., in_features).

        Returns:
          The carry, and the output (..., hidden_features).
        """
        train = not self.use_running_average
        carry, stats = recurrent_step(
            self.kind,
            RecurrentParams(
                self.input_kernel[...],
                self.recurrent_kernel[...],
                self.bias[...],
                {term: norm.params for term, norm in self.norms.items()},
            ),
            {term: norm.read_statistics(train) for term, norm in self.norms.items()},
            carry,
            inputs,
            train=train,
            decay=self.momentum,
            eps=self.epsilon,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
        )
        if train:
            for term, norm in self.norms.items():
                norm.write_statistics(stats[term])
        return carry, carry.hidden

    def initialize_carry(
        self,
        input_shape: tuple[int, ...],
        rngs: Any = None,
        carry_init: Any = None,
        lengths: ArrayLike | None = None,
    ) -> Carry:
        """What the first time step gets.

        Args:
          input_shape: of the inputs of one step, (..., in_features).
          rngs: of no effect: the states are zeros.
          carry_init: of no effect; put other states in with `_replace`.
          lengths: time steps of each sequence, integers (...); None: all count.
        """
        del rngs, carry_init
        return init_carry(
            self.kind, input_shape[:-1], self.hidden_features, lengths, self.param_dtype
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


class RNN(nnx.RNN):
    """`flax.nnx.RNN` that carries nothing but statistics, and tells the cell lengths.

    Flax's own carries the parameters, too, and runs the cell over padding as over
    anything else: `seq_lengths` here are those of the cell's carry as well.
    """

    def __init__(self, cell: RecurrentCell, **options: Any) -> None:
        """Takes the options of `flax.nnx.RNN`."""
        filters: dict[Any, Any] = {nnx.BatchStat: nnx.Carry, ...: None}
        axes = nnx.StateAxes(filters)
        super().__init__(cell, **{"state_axes": axes, **options})

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: Carry | None = None,
        seq_lengths: ArrayLike | None = None,
        **options: Any,
    ) -> Any:
        """Applies the cell over a sequence; as `flax.nnx.RNN` does."""
        if seq_lengths is not None:
            seq_lengths = jnp.asarray(seq_lengths)
            carry = initial_carry or self.cell.initialize_carry(
                (*seq_lengths.shape, inputs.shape[-1])
            )
            initial_carry = carry._replace(length=carry.step + seq_lengths)
        return super().__call__(
            inputs, initial_carry=initial_carry, seq_lengths=seq_lengths, **options
        )
