"""The tables of BENCHMARKS.md: read, and written between their markers, other hardware's rows kept.

The last column of a measured table, `run`, names a row of the table `runs`: hardware, versions, commit, date and
command.
"""

import os
from dataclasses import dataclass
from pathlib import Path


Cells = tuple[str, ...]
RUN_COLUMNS = ("run", "hardware", "versions", "commit", "date", "command")


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


def read_table(file: Path, name: str) -> tuple[Cells, list[Cells]]:
    """The header and the rows of a table; both empty if nothing lies between its markers."""
    lines = [line for line in _split(file, name)[1].splitlines() if line.startswith("|")]
    cells = [tuple(cell.strip() for cell in line.strip().strip("|").split("|")) for line in lines]
    return (cells[0], cells[2:]) if cells else ((), [])


def write_rows(
    file: Path, name: str, header: Cells, rows: list[Cells], run: Run, *, num_keys: int, whole: bool
) -> None:
    """Puts a run's rows into a table, in place of those that were measured on the same hardware.

    - `header`, `rows`: without the column `run`. The first `num_keys` cells name a row.
    - `whole`: these are all rows of the table, so that none of the same hardware stays; else only those of the same
      name are replaced.
    """
    run_id, runs = _register(file, run)
    same = {row[0] for row in runs if row[1] == run.hardware}
    old_header, old = read_table(file, name)
    columns = (*header, "run")
    keys = {row[:num_keys] for row in rows}
    # Rows of other columns are of an older form of the table.
    kept = [
        row
        for row in (old if old_header == columns else [])
        if row[-1] not in same or not (whole or row[:num_keys] in keys)
    ]
    _write(file, name, columns, [*kept, *((*row, run_id) for row in rows)])
    _write(file, "runs", RUN_COLUMNS, runs)
    prune_runs(file)


def prune_runs(file: Path) -> None:
    """Drops runs that no row refers to."""
    used = {
        row[-1]
        for name in _names(file)
        for header, rows in [read_table(file, name)]
        if header[-1:] == ("run",)
        for row in rows
    }
    _, runs = read_table(file, "runs")
    _write(file, "runs", RUN_COLUMNS, [row for row in runs if row[0] in used])


def _register(file: Path, run: Run) -> tuple[str, list[Cells]]:
    """The id of a run, a new one if it has none, and the table of runs with it."""
    _, runs = read_table(file, "runs")
    cells = (run.hardware, run.versions, run.commit, run.date, run.command)
    for row in runs:
        if row[1:] == cells:
            return row[0], runs
    run_id = str(1 + max((int(row[0]) for row in runs), default=0))
    return run_id, [*runs, (run_id, *cells)]


def _names(file: Path) -> list[str]:
    lines = file.read_text().splitlines()
    return [line[len("<!-- /") : -len(" -->")] for line in lines if line.startswith("<!-- /") and line.endswith(" -->")]


def _split(file: Path, name: str) -> tuple[str, str, str]:
    text, begin, end = file.read_text(), f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = text.partition(begin)
    inside, closed, after = rest.partition(end)
    if not (found and closed):
        raise MarkerError(f"{file} lacks the markers <!-- {name} --> … <!-- /{name} -->, between which a table goes.")
    return before + begin, inside, end + after


def _write(file: Path, name: str, header: Cells, rows: list[Cells]) -> None:
    before, _, after = _split(file, name)
    lines = [header, ("---",) * len(header), *rows]
    table = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    # The file is whole at every moment.
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(before + table + after)
    temporary.replace(file)
