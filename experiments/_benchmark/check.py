"""Whether ratios to torchvision are still what BENCHMARKS.md says."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .bench import Row, Table
from .tables import read_table, runs_on
from .targets import figure


# A row fails if its ratio falls below this part of the committed one.
TOLERATED = 0.8


@dataclass(frozen=True)
class Verdict:
    """A row's committed ratio and the one measured now."""

    row: str
    committed: float
    now: float

    @property
    def passes(self) -> bool:
        return self.now >= TOLERATED * self.committed


def committed_ratios(file: Path, table: Table, hardware: str) -> dict[tuple[str, ...], float]:
    """The ratio of each row of some hardware that has one."""
    header, rows = read_table(file, table.name)
    if "ratio" not in header:
        return {}
    runs, column = runs_on(file, hardware), header.index("ratio")
    ratios = {row[: len(table.keys)]: figure(row[column]) for row in rows if row[-1] in runs}
    return {key: ratio for key, ratio in ratios.items() if ratio is not None}


def judge(row: Row, committed: float, ratio_of: Callable[[Row], float]) -> Verdict:
    """Measures a row, once more if it fails: another process may have been in the way."""
    verdict = Verdict(" | ".join(row.key), committed, ratio_of(row))
    return verdict if verdict.passes else Verdict(verdict.row, committed, max(verdict.now, ratio_of(row)))
