"""The worker's end: a process that builds a case, runs it, times it and reports its memory, on request.

Requests and replies are lines of JSON on stdin and stdout, arrays travel in .npz files. One case is held at a time.
"""

import ctypes
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Case:
    """Something to measure.

    - `run`: does it, and returns when the result is there.
    - `arrays`: the result as arrays by name, for a comparison; what it costs is not timed.
    - `facts`: what was learned while it was built.
    """

    run: Callable[[], Any]
    arrays: Callable[[Any], Mapping[str, np.ndarray]] = lambda result: {}
    facts: dict[str, float] = field(default_factory=dict)


@dataclass
class Device:
    """What differs between the two libraries: which versions, what it runs on, and its memory.

    - `peak_bytes`: the most memory that the accelerator had in use, or `None` where the host's is what counts.
    - `reset_peak`: restarts that count, where it can be.
    """

    about: dict[str, Any]
    peak_bytes: Callable[[], int] | None = None
    reset_peak: Callable[[], None] = lambda: None


def serve(cases: Mapping[str, Callable[..., Case]], device: Device) -> None:
    """Answers requests until there are no more."""
    # Libraries print what they like to stdout; replies have a channel of their own.
    with os.fdopen(os.dup(1), "w") as channel:
        os.dup2(2, 1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the benchmark's to handle: it ends its workers
        worker = _Worker(cases, device)
        requests = {name: getattr(worker, name) for name in ("about", "build", "time", "save", "memory")}
        for line in sys.stdin:
            request = json.loads(line)
            try:
                reply = requests[request.pop("do")](**request)
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                first = str(error).partition("\n")[0]
                traceback.print_exc()
                reply = {"error": f"{type(error).__name__}: {first} ({Path(where.filename).name}:{where.lineno})"}
            channel.write(json.dumps(reply) + "\n")
            channel.flush()


class _Worker:
    def __init__(self, cases: Mapping[str, Callable[..., Case]], device: Device):
        self._cases = cases
        self._device = device
        self._case: Case | None = None
        self._resident = _status("VmRSS")

    def about(self) -> dict[str, Any]:
        return self._device.about

    def build(self, case: str, arrays: str | None, options: dict[str, Any]) -> dict[str, Any]:
        self._case = None
        gc.collect()
        loaded = {} if arrays is None else dict(np.load(arrays))
        began = time.perf_counter()
        self._case = self._cases[case](loaded, **options)
        seconds, peak = time.perf_counter() - began, _status("VmHWM") - self._resident
        return {"facts": {"seconds": seconds, "building MB": peak / 1e6, **self._case.facts}}

    def time(self, runs: int) -> dict[str, Any]:
        run = self._current().run
        if runs > 1:
            run()  # the other process had the caches
        began = time.perf_counter()
        for _ in range(runs):
            run()
        return {"seconds": (time.perf_counter() - began) / runs}

    def save(self, path: str) -> dict[str, Any]:
        case = self._current()
        began = time.perf_counter()
        result = case.run()
        seconds = time.perf_counter() - began
        np.savez(path, **case.arrays(result))  # type: ignore[arg-type]
        return {"seconds": seconds}

    def memory(self, runs: int) -> dict[str, Any]:
        """The peak of some runs in MB: on the accelerator, or of what the process holds beyond its libraries."""
        case = self._current()
        _release_heap()  # compiling leaves much of it behind
        self._device.reset_peak()
        _reset_resident_peak()
        for _ in range(runs):
            case.run()
        peak = self._device.peak_bytes() if self._device.peak_bytes else _status("VmHWM") - self._resident
        return {"megabytes": peak / 1e6}

    def _current(self) -> Case:
        assert self._case is not None, "build comes first"
        return self._case


def _status(key: str) -> int:
    """Bytes of the process's resident memory: `VmRSS` now, `VmHWM` at the most. Elsewhere than on Linux, the latter."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(key))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _release_heap() -> None:
    """Gives freed memory back to the system, where the C library can (malloc_trim(3))."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_resident_peak() -> None:
    """Resets `VmHWM` (proc(5), clear_refs). Where that is refused, it is the peak since the process began."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
