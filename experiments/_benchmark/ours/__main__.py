"""The worker of this project's side."""

import os
import platform
import re
from pathlib import Path

import jax

from ..worker import Device, serve
from . import data, detectors, exports, ops


def main() -> None:
    """Serves until the benchmark has no more to ask."""
    device = jax.devices()[0]
    on_host = device.platform == "cpu"
    about = {
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "platform": device.platform,
        "kind": _processor() if on_host else device.device_kind,
        "count": os.cpu_count() if on_host else len(jax.devices()),
    }
    detectors.set_product_precision("float32")
    peak = None if on_host else lambda: (device.memory_stats() or {})["peak_bytes_in_use"]
    serve(ops.CASES | detectors.CASES | exports.CASES | data.CASES, Device(about, peak))


def _processor() -> str:
    """The host's processor by name."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor()


main()
