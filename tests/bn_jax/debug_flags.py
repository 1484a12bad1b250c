"""JAX's debugging flags and stricter settings, each as a context."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax

from tests.bn_jax.reference import enable_x64

FLAGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "jax_debug_nans": functools.partial(jax.debug_nans, True),
    "jax_debug_infs": functools.partial(jax.debug_infs, True),
    "jax_check_tracer_leaks": functools.partial(jax.check_tracer_leaks, True),
    "jax_numpy_rank_promotion=raise": functools.partial(
        jax.numpy_rank_promotion, "raise"
    ),
    "jax_numpy_dtype_promotion=strict": functools.partial(
        jax.numpy_dtype_promotion, "strict"
    ),
    "jax_enable_x64": functools.partial(enable_x64, True),
    "jax_disable_jit": functools.partial(jax.disable_jit, True),
}
