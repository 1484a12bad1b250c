"""What all processes of a run decide together, whatever each of them sees."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

MAX_NUMBERS = 1_000
MAX_BYTES = 1_000  # of a message


def as_first_process(numbers: Sequence[int]) -> list[int]:
    """The first process's numbers, on all; of too many, the last `MAX_NUMBERS`.

    Args:
      numbers: not negative, below 2**31.
    """
    if jax.process_count() == 1:
        return list(numbers)
    padded = np.full(MAX_NUMBERS, -1, np.int32)
    own = numbers[-MAX_NUMBERS:]
    padded[: len(own)] = own
    shared = np.asarray(multihost_utils.broadcast_one_to_all(padded))
    return [int(number) for number in shared if number >= 0]


def first_message(own: str) -> str:
    """The message of the first process that has one; empty if all are well.

    No process passes before all have come here.

    Args:
      own: this process's; empty if it is well.
    """
    if jax.process_count() == 1:
        return own
    padded = np.zeros(MAX_BYTES, np.uint8)
    content = own.encode()[:MAX_BYTES]
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    shared = np.asarray(multihost_utils.process_allgather(padded))
    messages = [
        row.tobytes().rstrip(b"\0").decode(errors="ignore")
        for row in shared.reshape(-1, MAX_BYTES)
    ]
    return next((message for message in messages if message), "")


def any_process(own: bool) -> bool:
    """Whether it holds in any process; all must ask."""
    if jax.process_count() == 1:
        return own
    return bool(np.any(multihost_utils.process_allgather(np.asarray(own))))


def text_of_first_process(own: str) -> str:
    """The first process's text, on all."""
    if jax.process_count() == 1:
        return own
    content = np.frombuffer(own.encode(), np.uint8)
    (size,) = as_first_process([len(content)])
    padded = np.zeros(size, np.uint8)
    padded[: len(content)] = content[:size]
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))).decode()
