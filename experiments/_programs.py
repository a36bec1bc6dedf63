"""Compiled programs, kept from one start of a script to the next."""

import hashlib
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import jax


# Programs that took less to compile, in seconds, are quicker compiled again than read. JAX's own default is 1.
MIN_COMPILE_SECONDS = 0.5


def keep_programs() -> str | None:
    """Keeps compiled programs in the user's cache folder. Returns why that cannot be, or `None`.

    JAX's own settings come first, from the environment or made before: with `JAX_COMPILATION_CACHE_DIR` the folder is
    that one, with `JAX_ENABLE_COMPILATION_CACHE=0` or an empty folder nothing is kept.
    """
    config: Any = jax.config
    chosen = "JAX_COMPILATION_CACHE_DIR" in os.environ or config.jax_compilation_cache_dir is not None
    if chosen or not config.jax_enable_compilation_cache:
        return None
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f"Compiled programs are not kept: {folder} cannot be written ({error.strerror})."
    config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    return None


def cache_folder() -> Path:
    """The folder of this machine's programs: `~/.cache/detectax_eqx/programs-…`, or that in `XDG_CACHE_HOME`.

    A home folder may be shared by machines, and a program may use instructions that only some of their processors have:
    the folder's name stands for the processor.
    """
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    home = configured if configured.is_absolute() else Path.home() / ".cache"  # relative ones count as unset
    return home / "detectax_eqx" / f"programs-{hashlib.sha256(processor().encode()).hexdigest()[:8]}"


def processor() -> str:
    """The processor's architecture and, on Linux, its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
    return f"{platform.machine()} {features}"
