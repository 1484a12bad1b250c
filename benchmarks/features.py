"""What bn_jax does beside other libraries, each cell the outcome of a check that runs.

    python -m benchmarks.features [--output=benchmarks/results]

A cell is empty ("-") where the library is not installed or has no such function, and
names the error where a check raises one that it does not ask for.
"""

import argparse
import functools
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import bn_jax
import bn_jax.linen
import bn_jax.linen_folding
from benchmarks import libraries, programs, results
from benchmarks.libraries import EPSILON, LIBRARIES, Library
from experiments.running.tables import table

NO_SUCH_FUNCTION = "-"
YES, NO = "yes", "no"
COLUMNS = {name: lib for name, lib in LIBRARIES.items() if not lib.speed_alone}


def largest(values: Any) -> float:
    """The largest absolute value."""
    return float(np.abs(np.float64(values)).max())


def train(library: Library, x: Any, *mask: Any, **options: Any) -> tuple[Any, Any, Any]:
    """Output, running mean and running variance, which are the batch's own."""
    layer = library.make(x.shape, x.dtype, decay=0.0, **options)
    y, new = layer.forward(layer.params, x, *mask)
    return y, *layer.statistics(new)


def _normal(rows: int, mean: float = 0.0, std: float = 1.0, seed: int = 0) -> Any:
    values = np.random.default_rng(seed).normal(mean, std, (rows, 4))
    return jnp.asarray(values, jnp.float32)


def _normalised(x: Any) -> Any:
    x = np.float64(x)
    return (x - x.mean(0)) / np.sqrt(x.var(0) + EPSILON)


def unbiased(library: Library) -> str:
    """The running variance is that of Algorithm 2."""
    x = _normal(8)
    _, _, var = train(library, x)
    return YES if largest(var - np.float64(x).var(0, ddof=1)) < 1e-5 else NO


def large_mean(library: Library) -> str:
    """The largest error of y for data of mean 10,000 and deviation 1."""
    x = _normal(1024, mean=1e4)
    return f"{largest(np.float64(train(library, x)[0]) - _normalised(x)):.0e}"


def half_precision(library: Library) -> str:
    """Running variance of bfloat16 data of mean 7 and deviation 0.5, relative error."""
    x = _normal(1024, mean=7, std=0.5).astype(jnp.bfloat16)
    _, _, var = train(library, x)
    # Biased or not: the row before tells which.
    expected = [np.float64(x).var(0, ddof=ddof) for ddof in (0, 1)]
    return f"{min(largest(np.float64(var) / e - 1) for e in expected):.0e}"


def masked_rows(library: Library) -> str:
    """A mask is deleting rows."""
    if not library.masks:
        return NO_SUCH_FUNCTION
    x, mask = _normal(8), jnp.arange(8)[:, None] < 5
    y, mean, _ = train(library, x, mask)
    right = largest(np.float64(y)[:5] - _normalised(x[:5])) < 1e-5
    return YES if right and largest(mean - x[:5].mean(0)) < 1e-5 else NO


def nan_padding(library: Library) -> str:
    """Padding that holds NaN reaches no gradient of a valid row."""
    if not library.masks:
        return NO_SUCH_FUNCTION
    mask = jnp.arange(8)[:, None] < 5
    x = jnp.where(mask, _normal(8), jnp.nan)

    def loss(x: Any) -> Any:
        y, *_ = train(library, x, mask)
        return jnp.sum(jnp.where(mask, y, 0) ** 3)

    return YES if np.isfinite(jax.grad(loss)(x)[:5]).all() else NO


def uneven_devices(library: Library) -> str:
    """Moments over mapped devices with 8, 4, 2 and 1 valid rows are exact."""
    if library.make not in (libraries.ours, libraries.linen, libraries.nnx):
        return NO_SUCH_FUNCTION
    x = _normal(32).reshape(4, 8, 4) + 3 * jnp.arange(4.0)[:, None, None]
    mask = jnp.arange(8)[None, :, None] < jnp.array([8, 4, 2, 1])[:, None, None]

    def device(x: Any, mask: Any) -> Any:
        return train(library, x, mask, axis_name="devices")[1]

    means = jax.vmap(device, axis_name="devices")(x, mask)
    expected = np.float64(x)[np.broadcast_to(mask, x.shape)].reshape(-1, 4).mean(0)
    return YES if largest(means - expected) < 1e-4 else NO


def weights(library: Library) -> str:
    """Real-valued example weights."""
    if library.make is not libraries.ours:
        return NO_SUCH_FUNCTION
    x, own = _normal(8), jnp.linspace(0.5, 2, 8)[:, None]
    _, mean, _ = train(library, x, own)
    expected = np.average(np.float64(x), axis=0, weights=np.float64(own)[:, 0])
    return YES if largest(mean - expected) < 1e-5 else NO


def one_value(library: Library) -> str:
    """Training on one value per feature, whose output would be the bias alone."""
    try:
        y, *_ = train(library, _normal(1))
    except Exception as error:
        return type(error).__name__
    return "y = bias" if largest(y) == 0 else NO


def missing_statistics(library: Library) -> str:
    """Parameters restored without the statistics."""
    modules = {libraries.ours: bn_jax.linen.BatchNorm, libraries.linen: nn.BatchNorm}
    if library.make not in modules:
        return NO_SUCH_FUNCTION
    x, norm = _normal(8), modules[library.make](use_running_average=False)
    params = norm.init(jax.random.key(0), x)["params"]
    try:
        norm.apply({"params": params}, x, mutable=["batch_stats"])
    except Exception as error:
        return type(error).__name__
    return "starts again"


