"""Renders the tables of BENCHMARKS.md and of the pages in docs/benchmarks from the measurements.

The table `name` is written between the markers `<!-- name -->` and `<!-- /name -->` of a page. It is a full measured
table, a view of `views.json`, or a table computed here. Other markers are left unchanged.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .bench import NO_PEER
from .tables import FOLDER, TABLES, Line, Measurements, markdown, read_table, replace


FORMATS: dict[str, Callable[[Any], str]] = {
    "ratio": lambda value: f"{value:.2f}×",
    "spread": lambda value: f"{value[0]:.2f}–{value[1]:.2f}",
    # Two decimals, or four for values below .1.
    "seconds": lambda value: f"{value:,.{2 if value >= 0.1 else 4}f}",
    "hours": lambda value: f"{value:,.{0 if value >= 10 else 2}f}",
}
EMPTY = {"ratio": NO_PEER, "spread": "", "": ""}
VIEWS: dict[str, Any] = json.loads((FOLDER / "views.json").read_text())
TARGETS: dict[str, list[Line]] = json.loads((FOLDER / "targets.json").read_text())


def shown(value: Any, how: str) -> str:
    """Formats a cell: strings unchanged, numbers by a Python format or one of `FORMATS`, `None` as a dash."""
    if value is None:
        return EMPTY.get(how, "—")
    return value if isinstance(value, str) else FORMATS[how](value) if how in FORMATS else format(value, how)


def cells(name: str, row: Line) -> dict[str, str]:
    """Formats all cells of a row; a column that the row lacks is empty."""
    table = TABLES[name]
    named = {column: row[column] for column in table.keys}
    measured = {column: shown(row[column], how) if column in row else "" for column, how in table.columns.items()}
    return named | measured | ({"run": str(row["run"])} if "run" in row else {})


def measured_table(name: str, measurements: Measurements) -> str:
    """Renders a full measured table."""
    rows = [cells(name, row) for row in measurements.of(name)]
    return markdown(list(rows[0]), [list(row.values()) for row in rows]) if rows else ""


def runs_table(measurements: Measurements) -> str:
    """Renders the runs that measured rows refer to."""
    rows = [(str(number), *vars(run).values()) for number, run in measurements.runs.items()]
    return markdown(("run", "hardware", "versions", "commit", "date", "command"), rows)


def view(spec: Line, measurements: Measurements) -> str:
    """Renders a selection from the measured tables.

    A spec with `table` selects `columns`, mapped to their headings, and the rows whose columns in `where` have one of
    the listed values. Any other spec has `rows`, each a label, a table, a row key and a template for its cells; the
    result has a column per machine.
    """
    if "table" in spec:
        rows = [cells(spec["table"], row) for row in measurements.of(spec["table"])]
        rows = [row for row in rows if all(row[column] in values for column, values in spec["where"].items())]
        chosen = list(dict.fromkeys(tuple(row[column] for column in spec["columns"]) for row in rows))
        return markdown(list(spec["columns"].values()), chosen)
    machines = VIEWS["machines"]
    lines = []
    for label, table, key, template in spec["rows"]:
        line = [label]
        for hardware in machines.values():
            matching = [row for row in measurements.of(table, hardware) if TABLES[table].key(row) == tuple(key)]
            line.append(template.format_map(cells(table, matching[0])) if matching else "—")
        lines.append(line)
    return markdown([spec["head"], *machines], lines)


def targets(device: str, measurements: Measurements, hardware: str | None = None) -> list[tuple[str, ...]]:
    """Returns work, bound, figure, whether the bound is met, and run, for the measured targets of a device."""
    lines = []
    for name in dict.fromkeys(run.hardware for run in measurements.runs.values()):
        if (hardware is None or name == hardware) and ("CPU cores" in name) == (device == "cpu"):
            for target in TARGETS[device]:
                table, column, key = target["table"], target["column"], tuple(target["key"])
                for row in measurements.of(table, name):
                    value = row.get(column)
                    if TABLES[table].key(row)[: len(key)] == key and isinstance(value, int | float):
                        met = value >= target["least"] if "least" in target else value <= target["most"]
                        verdict = "yes" if met else "no"
                        figures = bound(target), cells(table, row)[column]
                        lines.append((target["work"], *figures, verdict, str(row["run"])))
    return lines


def bound(target: Line) -> str:
    """Formats the bound of a target with its unit."""
    unit = "×" if "ratio" in target["column"] else " s" if target["column"].endswith(" s") else ""
    return f"≥ {target['least']:g}{unit}" if "least" in target else f"≤ {target['most']:g}{unit}"


def missed(measurements: Measurements) -> str:
    """Renders how many targets each machine meets, and which it misses."""
    lines = []
    for machine, hardware in VIEWS["machines"].items():
        rows = targets("cpu" if "CPU" in hardware else "gpu", measurements, hardware)
        short = [f"{work} {figure} ({wanted})" for work, wanted, figure, met, _ in rows if met == "no"]
        lines.append((machine, f"{len(rows) - len(short)} of {len(rows)}", "; ".join(short)))
    return markdown(("machine", "met", "missed"), lines)


def faults(page: Path) -> str:
    """Summarises the fault table, which the tests write to its own page."""
    rows = read_table(page, "reliability")[1]
    tried, survived = (sum(int(row[column]) for row in rows) for column in (1, 2))
    return f"{tried:,} faults of {len(rows)} kinds are injected; {survived:,} are survived.\n"


def render(folder: Path = FOLDER) -> None:
    """Writes the tables of all pages."""
    measurements = Measurements(folder)
    tables: dict[str, Callable[[], str]] = {
        **{name: lambda name=name: measured_table(name, measurements) for name in TABLES},
        **{name: lambda spec=spec: view(spec, measurements) for name, spec in VIEWS.items() if name != "machines"},
        "targets": lambda: markdown(("work", "target", "measured", "met", "run"), targets("cpu", measurements)),
        "targets-gpu": lambda: markdown(("work", "target", "measured", "met", "run"), targets("gpu", measurements)),
        "missed": lambda: missed(measurements),
        "runs": lambda: runs_table(measurements),
        "faults": lambda: faults(folder / "reliability.md"),
    }
    for page in sorted([*folder.glob("*.md"), *folder.parents[1].glob("BENCHMARKS.md")]):
        text = before = page.read_text()
        for name in re.findall(r"<!-- (\S+) -->\n", text):
            if name in tables:
                start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
                head, _, rest = text.partition(start)
                text = head + start + tables[name]() + end + rest.partition(end)[2]
        if text != before:
            replace(page, text)
