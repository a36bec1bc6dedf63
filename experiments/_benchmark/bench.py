"""The parent process: starts workers, sends them requests, and times two of them in turn."""

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


TURN_SECONDS = 0.1  # minimum length of a turn; shorter runs are repeated within it
LONG_SECONDS, MAX_PAIRS = 5.0, 15
END_SECONDS = 3.0  # an idle worker exits when its pipe closes; a busy one is killed after this
NO_PEER = "`make bench`"  # shown in a cell that needs torchvision
# The rows of a table: the key cells of each, and a function that measures the remaining cells.
Rows = dict[tuple[str, ...], Callable[[], tuple[Any, ...]]]


class WorkerError(RuntimeError):
    """A worker failed. Holds its message, or the last lines of its log if the process ended."""


class Worker:
    """A `python -m module` process that runs cases; as a context manager, ends it.

    The process starts without waiting, so that two workers can start at the same time.
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
        """Ends the process, even if it is busy."""
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
        """Builds the current case. Returns its facts, and the seconds and host memory of building it."""
        return self._ask("build", case=case, arrays=arrays or {}, options=options)

    def time(self, runs: int = 1) -> float:
        """Returns seconds per run, averaged over `runs`."""
        self.latest = self._ask("time", runs=runs)
        return self.latest

    def result(self) -> Any:
        """Returns the arrays of a run."""
        arrays, self.latest = self._ask("result")
        return arrays

    def memory(self, runs: int = 2) -> float:
        """Returns the peak memory in MB over `runs`, of a case that has run before."""
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
    """Median seconds of two sides timed in turn, and the ratio `theirs / ours` of each pair of turns."""

    ours: float
    theirs: float | None
    ratios: list[float]

    @property
    def cells(self) -> tuple[float | None, list[float] | None]:
        """The cells `ratio` (median over pairs, above 1 if ours is faster) and `spread` (range over pairs)."""
        ratios = self.ratios
        return (statistics.median(ratios), [min(ratios), max(ratios)]) if ratios else (None, None)


def side_by_side(ours: Worker, theirs: Worker | None, *, budget: float, least: int = 5) -> Comparison:
    """Times the current cases of two workers in turn, A B A B …, for about `budget` seconds.

    Takes at least `least` pairs, or three if a run takes longer than five seconds. Both cases must have run before, as
    the first run of a program is slower.
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

    - `quick`: small sizes and few repeats. `seconds`: time per row otherwise.
    - `peer_python`: an interpreter with torchvision, or `None`.
    - `folder`: for files of this run. `memo`: figures that several tables share and that are measured once.
    """

    def __init__(self, *, quick: bool, peer_python: Path | None, folder: Path, seconds: float = 10.0):
        self.quick, self.peer_python, self.folder, self.seconds = quick, peer_python, folder, seconds
        self.memo: dict[Any, Any] = {}
        self._stack = ExitStack()
        self._shared: Pair | None = None

    def prepare(
        self, pair: Pair, case: str, arrays: Any, options: dict[str, Any], agree: Any, *, their_case: str | None = None
    ) -> Any:
        """Builds a case in both workers. Returns `agree(ours, theirs)` of their results, or `None` without a peer.

        torchvision's side is built first, because it writes the weights that ours loads.
        """
        ours, theirs = pair
        if theirs is not None:
            theirs.build(their_case or case, arrays, **options)
        ours.build(case, arrays, **options)
        result = ours.result()
        return None if theirs is None else agree(result, theirs.result())

    def compare(self, pair: Pair, *, share: float = 1.0) -> Comparison:
        """Times the current cases in turn, for `share * seconds`, or for a fixed short time in a quick run."""
        budget, least = (0.7, 3) if self.quick else (self.seconds, 5)
        return side_by_side(*pair, budget=share * budget, least=least)

    def ours(self, environment: Mapping[str, str] | None = None) -> Worker:
        """Starts a worker of this project, with variables added to its environment."""
        variables = {
            "XLA_PYTHON_CLIENT_MEM_FRACTION": ".45",  # on a GPU the other side needs memory too
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(self.folder / "programs")),
        }
        return Worker(sys.executable, "_cases.ours", environment={**variables, **(environment or {})})

    @contextmanager
    def pair(self, *, fresh: bool) -> Iterator[Pair]:
        """Yields a worker per side: `fresh` ones for large cases and for measuring memory, otherwise shared ones."""
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
        """Whether this benchmark runs on the CPU."""
        return self.abouts[0]["platform"] == "cpu"

    def weights(self, name: str) -> str | None:
        """The file to which torchvision's side writes the parameters that ours loads."""
        return str(self.folder / f"{name}.npz") if self.peer_python else None
