"""Strict JAX for the core: no implicit promotion of dtypes or of ranks."""

from collections.abc import Iterator

import jax
import pytest

from tests.bn_jax.reference import enable_x64


@pytest.fixture(autouse=True)
def strict_promotion() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64() -> Iterator[None]:
    with enable_x64(True):
        yield
