"""Functions as they are compiled for another platform, run on CPU."""

from collections.abc import Callable
from typing import Any

import jax
from jax import export

FORMS = ("cpu", "gpu", "tpu")
NAMES = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}


def on_platform(platform: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The program that a function is lowered to for a platform, to be called here.

    Args:
      platform: one of `FORMS`.
      function: of arrays, traced anew for each call.
    """

    def call(*args: Any) -> Any:
        exported = export.export(
            jax.jit(lambda *args: function(*args)),
            platforms=[NAMES[platform]],
            disabled_checks=[export.DisabledSafetyCheck.platform()],
        )(*args)
        return exported.call(*args)

    return call
