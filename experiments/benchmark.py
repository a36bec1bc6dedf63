"""Measures this machine and writes the tables of BENCHMARKS.md.

    python experiments/benchmark.py                       # everything, about 40 minutes on two CPU cores
    python experiments/benchmark.py --quick               # small sizes, and what is compiled anyway: two minutes
    python experiments/benchmark.py --tables ops --only nms
    python experiments/benchmark.py --check               # fails where a ratio fell by a fifth

torchvision runs beside this project, each in a process of its own, in turn (A B A B …) and after a check that both give
the same result. It is looked for in this environment, or in that of `--peer-python`. A row whose sides disagree is not
written. Rows of other hardware stay as they are.
"""

import re
import sys
import time
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import rich.table
import tyro
from _benchmark import rows_data, rows_detectors, rows_exports, rows_ops, rows_programs
from _benchmark.agreement import Disagreement
from _benchmark.bench import Bench, Row, Table
from _benchmark.check import Verdict, committed_ratios, judge
from _benchmark.process import WorkerError, own_python
from _benchmark.tables import Run, commit, merge, read_table, register
from _benchmark.targets import figure, write_targets
from _shared import check_ranges
from rich.console import Console


TableName = Literal[
    "size", "compile", "ops", "inference", "export", "accuracy", "training", "memory", "techniques", "data"
]
# In the order in which they are measured, whatever is asked for: later ones use what earlier ones found out, and what
# is compiled for the first time has its time taken.
TABLES: dict[TableName, Table] = {
    "size": rows_programs.size_table(),
    "compile": rows_programs.compile_table(),
    "ops": rows_ops.table(),
    "inference": rows_detectors.inference_table(),
    "export": rows_exports.table(),
    "accuracy": rows_detectors.accuracy_table(),
    "training": rows_detectors.training_table(),
    "memory": rows_detectors.memory_table(),
    "techniques": rows_programs.techniques_table(),
    "data": rows_data.table(),
}
# Left out of a quick run, unless they are asked for: they build what no other table does.
NOT_QUICK: tuple[TableName, ...] = ("export", "techniques")
CHECKED: tuple[TableName, ...] = ("ops", "inference", "training")
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
    peer_python: Path | None = None
    """The interpreter of an environment with torchvision. Default: this one, if it has it."""
    file: Path = Path(__file__).parents[1] / "BENCHMARKS.md"
    """The file whose tables are replaced."""


RANGES = {"positive": "seconds"}


def main(options: Options) -> None:
    """Measures table after table."""
    check_ranges(options, RANGES)
    peer = options.peer_python or (own_python() if find_spec("torchvision") else None)
    names = options.tables or default_tables(options)
    tables = [table for name, table in TABLES.items() if name in names]
    for table in tables:
        read_table(options.file, table.name)  # missing markers are reported before anything is measured
    failures: list[str] = []
    with TemporaryDirectory() as folder:
        bench = Bench(quick=options.quick, peer_python=peer, folder=Path(folder), seconds=options.seconds)
        try:
            run = describe(bench)
            console.print(f"{run.hardware}; {run.versions}; commit {run.commit}")
            if options.check:
                check(options, bench, tables, run.hardware)
            else:
                for table in tables:
                    failures += measure(options, bench, table, run)
                write_targets(options.file, run.hardware, on_host=bench.on_host)
        except WorkerError as error:
            raise SystemExit(str(error)) from None
        except KeyboardInterrupt:
            console.print("Stopped; the tables that were finished are written.")
            raise SystemExit(130) from None
        finally:
            bench.release()
    if failures:
        raise SystemExit("Not written:\n" + "\n".join(failures))


def default_tables(options: Options) -> list[TableName]:
    """What is measured if nothing is asked for: what can be, in this environment."""
    names: list[TableName] = list(CHECKED if options.check else TABLES)
    names = [name for name in names if not (options.quick and name in NOT_QUICK)]
    if "export" in names and find_spec("onnxruntime") is None:
        names.remove("export")
        console.print("Without the table of exports: it needs the extra `onnx` (pip install 'detectax_eqx\\[onnx]').")
    return names


def measure(options: Options, bench: Bench, table: Table, run: Run) -> list[str]:
    """Measures the rows of a table, writes each as soon as it is there, and reports those that failed."""
    rows = chosen(options, bench, table)
    keys = [row.key for row in table.rows(bench)]
    console.print(f"[bold]{table.name}[/bold]: " + ", ".join(table.header))
    failures = []
    for i, row in enumerate(rows):
        label = " | ".join(row.key)
        try:
            began = time.perf_counter()
            with console.status(f"{i + 1} of {len(rows)}: {label}"):
                cells = (*row.key, *row.measure())
            merge(options.file, table.name, (*table.header, "run"), [(*cells, register(options.file, run))], keys=keys)
            console.print("  " + " | ".join(cells) + f" [dim]({time.perf_counter() - began:.0f} s)[/dim]")
        except (Disagreement, WorkerError) as error:
            failures.append(f"{table.name}: {label}: {error}")
            console.print(f"  {label}: [red]not written[/red]: {error}")
    # A quick run would rather not start others for the next table; of an accelerator's memory they hold half.
    if not (bench.quick and bench.on_host):
        bench.release()
    return failures


def check(options: Options, bench: Bench, tables: list[Table], hardware: str) -> None:
    """Measures what has a ratio in the file, and exits with status 1 if one regressed, or if there is none."""
    if bench.peer_python is None:
        raise SystemExit("--check compares with torchvision: name its interpreter with --peer-python.")
    verdicts: list[Verdict] = []
    for table in tables:
        committed = committed_ratios(options.file, table, hardware)

        def ratio_of(row: Row, table: Table = table) -> float:
            return figure(row.measure()[table.columns.index("ratio")]) or 0.0

        for row in chosen(options, bench, table):
            if row.key in committed:
                with console.status(" | ".join(row.key)):
                    verdicts.append(judge(row, committed[row.key], ratio_of))
        bench.release()
    if not verdicts:
        raise SystemExit(f"{options.file} has no ratios of {hardware}: run `make bench` on it first.")
    shown = rich.table.Table("row", "committed", "now", "")
    for verdict in verdicts:
        word = "" if verdict.passes else "[red]regressed[/red]"
        shown.add_row(verdict.row, f"{verdict.committed:.2f}×", f"{verdict.now:.2f}×", word)
    console.print(shown)
    if not all(verdict.passes for verdict in verdicts):
        raise SystemExit(1)


def chosen(options: Options, bench: Bench, table: Table) -> list[Row]:
    """The rows of a table that were asked for."""
    rows = table.rows(bench)
    return [row for row in rows if options.only is None or re.search(options.only, " ".join(row.key))]


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
