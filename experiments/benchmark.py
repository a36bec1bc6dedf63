"""Measures this machine, adds to the measurements in docs/benchmarks, and renders the tables of the benchmark pages.

    python experiments/benchmark.py                       # everything, about 40 minutes on two CPU cores
    python experiments/benchmark.py --quick               # small sizes, and what is compiled anyway: two minutes
    python experiments/benchmark.py --tables ops --only nms
    python experiments/benchmark.py --check               # fails where a ratio fell by a fifth
    python experiments/benchmark.py --render              # measures nothing

torchvision runs beside this project, each in a process of its own, in turn (A B A B …) and after a check that both
compute the same. It is searched for in this environment, or in that of `--peer-python`. A row whose sides disagree is
not written. Rows of other hardware stay as they are.
"""

import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import tyro
from _benchmark.agreement import Disagreement
from _benchmark.bench import Bench, Rows, WorkerError
from _benchmark.pages import cells, render
from _benchmark.rows_detectors import data, rows, techniques
from _benchmark.rows_ops import ops
from _benchmark.tables import FOLDER, TABLES, Measurements, Run, commit
from _shared import check_ranges
from rich.console import Console


TableName = Literal[
    "size", "compile", "ops", "inference", "export", "accuracy", "training", "memory", "techniques", "data"
]
# In the order in which they are measured, whatever is asked for: later ones use the results of earlier ones, and the
# programs whose compile time is measured come first.
NAMES: tuple[TableName, ...] = get_args(TableName)
# Left out of a quick run, unless they are asked for: they build what no other table does.
NOT_QUICK: tuple[TableName, ...] = ("export", "techniques")
CHECKED: tuple[TableName, ...] = ("ops", "inference", "training")
TOLERATED = 0.8  # with --check, a row fails if its ratio falls below this part of the committed one
console = Console(highlight=False, soft_wrap=True)


@dataclass
class Options:
    """Options of the benchmark."""

    quick: bool = False
    """Small sizes and few repeats; the rows say so. Without the tables of exports and techniques, unless asked for."""
    tables: tuple[TableName, ...] = ()
    """Which tables to measure. Default: all, or with --check those of operators, detection and training. That of
    exports needs the extra `onnx`, and is left out where it is missing."""
    seconds: float = 10.0
    """How long a row is timed, about; detectors and their steps twice that. Rows take turns at least five times."""
    only: str | None = None
    """A regular expression: measure only rows in whose name it is found; the others stay. Default: all rows."""
    check: bool = False
    """Write nothing; measure this hardware's ratios again, and fail if one fell by over 20 %, twice in a row."""
    render: bool = False
    """Measure nothing; write the pages from the measurements."""
    peer_python: Path | None = None
    """The interpreter of an environment with torchvision. Default: this one, if it has it."""
    folder: Path = FOLDER
    """The folder of the measurements and of the pages."""


RANGES = {"positive": "seconds"}


def main(options: Options) -> None:
    """Measures table after table."""
    check_ranges(options, RANGES)
    if options.render:
        return render(options.folder)
    peer = options.peer_python or (Path(sys.executable) if find_spec("torchvision") else None)
    chosen = options.tables or default_tables(options)
    tables = [name for name in NAMES if name in chosen]
    failures: list[str] = []
    with TemporaryDirectory() as folder:
        bench = Bench(quick=options.quick, peer_python=peer, folder=Path(folder), seconds=options.seconds)
        try:
            run = describe(bench)
            console.print(f"{run.hardware}; {run.versions}; commit {run.commit}")
            if options.check:
                return check(options, bench, {name: rows_of(bench, name) for name in tables}, run.hardware)
            for name in tables:
                failures += measure(options, bench, name, rows_of(bench, name), run)
        except WorkerError as error:
            raise SystemExit(str(error)) from None
        except KeyboardInterrupt:
            console.print("Stopped; the rows that were finished are written.")
            raise SystemExit(130) from None
        finally:
            bench.release()
    if failures:
        raise SystemExit("Not written:\n" + "\n".join(failures))


