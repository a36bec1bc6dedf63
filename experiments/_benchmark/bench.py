"""What the tables are measured with, and what a table is."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .process import Comparison, Worker, own_python, side_by_side


Pair = tuple[Worker, Worker | None]
NO_PEER = "`make bench`"


class Bench:
    """The two sides, and how thoroughly they are measured.

    - `quick`: small sizes and few repeats.
    - `peer_python`: an interpreter with torchvision, or `None`.
    - `folder`: for files of this run.
    - `seconds`: how long a row is timed, unless `quick`.
    - `memo`: what more than one table needs and is measured once.
    """

    def __init__(self, *, quick: bool, peer_python: Path | None, folder: Path, seconds: float = 10.0):
        self.quick = quick
        self.peer_python = peer_python
        self.folder = folder
        self.seconds = seconds
        self.memo: dict[Any, Any] = {}
        self._stack = ExitStack()
        self._shared: Pair | None = None

    def compare(self, ours: Worker, theirs: Worker | None, *, share: float = 1.0) -> Comparison:
        """Times both sides' current cases in turn, for `share` times `seconds` or what a quick run can spare."""
        budget, least = (0.7, 3) if self.quick else (self.seconds, 5)
        return side_by_side(ours, theirs, budget=share * budget, least=least)

    def ours(self, environment: dict[str, str] | None = None) -> Worker:
        """A fresh worker of this project, with variables added to its environment."""
        variables = {
            "XLA_PYTHON_CLIENT_MEM_FRACTION": ".45",  # on a GPU the other side needs memory too
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(self.folder / "programs")),
        }
        return Worker(own_python(), "_benchmark.ours", environment=variables | (environment or {}))

    def theirs(self) -> Worker | None:
        """A fresh worker of torchvision, if there is one."""
        return Worker(self.peer_python, "_benchmark.theirs") if self.peer_python else None

    @contextmanager
    def pair(self) -> Iterator[Pair]:
        """Fresh workers of both sides: for what is large, and where memory is measured."""
        with ExitStack() as stack:
            ours, theirs = self.ours(), self.theirs()
            for worker in filter(None, (ours, theirs)):
                stack.enter_context(worker)
            yield ours, theirs

    def shared(self) -> Pair:
        """Workers that small cases share."""
        if self._shared is None:
            self._shared = self._stack.enter_context(self.pair())
        return self._shared

    @contextmanager
    def pair_for_results(self) -> Iterator[Pair]:
        """Workers whose memory is not looked at: the shared ones where starting them takes too long.

        That is on an accelerator, and in a quick run.
        """
        if self.on_host and not self.quick:
            with self.pair() as workers:
                yield workers
        else:
            yield self.shared()

    def release(self) -> None:
        """Ends the shared workers."""
        self._stack.close()
        self._shared = None

    @contextmanager
    def cold_programs(self) -> Iterator[str]:
        """A folder for compiled programs that does not hold those whose compiling is to be measured.

        That is this run's own, if programs are not kept for longer: what is compiled first, others then find.
        """
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            yield str(self.folder / "programs")
        else:
            with TemporaryDirectory() as folder:
                yield folder

    @cached_property
    def abouts(self) -> list[dict[str, Any]]:
        """Versions and device of both sides, ours first."""
        return [worker.about() for worker in self.shared() if worker is not None]

    @property
    def on_host(self) -> bool:
        """Whether the CPU is what is measured."""
        return self.abouts[0]["platform"] == "cpu"

    def weights(self, name: str) -> str | None:
        """A file in which torchvision's side leaves the parameters that ours is to take."""
        return str(self.folder / f"{name}.npz") if self.peer_python else None


@dataclass(frozen=True)
class Row:
    """A row of a table: the cells that name it, and a function that measures the others."""

    key: tuple[str, ...]
    measure: Callable[[], tuple[str, ...]]


@dataclass(frozen=True)
class Table:
    """A table between the markers `name`: the columns that name a row, those that are measured, and its rows."""

    name: str
    keys: tuple[str, ...]
    columns: tuple[str, ...]
    rows: Callable[[Bench], list[Row]]

    @property
    def header(self) -> tuple[str, ...]:
        """All columns."""
        return (*self.keys, *self.columns)


def ratio_cells(comparison: Comparison) -> tuple[str, str]:
    """The median ratio, and the least and greatest of a pair."""
    if comparison.ratio is None:
        return NO_PEER, ""
    return f"{comparison.ratio:.2f}×", f"{min(comparison.ratios):.2f}–{max(comparison.ratios):.2f}"


def in_seconds(value: float | None) -> str:
    """Seconds to a hundredth, or where they are few to a tenth of a millisecond."""
    return number(value, 2 if value is None or value >= 0.1 else 4)


def number(value: float | None, digits: int = 2) -> str:
    """A figure with this many decimals, thousands separated, or a dash."""
    return "—" if value is None else f"{value:,.{digits}f}"
