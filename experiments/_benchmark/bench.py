"""The benchmark's end: starts workers, sends them requests, and times two of them in turn."""

import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from multiprocessing import Pipe
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple


TURN_SECONDS = 0.1  # a turn lasts at least this long: shorter runs are repeated within it
LONG_SECONDS, MAX_PAIRS = 5.0, 15
END_SECONDS = 3.0  # an idle worker ends when its pipe does; a busy one is killed after this
NO_PEER = "`make bench`"  # what fills a cell that needs torchvision
# The rows of a table: the cells that name each, and a function that measures the others.
Rows = dict[tuple[str, ...], Callable[[], tuple[Any, ...]]]


class WorkerError(RuntimeError):
    """A worker failed: its own message, or the last lines it wrote if it ended."""


class Worker:
    """A process of `python -m module` that runs cases; a context manager that ends it.

    It is started at once and asked later, so that two of them start at the same time.
    """

    def __init__(self, python: str | Path, module: str, *, environment: Mapping[str, str] | None = None):
        paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {**os.environ, **(environment or {}), "PYTHONPATH": os.pathsep.join(paths)}
        self.module, self._log = module, TemporaryFile("w+")  # noqa: SIM115
        self.latest = 0.0  # seconds of the latest run
        self._pipe, end = Pipe()
        command = [str(python), "-P", "-m", module, str(end.fileno())]
        self._process = subprocess.Popen(
            command, pass_fds=[end.fileno()], stdout=self._log, stderr=self._log, env=variables
        )
        end.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the process, whatever it is doing."""
        self._pipe.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def about(self) -> dict[str, Any]:
        """Versions, and the device."""
        return self._ask("about")

    def build(self, case: str, arrays: Mapping[str, Any] | None = None, **options: Any) -> dict[str, float]:
        """Makes a case the current one. Returns its facts, and the seconds and host memory that building it took."""
        return self._ask("build", case=case, arrays=arrays or {}, options=options)

    def time(self, runs: int = 1) -> float:
        """Seconds per run, averaged over `runs`."""
        self.latest = self._ask("time", runs=runs)
        return self.latest

    def result(self) -> Any:
        """The arrays of a run."""
        arrays, self.latest = self._ask("result")
        return arrays

    def memory(self, runs: int = 2) -> float:
        """The peak of some runs in MB, of a case that has run before."""
        return self._ask("memory", runs=runs)

    def _ask(self, request: str, **options: Any) -> Any:
        try:
            self._pipe.send((request, options))
            reply, error = self._pipe.recv()
        except (OSError, EOFError):
            status = self._process.wait()
            self._log.seek(0)
            last_lines = "".join(self._log.readlines()[-20:])
            raise WorkerError(f"{self.module} ended with status {status}.\n{last_lines}") from None
        if error is not None:
            raise WorkerError(f"{self.module}, {request} {options.get('case', '')}: {error}")
        return reply


Pair = tuple[Worker, Worker | None]


class Comparison(NamedTuple):
    """Median seconds of two sides that took turns, and the ratio `theirs / ours` of each pair of turns."""

    ours: float
    theirs: float | None
    ratios: list[float]

    @property
    def cells(self) -> tuple[float | None, list[float] | None]:
        """The cells `ratio`, above 1 if ours is faster, and `spread`: the median, and the range of the pairs."""
        ratios = self.ratios
        return (statistics.median(ratios), [min(ratios), max(ratios)]) if ratios else (None, None)


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
        return Comparison(medians[0], None, [])
    return Comparison(medians[0], medians[1], [b / a for a, b in turns])


class Bench:
    """The two sides of a measurement, and how thoroughly they are measured.

    - `quick`: small sizes and few repeats. `seconds`: how long a row is timed otherwise.
    - `peer_python`: an interpreter with torchvision, or `None`.
    - `folder`: for files of this run. `memo`: figures that several tables need and that are measured once.
    """

    def __init__(self, *, quick: bool, peer_python: Path | None, folder: Path, seconds: float = 10.0):
        self.quick, self.peer_python, self.folder, self.seconds = quick, peer_python, folder, seconds
        self.memo: dict[Any, Any] = {}
        self._stack = ExitStack()
        self._shared: Pair | None = None

    def prepare(
        self, pair: Pair, case: str, arrays: Any, options: dict[str, Any], agree: Any, *, their_case: str | None = None
    ) -> Any:
        """Makes a case the current one of both workers. Returns `agree(ours, theirs)` of their results, if it can.

        torchvision's side is built first, as it leaves the weights that ours takes.
        """
        ours, theirs = pair
        if theirs is not None:
            theirs.build(their_case or case, arrays, **options)
        ours.build(case, arrays, **options)
        result = ours.result()
        return None if theirs is None else agree(result, theirs.result())

    def compare(self, pair: Pair, *, share: float = 1.0) -> Comparison:
        """Times the current cases in turn, for `share` times `seconds`, or a fixed short time in a quick run."""
        budget, least = (0.7, 3) if self.quick else (self.seconds, 5)
        return side_by_side(*pair, budget=share * budget, least=least)

    def ours(self, environment: Mapping[str, str] | None = None) -> Worker:
        """A fresh worker of this project, with variables added to its environment."""
        variables = {
            "XLA_PYTHON_CLIENT_MEM_FRACTION": ".45",  # on a GPU the other side needs memory too
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(self.folder / "programs")),
        }
        return Worker(sys.executable, "_cases.ours", environment={**variables, **(environment or {})})

    @contextmanager
    def pair(self, *, fresh: bool) -> Iterator[Pair]:
        """Workers of both sides: `fresh` for large cases and where memory is measured, or those that others share."""
        with ExitStack() as stack:
            pair = None if fresh else self._shared
            if pair is None:
                keeper = stack if fresh else self._stack
                ours = keeper.enter_context(self.ours())
                peer = self.peer_python and Worker(self.peer_python, "_cases.theirs")
                pair = ours, keeper.enter_context(peer) if peer else None
                self._shared = self._shared if fresh else pair
            yield pair

    def release(self) -> None:
        """Ends the shared workers."""
        self._stack.close()
        self._shared = None

    @cached_property
    def abouts(self) -> list[dict[str, Any]]:
        """Versions and device of both sides, ours first."""
        with self.pair(fresh=False) as pair:
            return [worker.about() for worker in pair if worker is not None]

    @property
    def on_host(self) -> bool:
        """Whether the CPU is measured."""
        return self.abouts[0]["platform"] == "cpu"

    def weights(self, name: str) -> str | None:
        """A file in which torchvision's side leaves the parameters that ours takes."""
        return str(self.folder / f"{name}.npz") if self.peer_python else None