def default_tables(options: Options) -> list[TableName]:
    """What is measured if nothing is asked for: what can be, in this environment."""
    names: list[TableName] = list(CHECKED if options.check else NAMES)
    names = [name for name in names if not (options.quick and name in NOT_QUICK)]
    if "export" in names and find_spec("onnxruntime") is None:
        names.remove("export")
        console.print("Without the table of exports: it needs the extra `onnx` (pip install 'detectax_eqx\\[onnx]').")
    return names


def rows_of(bench: Bench, name: str) -> Rows:
    """The rows of a table."""
    own = {"ops": ops, "techniques": techniques, "data": data}
    return own[name](bench) if name in own else rows(bench, name)


def measure(options: Options, bench: Bench, name: str, table: Rows, run: Run) -> list[str]:
    """Measures the rows of a table, writes each as soon as it is there, and reports those that failed."""
    measurements, columns = Measurements(options.folder), [*TABLES[name].keys, *TABLES[name].columns]
    console.print(f"[bold]{name}[/bold]: " + ", ".join(columns))
    failures = []
    for key in asked_for(options, table):
        label, began = " | ".join(key), time.perf_counter()
        try:
            with console.status(label):
                row = dict(zip(columns, map(rounded, (*key, *table[key]())), strict=True))
            measurements.add(name, row, run, keys=list(table))
            render(options.folder)
            line = " | ".join(cells(name, row).values())
            console.print(f"  {line} [dim]({time.perf_counter() - began:.0f} s)[/dim]")
        except (Disagreement, WorkerError) as error:
            failures.append(f"{name}: {label}: {error}")
            console.print(f"  {label}: [red]not written[/red]: {error}")
    # A quick run would rather not start others for the next table; of an accelerator's memory they hold half.
    if not (bench.quick and bench.on_host):
        bench.release()
    return failures


def check(options: Options, bench: Bench, tables: Mapping[str, Rows], hardware: str) -> None:
    """Measures the rows that have a ratio again, and exits with status 1 if one regressed, or if there is none.

    A row that fails is measured once more: another process may have been in the way.
    """
    if bench.peer_python is None:
        raise SystemExit("--check compares with torchvision: name its interpreter with --peer-python.")
    verdicts: list[bool] = []
    for name, table in tables.items():
        committed = Measurements(options.folder).of(name, hardware)
        ratios = {TABLES[name].key(row): row["ratio"] for row in committed}
        column = list(TABLES[name].columns).index("ratio")
        for key in asked_for(options, table):
            if isinstance(ratios.get(key), float):
                now, least = table[key]()[column], TOLERATED * ratios[key]
                now = now if now >= least else max(now, table[key]()[column])
                verdicts.append(now >= least)
                word = "" if verdicts[-1] else " [red]regressed[/red]"
                console.print(f"{' | '.join(key)}: committed {ratios[key]:.2f}×, now {now:.2f}×{word}")
        bench.release()
    if not verdicts:
        raise SystemExit(f"{options.folder} has no ratios of {hardware}: run `make bench` on it first.")
    if not all(verdicts):
        raise SystemExit(1)


def asked_for(options: Options, table: Rows) -> Iterator[tuple[str, ...]]:
    """The names of the rows of a table that were asked for."""
    return (key for key in table if options.only is None or re.search(options.only, " ".join(key)))


def rounded(value: Any) -> Any:
    """A cell to six significant digits."""
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def describe(bench: Bench) -> Run:
    """This machine and what runs on it."""
    here = bench.abouts[0]
    count, kind = here["count"], here["kind"]
    hardware = f"{count} CPU cores ({kind})" if bench.on_host else f"{count} × {kind}"
    versions = {name: version for about in bench.abouts for name, version in about["versions"].items()}
    return Run(
        hardware=hardware + (", quick" if bench.quick else ""),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        commit=commit(),
        date=date.today().isoformat(),
        command="`" + " ".join(["python", "experiments/benchmark.py", *sys.argv[1:]]) + "`",
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
