"""One function in the forms that the compilers of different platforms fuse best."""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar

import jax

Result = TypeVar("Result")

# The platform that a form is being traced for, by JAX's name. What it calls takes the
# form for that platform alone: tracing all forms within all forms would take long.
_traced_for: ContextVar[str | None] = ContextVar("traced_for", default=None)


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
    platform = _traced_for.get()
    if platform is not None:
        return given.get(platform, default)(*operands)
    given = {
        name: functools.partial(_call_for, name, form) for name, form in given.items()
    }
    result: Result = jax.lax.platform_dependent(*operands, default=default, **given)
    return result


def _call_for(platform: str, form: Callable[..., Result], *operands: object) -> Result:
    token = _traced_for.set(platform)
    try:
        return form(*operands)
    finally:
        _traced_for.reset(token)
