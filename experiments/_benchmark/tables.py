"""The tables of BENCHMARKS.md: read, and written between their markers.

The last column of a measured table, `run`, names a row of the table `runs`, which says on what, with what and when it
was measured. Rows of other hardware stay.
"""

import os
import re
import subprocess
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from shutil import which


Cells = tuple[str, ...]


class MarkerError(ValueError):
    """The file lacks a table's markers."""


@dataclass(frozen=True)
class Run:
    """What the rows of a run have in common."""

    hardware: str
    versions: str
    commit: str
    date: str
    command: str


RUN_COLUMNS = ("run", *(field.name for field in fields(Run)))


def commit() -> str:
    """The commit that is measured, and whether files differ from it."""
    if which("git") is None:
        return "unknown"

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/BENCHMARKS.md")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (", changed" if changed else "")


def read_table(file: Path, name: str) -> tuple[Cells, list[Cells]]:
    """Header and rows of a table; both empty if nothing lies between its markers."""
    lines = [line.strip() for line in _parts(file, name)[1].splitlines() if line.startswith("|")]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    cells = [tuple(cell.strip().replace(r"\|", "|") for cell in row) for row in rows]
    return (cells[0], cells[2:]) if cells else ((), [])


def write_table(file: Path, name: str, header: Cells, rows: list[Cells]) -> None:
    """Replaces a table. The file is whole at every moment."""
    before, _, after = _parts(file, name)
    lines = [[cell.replace("|", r"\|") for cell in row] for row in (header, ("---",) * len(header), *rows)]
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(before + "".join(f"| {' | '.join(line)} |\n" for line in lines) + after)
    temporary.replace(file)


def runs_on(file: Path, hardware: str) -> set[str]:
    """The names of the runs on some hardware."""
    return {row[0] for row in read_table(file, "runs")[1] if row[1] == hardware}


def register(file: Path, run: Run) -> str:
    """The name of a run in the table of runs, where it is entered if it is new."""
    _, runs = read_table(file, "runs")
    cells = astuple(run)
    for row in runs:
        if row[1:] == cells:
            return row[0]
    name = str(1 + max((int(row[0]) for row in runs), default=0))
    write_table(file, "runs", RUN_COLUMNS, [*runs, (name, *cells)])
    return name


def merge(file: Path, name: str, header: Cells, rows: list[Cells], *, keys: list[Cells]) -> None:
    """Puts rows, the name of their run last, into a table, and drops runs that are not referred to any more.

    - `keys`: the first cells of every row that the table has on this hardware, in order. Rows of this hardware stay if
      they are among those and not measured again.

    Rows of other hardware stay, whatever their names. Columns may change: what an old row has not measured is empty. A
    row that names no run goes.
    """
    hardware = {run[0]: run[1] for run in read_table(file, "runs")[1]}
    size, here = len(keys[0]), {hardware[row[-1]] for row in rows}
    unchanged = set(keys) - {row[:size] for row in rows}
    old_header, old = read_table(file, name)
    kept = [tuple(dict(zip(old_header, row, strict=True)).get(column, "") for column in header) for row in old]
    kept = [row for row in kept if row[-1] in hardware and (hardware[row[-1]] not in here or row[:size] in unchanged)]
    places = list(dict.fromkeys(hardware[row[-1]] for row in [*kept, *rows]))

    def place(row: Cells) -> tuple[int, int]:
        return places.index(hardware[row[-1]]), keys.index(row[:size]) if row[:size] in keys else 0

    write_table(file, name, header, sorted([*kept, *rows], key=place))
    _prune(file)


def _prune(file: Path) -> None:
    tables = [read_table(file, name) for name in _names(file) if name != "runs"]
    used = {row[-1] for header, rows in tables if header[-1:] == ("run",) for row in rows}
    write_table(file, "runs", RUN_COLUMNS, [row for row in read_table(file, "runs")[1] if row[0] in used])


def _names(file: Path) -> list[str]:
    lines = file.read_text().splitlines()
    return [line[5:-4] for line in lines if line.startswith("<!-- ") and line.endswith(" -->") and line[5] != "/"]


def _parts(file: Path, name: str) -> tuple[str, str, str]:
    """The file before, between and after a table's markers."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = file.read_text().partition(begin)
    inside, closed, after = rest.partition(end)
    if not (found and closed):
        raise MarkerError(
            f"{file} lacks the markers <!-- {name} --> and <!-- /{name} -->, between which its table goes."
        )
    return before + begin, inside, end + after
