"""Batch normalisation of every library, as the checks of features reach it."""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np

import bn_jax
import bn_jax.linen
import bn_jax.linen_folding

EPS = 1e-3


class Library(NamedTuple):
    """How the checks reach a library; None where it has no such function."""

    package: str  # its distribution
    # (x, mask or None) -> y, running mean and variance that are the batch's own.
    train: Callable[..., tuple[Any, Any, Any]]
    masks: bool = False
    # As train, without statistics to start from.
    without_statistics: Callable[[Any], Any] | None = None
    fold: Callable[[], float] | None = None  # the largest error of a folded layer


def jax_train(x: Any, mask: Any = None, **options: Any) -> tuple[Any, Any, Any]:
    """bn_jax's pure function."""
    features = x.shape[-1]
    y, stats = bn_jax.batch_norm(
        bn_jax.init_params(features),
        bn_jax.init_stats(features),
        x,
        train=True,
        decay=0.0,
        eps=EPS,
        weights=mask,
        **options,
    )
    return y, stats.mean, stats.var


def linen_train(
    x: Any, mask: Any = None, *, params_alone: bool = False, **options: Any
) -> tuple[Any, Any, Any]:
    """flax.linen's module."""
    import flax.linen as nn

    norm = nn.BatchNorm(
        use_running_average=False, momentum=0.0, epsilon=EPS, dtype=x.dtype, **options
    )
    variables = nn.BatchNorm(use_running_average=True).init(jax.random.key(0), x[:1])
    if params_alone:
        variables = {"params": variables["params"]}
    y, new = norm.apply(variables, x, mask=mask, mutable=["batch_stats"])
    return y, new["batch_stats"]["mean"], new["batch_stats"]["var"]


def nnx_train(x: Any, mask: Any = None, **options: Any) -> tuple[Any, Any, Any]:
    """flax.nnx's module."""
    from flax import nnx

    norm = nnx.BatchNorm(
        x.shape[-1],
        momentum=0.0,
        epsilon=EPS,
        dtype=x.dtype,
        rngs=nnx.Rngs(0),
        **options,
    )
    y = norm(x, mask=mask)
    return y, norm.mean[...], norm.var[...]


def haiku_train(x: Any, mask: Any = None) -> tuple[Any, Any, Any]:
    """dm-haiku's module, transformed."""
    import haiku as hk

    @hk.transform_with_state
    def apply(x: Any) -> Any:
        return hk.BatchNorm(True, True, decay_rate=0.0, eps=EPS)(x, is_training=True)

    params, state = apply.init(None, x)
    y, state = apply.apply(params, state, None, x)
    flat = {
        path: value for path, values in state.items() for value in [values["average"]]
    }
    mean = next(v for path, v in flat.items() if "mean" in path)
    var = next(v for path, v in flat.items() if "var" in path)
    return y, mean.reshape(-1), var.reshape(-1)


def equinox_train(x: Any, mask: Any = None) -> tuple[Any, Any, Any]:
    """Equinox's layer, over a named batch axis."""
    import equinox as eqx

    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        x.shape[-1], axis_name="batch", mode="ema", momentum=0.0, eps=EPS, dtype=x.dtype
    )
    y, state = jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
        x, state
    )
    mean, var = state.get(norm.ema_state_index)
    return y, mean, var


def keras_train(x: Any, mask: Any = None) -> tuple[Any, Any, Any]:
    """Keras's layer, on jax."""
    import keras

    half = x.dtype != jnp.float32
    policy = f"mixed_{x.dtype}" if half else "float32"
    layer = keras.layers.BatchNormalization(momentum=0.0, epsilon=EPS, dtype=policy)
    layer.build(x.shape)
    own, state = layer.trainable_variables, layer.non_trainable_variables
    y, new = layer.stateless_call(
        [v.value for v in own],
        [v.value for v in state],
        x,
        training=True,
        mask=None if mask is None else mask[..., 0],
    )
    mean = next(v for v, s in zip(new, state, strict=True) if "mean" in s.path)
    var = next(v for v, s in zip(new, state, strict=True) if "variance" in s.path)
    return y, mean, var


def torch_train(x: Any, mask: Any = None) -> tuple[Any, Any, Any]:
    """Torch's function, on CPU, over (batch, features)."""
    import torch

    tensor = torch.from_numpy(np.array(x, np.float32))
    if x.dtype == jnp.bfloat16:
        tensor = tensor.to(torch.bfloat16)
    norm = torch.nn.BatchNorm1d(x.shape[-1], momentum=1.0, eps=EPS)
    y = norm(tensor)
    arrays = (y.detach().float(), norm.running_mean, norm.running_var)
    return tuple(a.numpy() for a in arrays)  # type: ignore[return-value]


def linen_without_statistics(x: Any) -> Any:
    """Parameters alone, with the collection mutable."""
    return linen_train(x, params_alone=True)


def jax_without_statistics(x: Any) -> Any:
    """The pure function, and the module with parameters alone."""
    norm = bn_jax.linen.BatchNorm(use_running_average=False)
    variables = {"params": norm.init(jax.random.key(0), x)["params"]}
    return norm.apply(variables, x, mutable=["batch_stats"])


def jax_fold() -> float:
    """The largest error of a folded convolution in a linen model."""
    import flax.linen as nn

    model = nn.Sequential(
        [nn.Conv(8, (3, 3)), bn_jax.linen.BatchNorm(use_running_average=True)]
    )
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = model.init(jax.random.key(1), x)
    folded, report = bn_jax.linen_folding.fold_batch_norms(model, variables, x)
    if any(finding.reason for finding in report):
        raise ValueError("not folded")
    y = bn_jax.linen_folding.apply_folded(model, folded, x)
    return largest(y - model.apply(variables, x))


def torch_fold() -> float:
    """The largest error of a folded convolution."""
    import torch

    layer, norm = torch.nn.Conv2d(3, 8, 3).eval(), torch.nn.BatchNorm2d(8).eval()
    x = torch.randn(2, 3, 8, 8)
    folded = torch.nn.utils.fusion.fuse_conv_bn_eval(layer, norm)
    return largest((folded(x) - norm(layer(x))).detach().numpy())


LIBRARIES: Mapping[str, Library] = {
    "bn_jax": Library(
        "jax",
        jax_train,
        masks=True,
        without_statistics=jax_without_statistics,
        fold=jax_fold,
    ),
    "flax.linen": Library(
        "flax", linen_train, masks=True, without_statistics=linen_without_statistics
    ),
    "flax.nnx": Library("flax", nnx_train, masks=True),
    "haiku": Library("dm-haiku", haiku_train),
    "equinox": Library("equinox", equinox_train),
    "keras": Library("keras", keras_train, masks=True),
    "torch": Library("torch", torch_train, fold=torch_fold),
}


def largest(values: Any) -> float:
    """The largest absolute value."""
    return float(np.abs(np.float64(values)).max())
