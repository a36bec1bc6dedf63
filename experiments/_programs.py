"""The cache of compiled programs."""

import hashlib
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import jax

from detectax_eqx import zoo


# Programs with a shorter compile time, in seconds, compile faster than they load. JAX's own default is 1.
MIN_COMPILE_SECONDS = 0.5


def keep_programs() -> str | None:
    """Turns on the cache of compiled programs in the user's cache folder. Returns the reason if that fails, or `None`.

    JAX's own settings take precedence: `JAX_COMPILATION_CACHE_DIR` sets another folder, or no cache if empty, and
    `JAX_ENABLE_COMPILATION_CACHE=0` turns the cache off.
    """
    config: Any = jax.config
    chosen = "JAX_COMPILATION_CACHE_DIR" in os.environ or config.jax_compilation_cache_dir is not None
    if chosen or not config.jax_enable_compilation_cache:
        return None
    folder = programs_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f"Compiled programs are not kept: {folder} cannot be written ({error.strerror})."
    config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    return None


def programs_folder() -> Path:
    """The folder of this machine's programs, `programs-…` in the cache folder.

    Machines with different processors may share a home folder, so the folder's name contains a hash of the instruction
    set.
    """
    return zoo.cache_folder() / f"programs-{hashlib.sha256(processor().encode()).hexdigest()[:8]}"


def processor() -> str:
    """The processor's architecture and, on Linux, its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
    return f"{platform.machine()} {features}"
