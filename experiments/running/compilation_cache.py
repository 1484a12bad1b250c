"""Compiled programs on disk, so that only the first start of a run compiles them."""

import contextlib
import os
import platform
from pathlib import Path

import google_crc32c
import jax

VARIABLE = "JAX_COMPILATION_CACHE_DIR"  # JAX's own


def default_folder() -> Path:
    """Where they lie if nobody says where: in the user's folder for caches."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "bn_jax" / "compiled" / _kind_of_processor()


def _kind_of_processor() -> str:
    """Of a home folder that several machines share, each kind has programs of its own.

    XLA compiles for the processor's extensions, and another one may lack some.
    """
    extensions = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        extensions = next((line for line in lines if line.startswith("flags")), "")
    return f"{platform.machine()}_{google_crc32c.value(extensions.encode()):08x}"


def use_compilation_cache() -> None:
    """Keeps what this process compiles, and takes what others have compiled.

    With it JAX keeps the kernels that XLA chose by timing them, which on a GPU takes
    longer than the rest of compiling. Nothing changes where the user has set JAX's
    variable, be it to nothing, or where the folder cannot be made.
    """
    if VARIABLE in os.environ:
        return
    folder = default_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
