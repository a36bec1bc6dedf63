"""The benchmark's end: starts workers, asks them, and times two of them in turn."""

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import numpy as np


EXPERIMENTS = Path(__file__).parents[1]
# A turn lasts at least this long: shorter runs are repeated within it.
TURN_SECONDS = 0.1
LONG_SECONDS = 5.0
MAX_PAIRS = 15
# A worker that is idle ends when nothing more is asked; one that is not is killed after this.
END_SECONDS = 3.0


class WorkerError(RuntimeError):
    """A worker failed: its own message, or what it wrote last if it ended."""


class Worker:
    """A process of `python -m module` that runs cases; a context manager that ends it.

    It is started at once and asked later, so that two of them start at the same time.
    """

    def __init__(self, python: str | Path, module: str, *, environment: Mapping[str, str] | None = None):
        paths = [str(EXPERIMENTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.module = module
        self._folder = TemporaryDirectory()
        self._log = TemporaryFile("w+")  # noqa: SIM115
        self._files = 0
        self.latest = 0.0  # seconds of a run, when one was last made
        self._process = subprocess.Popen(
            [str(python), "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **(environment or {}), "PYTHONPATH": os.pathsep.join(paths)},
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()
        self._folder.cleanup()

    def about(self) -> dict[str, Any]:
        """Versions, and the device."""
        return self._ask("about")

    def build(self, case: str, arrays: Mapping[str, np.ndarray] | None = None, **options: Any) -> dict[str, float]:
        """Makes a case the current one; gives its facts, and the seconds and the host's memory that this took."""
        path = None if arrays is None else self._path()
        if arrays is not None:
            np.savez(path, **arrays)  # type: ignore[arg-type]
        return self._ask("build", case=case, arrays=path, options=options)["facts"]

    def time(self, runs: int = 1) -> float:
        """Seconds a run, over some runs."""
        self.latest = self._ask("time", runs=runs)["seconds"]
        return self.latest

    def result(self) -> dict[str, np.ndarray]:
        """The arrays of a run."""
        path = self._path()
        self.latest = self._ask("save", path=path)["seconds"]
        with np.load(path) as arrays:
            return dict(arrays)

    def memory(self, runs: int = 2) -> float:
        """The peak of some runs in MB, of a case that has run before."""
        return self._ask("memory", runs=runs)["megabytes"]

    def _path(self) -> str:
        self._files += 1
        return str(Path(self._folder.name) / f"{self._files}.npz")

    def _ask(self, do: str, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"{self.module} ended with status {self._process.wait()}.\n{self._last_words()}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self.module}, {do} {request.get('case', '')}: {reply['error']}")
        return reply

    def _last_words(self) -> str:
        self._log.seek(0)
        return "".join(self._log.readlines()[-20:])


@dataclass(frozen=True)
class Comparison:
    """Seconds of two sides that took turns, each a median, and the ratio `theirs / ours` of each pair of turns."""

    ours: float
    theirs: float | None = None
    ratios: tuple[float, ...] = ()

    @property
    def ratio(self) -> float | None:
        """The median ratio: above 1, ours is faster."""
        return statistics.median(self.ratios) if self.ratios else None


def side_by_side(ours: Worker, theirs: Worker | None, *, budget: float, least: int = 5) -> Comparison:
    """Times the current cases of two workers in turn, A B A B …, for about `budget` seconds.

    At least `least` pairs, or three where a run takes longer than five seconds. Both cases must have run before: the
    first run of a program is slower.
    """
    sides = [ours] if theirs is None else [ours, theirs]
    firsts = [worker.latest if worker.latest > LONG_SECONDS else worker.time() for worker in sides]
    runs = [min(1000, max(1, math.ceil(TURN_SECONDS / seconds))) for seconds in firsts]
    least = min(least, 3) if max(firsts) > LONG_SECONDS else least
    pairs = min(MAX_PAIRS, max(least, int(budget / sum(n * t for n, t in zip(runs, firsts, strict=True)))))
    turns = [[worker.time(n) for worker, n in zip(sides, runs, strict=True)] for _ in range(pairs)]
    medians = [statistics.median(column) for column in zip(*turns, strict=True)]
    if theirs is None:
        return Comparison(medians[0])
    return Comparison(medians[0], medians[1], tuple(b / a for a, b in turns))


def own_python() -> Path:
    """The interpreter that runs the benchmark."""
    return Path(sys.executable)
