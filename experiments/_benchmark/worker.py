"""The worker process: on request, builds a case, runs it, times it and reports its memory."""

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
    """A program to measure.

    - `run`: runs it, and returns when the result is ready.
    - `arrays`: converts the result to named NumPy arrays for the comparison; not timed.
    - `facts`: figures from building it.
    """

    run: Callable[[], Any]
    arrays: Callable[[Any], Any] = lambda result: {}
    facts: dict[str, float] = field(default_factory=dict)


@dataclass
class Side:
    """One library in this process: its cases, one of which is held at a time, and the requests that it answers.

    - `versions`: versions and device, returned by `about`. `peak_bytes`: returns the peak memory of the accelerator;
      `None` to measure host memory. `reset_peak`: resets that peak, if possible.
    """

    cases: dict[str, Callable[..., Case]]
    versions: dict[str, Any]
    peak_bytes: Callable[[], int] | None = None
    reset_peak: Callable[[], None] = lambda: None
    case: Case = field(default_factory=lambda: Case(lambda: None))

    def serve(self) -> None:
        """Answers requests until the pipe closes, whose file descriptor is the last command-line argument."""
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
        """Builds the current case. Returns its facts, and the seconds and host memory of building it."""
        self.case = Case(lambda: None)
        gc.collect()
        began = time.perf_counter()
        self.case = self.cases[case](arrays, **options)
        seconds, peak = time.perf_counter() - began, _status("VmHWM") - self._resident
        return {"seconds": seconds, "building MB": peak / 1e6, **self.case.facts}

    def time(self, runs: int) -> float:
        """Returns seconds per run."""
        if runs > 1:
            self.case.run()  # refills the caches after the other process's turn
        began = time.perf_counter()
        for _ in range(runs):
            self.case.run()
        return (time.perf_counter() - began) / runs

    def result(self) -> tuple[Any, float]:
        """Returns the arrays of a run, and its seconds."""
        began = time.perf_counter()
        result = self.case.run()
        seconds = time.perf_counter() - began
        return self.case.arrays(result), seconds

    def memory(self, runs: int) -> float:
        """Returns peak memory in MB: of the accelerator, or of the process without its imported libraries."""
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # returns free heap left by compiling (malloc_trim(3))
        self.reset_peak()
        with suppress(OSError):  # resets VmHWM (proc(5)); if denied, the peak is since the process began
            Path("/proc/self/clear_refs").write_text("5")
        for _ in range(runs):
            self.case.run()
        return (self.peak_bytes() if self.peak_bytes else _status("VmHWM") - self._resident) / 1e6


def _status(key: str) -> int:
    """Returns resident memory in bytes: `VmRSS` now, `VmHWM` at peak. Outside Linux always the peak."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(key))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
