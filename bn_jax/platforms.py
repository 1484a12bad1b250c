"""One function in the forms that the compilers of different platforms fuse best."""

from collections.abc import Callable
from typing import TypeVar

import jax

Result = TypeVar("Result")


def by_platform(
    *operands: object,
    default: Callable[..., Result],
    cpu: Callable[..., Result] | None = None,
    gpu: Callable[..., Result] | None = None,
    tpu: Callable[..., Result] | None = None,
) -> Result:
    """Calls the form for the platform that the program is compiled for.

    Args:
      *operands: what each form is called with; arrays, or structures of them.
      default: the form where no other one is given. All forms give results of the same
        structure, shapes and dtypes, equal up to rounding.
      cpu: that of CPUs, or None.
      gpu: that of GPUs, NVIDIA's and AMD's, or None.
      tpu: that of TPUs, or None.

    Returns:
      The chosen form's result.
    """
    forms = {"cpu": cpu, "cuda": gpu, "rocm": gpu, "tpu": tpu}
    given = {name: form for name, form in forms.items() if form is not None}
    result: Result = jax.lax.platform_dependent(*operands, default=default, **given)
    return result
