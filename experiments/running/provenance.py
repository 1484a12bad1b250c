"""Which code, on which devices: what a later reader of any result asks."""

import functools
import platform
import subprocess
from pathlib import Path
from typing import Any

import flax
import jax
import optax

import bn_jax

# Of JAX's settings those that change the numbers of a run.
SETTINGS = (
    *("jax_default_prng_impl", "jax_threefry_partitionable", "jax_random_seed_offset"),
    *("jax_enable_x64", "jax_default_matmul_precision"),
)


def settings() -> dict[str, Any]:
    """JAX's settings that change numbers, as JSON values."""
    return {name: getattr(jax.config, name) for name in SETTINGS}


def versions() -> dict[str, str]:
    """Versions of the libraries that compute."""
    return {
        "bn_jax": bn_jax.__version__,
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "python": platform.python_version(),
    }


def describe() -> dict[str, Any]:
    """Versions, git revision and devices of this process's run, as JSON values."""
    return {
        **versions(),
        "settings": settings(),
        "git_revision": git_revision(Path(__file__)),
        "platform": jax.default_backend(),
        "device": jax.local_devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }


@functools.cache
def git_revision(file: Path) -> str | None:
    """The commit that a file is of, with "-dirty" where the working tree differs.

    Returns:
      None if git does not track the file, as in an installed package: a repository
      around it would be another one.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(file.parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