def residual_bytes(library: Library) -> str:
    """Bytes kept for the gradient, over those of x (bfloat16), with a ReLU."""
    x = jnp.ones((4096, 4), jnp.bfloat16)
    if library.make is libraries.torch:
        return _torch_residual_bytes()
    layer = library.make(x.shape, x.dtype, relu=True)
    forward = functools.partial(layer.forward, layer.params)
    return f"{programs.residual_bytes(forward, x) / x.nbytes:.1f}"


def _torch_residual_bytes() -> str:
    import torch

    x = torch.ones((4096, 4), dtype=torch.bfloat16, requires_grad=True)
    kept: dict[int, int] = {}

    def save(tensor: Any) -> Any:
        kept[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        torch.nn.functional.relu(torch.nn.BatchNorm1d(4)(x))
    return f"{sum(kept.values()) / x.nbytes:.1f}"


def population(library: Library) -> str:
    """Population statistics of Algorithm 2, from batches."""
    if library.make is not libraries.ours:
        return NO_SUCH_FUNCTION
    batches = [_normal(8, seed=seed) for seed in range(3)]
    stats = bn_jax.init_stats(4)

    def network(stats: Any, x: Any) -> Any:
        return bn_jax.batch_norm(bn_jax.init_params(4), stats, x, train=True)[1]

    got = bn_jax.population_statistics(network, stats, batches)
    mean = np.mean([np.float64(x).mean(0) for x in batches], axis=0)
    var = np.mean([np.float64(x).var(0, ddof=1) for x in batches], axis=0)
    right = largest(got.mean - mean) < 1e-5 and largest(got.var - var) < 1e-5
    return YES if right else NO


def folding(library: Library) -> str:
    """A convolution with its normalisation folded in computes the same."""
    folds = {libraries.ours: _fold, libraries.torch: _torch_fold}
    if library.make not in folds:
        return NO_SUCH_FUNCTION
    return YES if folds[library.make]() < 1e-5 else NO


def _fold() -> float:
    """The largest error of a convolution in a linen model."""
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


def _torch_fold() -> float:
    import torch

    layer, norm = torch.nn.Conv2d(3, 8, 3).eval(), torch.nn.BatchNorm2d(8).eval()
    x = torch.randn(2, 3, 8, 8)
    folded = torch.nn.utils.fusion.fuse_conv_bn_eval(layer, norm)
    return largest((folded(x) - norm(layer(x))).detach().numpy())


def small_batches(library: Library) -> str:
    """Renormalisation, ghost batches, and exact moments over micro-batches."""
    if library.make is not libraries.ours:
        return NO_SUCH_FUNCTION
    params, stats, x = bn_jax.init_params(4), bn_jax.init_stats(4), _normal(8)
    expected = bn_jax.batch_norm(params, stats, x, train=False)[0]
    y, _ = bn_jax.batch_renorm(params, stats, x, train=True, r_max=99, d_max=99)
    ghost, _ = bn_jax.ghost_batch_norm(
        params, stats, x, train=True, virtual_batch_size=4, eps=EPSILON
    )

    def loss(params: Any, stats: Any, x: Any) -> Any:
        y, stats = bn_jax.batch_norm(params, stats, x, train=True)
        return jnp.sum(y**3), stats

    (_, _), grads = bn_jax.accumulate_gradients(loss, params, stats, x.reshape(2, 4, 4))
    want, _ = jax.grad(loss, has_aux=True)(params, stats, x)
    right = (
        largest(y - expected) < 1e-5
        and largest(ghost[:4] - _normalised(x[:4])) < 1e-5
        and largest(grads.scale - want.scale) < 1e-4
    )
    return YES if right else NO


CHECKS: Mapping[str, Callable[[Library], str]] = {
    "running variance is unbiased (Algorithm 2)": unbiased,
    "largest error of y, mean 10,000, std 1": large_mean,
    "relative error of running variance, bfloat16": half_precision,
    "a mask deletes rows": masked_rows,
    "NaN in padding reaches no gradient": nan_padding,
    "exact over devices of uneven counts": uneven_devices,
    "real-valued example weights": weights,
    "training on one value per feature": one_value,
    "parameters without statistics": missing_statistics,
    "bytes kept for the gradient, with ReLU, of x's": residual_bytes,
    "population statistics (Algorithm 2)": population,
    "folding": folding,
    "renormalisation, ghost, micro-batches": small_batches,
}


def run_checks() -> dict[str, dict[str, str]]:
    """For each check the outcome of each library."""
    outcomes: dict[str, dict[str, str]] = {}
    for title, check in CHECKS.items():
        outcomes[title] = {}
        for name, library in COLUMNS.items():
            if results.version(library.package) is None:
                outcomes[title][name] = NO_SUCH_FUNCTION
                continue
            try:
                outcomes[title][name] = check(library)
            except Exception as error:
                outcomes[title][name] = type(error).__name__
    return outcomes


def main() -> None:
    """Runs the checks, prints a table and writes the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    output = parser.parse_args().output
    warnings.simplefilter("ignore")  # of the other libraries
    outcomes = run_checks()
    versions = {lib.package: results.version(lib.package) for lib in COLUMNS.values()}
    rows = [[title, *cells.values()] for title, cells in outcomes.items()]
    print(table(["", *COLUMNS], rows))
    print(", ".join(f"{name} {number}" for name, number in versions.items() if number))
    output.mkdir(parents=True, exist_ok=True)
    result = {"versions": versions, "checks": outcomes}
    (output / "features.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
