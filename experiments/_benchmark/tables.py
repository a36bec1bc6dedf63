"""Measurements, stored as JSON lines, and Markdown tables.

A line of `measurements.jsonl` is a row of a table: the table's name, the key cells of the row, the measured cells, and
the number of its run. A line of `runs.jsonl` holds a run's hardware, versions, commit, date and command.
`tables.json` lists the columns of every table, with the format of each measured one.
"""

import json
import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import which
from typing import Any, NamedTuple


FOLDER = Path(__file__).parents[2] / "docs" / "benchmarks"
Cells = tuple[str, ...]
Line = dict[str, Any]


class MarkerError(ValueError):
    """The file lacks a table's markers."""


class Table(NamedTuple):
    """A table: the key columns, and the format of each measured column."""

    keys: list[str]
    columns: dict[str, str]

    def key(self, row: Line) -> tuple[str, ...]:
        """Returns the key cells of a row."""
        return tuple(row[column] for column in self.keys)


TABLES = {name: Table(**table) for name, table in json.loads((FOLDER / "tables.json").read_text()).items()}


@dataclass(frozen=True)
class Run:
    """What all rows of a run share."""

    hardware: str
    versions: str
    commit: str
    date: str
    command: str


class Measurements:
    """The measurements in a folder of JSON lines."""

    def __init__(self, folder: Path = FOLDER):
        self._files = folder / "measurements.jsonl", folder / "runs.jsonl"
        self.rows = _read(self._files[0])
        self.runs: dict[int, Run] = {run.pop("run"): Run(**run) for run in _read(self._files[1])}

    def of(self, table: str, hardware: str | None = None) -> list[Line]:
        """Returns the rows of a table, or only those of one hardware."""
        rows = [row for row in self.rows if row["table"] == table]
        return [row for row in rows if hardware is None or self.runs[row["run"]].hardware == hardware]

    def add(self, table: str, row: Line, run: Run | None, *, keys: Sequence[tuple[str, ...]]) -> None:
        """Adds a row and its run to a table, drops runs that no row refers to any more, and writes both files.

        - `keys`: the keys of all rows that the table has on this hardware, in order. Other rows of this hardware are
          kept only if their key is among these. Rows of other hardware are always kept.
        - `run`: `None` for a table without hardware.
        """
        key, runs = TABLES[table].key, self.runs
        row = {"table": table, **row}
        if run is not None:
            row["run"] = next((n for n, old in runs.items() if old == run), 1 + max(runs, default=0))
            runs[row["run"]] = run

        def hardware(line: Line) -> str:
            return runs[line["run"]].hardware if "run" in line else ""

        def stays(old: Line) -> bool:
            return hardware(old) != hardware(row) or (key(old) in keys and key(old) != key(row))

        here = [old for old in self.of(table) if stays(old)] + [row]
        places = list(dict.fromkeys(map(hardware, here)))
        here.sort(key=lambda old: (places.index(hardware(old)), keys.index(key(old)) if key(old) in keys else 0))
        rows, names = [old for old in self.rows if old["table"] != table] + here, list(TABLES)
        self.rows = sorted(rows, key=lambda old: names.index(old["table"]))
        used = {old["run"] for old in rows if "run" in old}
        self.runs = {number: run for number, run in sorted(runs.items()) if number in used}
        _write(self._files[0], self.rows)
        _write(self._files[1], [{"run": number, **asdict(run)} for number, run in self.runs.items()])


def _read(file: Path) -> list[Line]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _write(file: Path, lines: Iterable[Line]) -> None:
    replace(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def replace(file: Path, text: str) -> None:
    """Writes a file atomically."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(file)


def commit() -> str:
    """Returns the current commit, marked if files differ from it."""
    if which("git") is None:
        return "unknown"

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    written = (":!/BENCHMARKS.md", ":!/docs/benchmarks")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *written)
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (", changed" if changed else "")


def read_table(file: Path, name: str) -> tuple[Cells, list[Cells]]:
    """Reads header and rows of a table between its markers; both are empty if there is no table."""
    lines = [line.strip() for line in _parts(file, name)[1].splitlines() if line.startswith("|")]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    cells = [tuple(cell.strip().replace(r"\|", "|") for cell in row) for row in rows]
    return (cells[0], cells[2:]) if cells else ((), [])


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats a table in Markdown."""
    lines = [[cell.replace("|", r"\|") for cell in row] for row in (header, ("---",) * len(header), *rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _parts(file: Path, name: str) -> tuple[str, str, str]:
    """Splits a file into the parts before, between and after a table's markers."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = file.read_text().partition(begin)
    inside, closed, after = rest.partition(end)
    if not (found and closed):
        raise MarkerError(f"{file} lacks the markers <!-- {name} --> and <!-- /{name} --> around its table.")
    return before + begin, inside, end + after
