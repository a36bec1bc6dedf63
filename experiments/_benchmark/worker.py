"""The worker's end: a process that builds a case, runs it, times it and reports its memory, on request."""

import ctypes
import gc
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


Arrays = Mapping[str, Any]


@dataclass
class Case:
    """Something to measure.

    - `run`: runs it, and returns when the result is there.
    - `arrays`: the result as NumPy arrays by name, for a comparison. This is not timed.
    - `facts`: figures that building it produced.
    """

    run: Callable[[], Any]
    arrays: Callable[[Any], Any] = lambda result: {}
    facts: dict[str, float] = field(default_factory=dict)


@dataclass
class Side:
    """One library in this process: its cases, of which one is held at a time, and the requests that it answers.

    - `versions`: what `about` reports, with the device. `peak_bytes`: the largest memory in use on the accelerator, or
      `None` where the host's memory counts. `reset_peak`: resets that figure, where this is possible.
    """

    cases: dict[str, Callable[..., Case]]
    versions: dict[str, Any]
    peak_bytes: Callable[[], int] | None = None
    reset_peak: Callable[[], None] = lambda: None
    case: Case = field(default_factory=lambda: Case(lambda: None))

    def serve(self) -> None:
        """Answers requests from the pipe that the last argument names, until it is closed."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the benchmark handles Ctrl-C and ends its workers
        pipe, self._resident = Connection(int(sys.argv[-1])), _status("VmRSS")
        with suppress(EOFError):
            while True:
                request, options = pipe.recv()
                try:
                    reply, error = getattr(self, request)(**options), None
                except Exception as caught:
                    traceback.print_exc()
                    place, first = traceback.extract_tb(caught.__traceback__)[-1], str(caught).partition("\n")[0]
                    where = f"{Path(place.filename).name}:{place.lineno}"
                    reply, error = None, f"{type(caught).__name__}: {first} ({where})"
                pipe.send((reply, error))

    def about(self) -> dict[str, Any]:
        """Versions and device."""
        return self.versions

    def build(self, case: str, arrays: Arrays, options: dict[str, Any]) -> dict[str, float]:
        """Makes a case the current one. Returns its facts, and the seconds and host memory that building it took."""
        self.case = Case(lambda: None)
        gc.collect()
        began = time.perf_counter()
        self.case = self.cases[case](arrays, **options)
        seconds, peak = time.perf_counter() - began, _status("VmHWM") - self._resident
        return {"seconds": seconds, "building MB": peak / 1e6, **self.case.facts}

    def time(self, runs: int) -> float:
        """Seconds per run."""
        if runs > 1:
            self.case.run()  # the other process had the caches
        began = time.perf_counter()
        for _ in range(runs):
            self.case.run()
        return (time.perf_counter() - began) / runs

    def result(self) -> tuple[Any, float]:
        """The arrays of a run, and its seconds."""
        began = time.perf_counter()
        result = self.case.run()
        seconds = time.perf_counter() - began
        return self.case.arrays(result), seconds

    def memory(self, runs: int) -> float:
        """The peak of some runs in MB: on the accelerator, or what the process holds beyond its libraries."""
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # compiling leaves much free heap behind (malloc_trim(3))
        self.reset_peak()
        with suppress(OSError):  # resets VmHWM (proc(5)); where refused, it is the peak since the process began
            Path("/proc/self/clear_refs").write_text("5")
        for _ in range(runs):
            self.case.run()
        return (self.peak_bytes() if self.peak_bytes else _status("VmHWM") - self._resident) / 1e6


def _status(key: str) -> int:
    """Bytes of the process's resident memory: `VmRSS` now, `VmHWM` at most. Outside Linux always the latter."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(key))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
