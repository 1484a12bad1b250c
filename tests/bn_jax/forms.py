"""The core as it is written for another platform, run on CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import pytest

# As `jax.lax.platform_dependent` names them.
NAMES = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}


@contextmanager
def forms_of(platform: str) -> Iterator[None]:
    """Makes the core take the forms of a platform, as when compiled for it."""

    def choose(*operands: Any, default: Any, **forms: Any) -> Any:
        return forms.get(NAMES[platform], default)(*operands)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", choose)
        # What was traced with other forms, before this and in it.
        jax.clear_caches()
        yield
    jax.clear_caches()
