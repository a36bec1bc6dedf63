"""Runs the benchmarks on this machine, adds them to docs/benchmarks, and renders the tables of the benchmark pages.

    python experiments/benchmark.py                       # everything, about 40 minutes on two CPU cores
    python experiments/benchmark.py --quick               # small sizes, no exports or techniques: two minutes
    python experiments/benchmark.py --tables ops --only nms
    python experiments/benchmark.py --check               # fails if a ratio fell by a fifth
    python experiments/benchmark.py --render              # measures nothing

torchvision runs beside this project, each in a separate process, in turn (A B A B …) and after a check that both
compute the same. It is taken from this environment, or from that of `--peer-python`. A row whose sides disagree is not
written. Rows of other hardware are left unchanged.
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
from typing import Any, ClassVar, Literal, get_args

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
# The order of measurement, independent of the options: later tables use the results of earlier ones, and programs whose
# compile time is measured come first.
NAMES: tuple[TableName, ...] = get_args(TableName)
# Left out of a quick run unless requested: they compile programs that no other table uses.
NOT_QUICK: tuple[TableName, ...] = ("export", "techniques")
CHECKED: tuple[TableName, ...] = ("ops", "inference", "training")
TOLERATED = 0.8  # with --check, a row fails if its ratio is below this fraction of the committed one
console = Console(highlight=False, soft_wrap=True)


@dataclass
class Options:
    """Options of the benchmark."""

    quick: bool = False
    """Small sizes and few repeats; the rows say so. Leaves out the tables export and techniques unless requested."""
    tables: tuple[TableName, ...] = ()
    """Tables to measure. Default: all, or with --check ops, inference and training. The table export needs the extra
    `onnx`, and is left out without it."""
    seconds: float = 10.0
    """Approximate seconds per row, twice that for detectors and training steps. The sides take at least five turns."""
    only: str | None = None
    """A regular expression: measure only rows whose name matches; others are unchanged. Default: all rows."""
    check: bool = False
    """Write nothing; measure this hardware's ratios again, and fail if one is over 20 % lower twice in a row."""
    render: bool = False
    """Measure nothing; write the pages from the measurements."""
    peer_python: Path | None = None
    """The interpreter of an environment with torchvision. Default: this one, if torchvision is installed."""
    folder: Path = FOLDER
    """The folder of the measurements and pages."""

    RANGES: ClassVar[dict[str, str]] = {"positive": "seconds"}


def main(options: Options) -> None:
    """Measures the chosen tables."""
    check_ranges(options)
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
            console.print("Stopped; finished rows are saved.")
            raise SystemExit(130) from None
        finally:
            bench.release()
    if failures:
        raise SystemExit("Not written:\n" + "\n".join(failures))


def default_tables(options: Options) -> list[TableName]:
    """Returns the tables to measure by default in this environment."""
    names: list[TableName] = list(CHECKED if options.check else NAMES)
    names = [name for name in names if not (options.quick and name in NOT_QUICK)]
    if "export" in names and find_spec("onnxruntime") is None:
        names.remove("export")
        console.print("Skipping the table export: it needs the extra `onnx` (pip install 'detectax_eqx\\[onnx]').")
    return names


def rows_of(bench: Bench, name: str) -> Rows:
    """Returns the rows of a table."""
    own = {"ops": ops, "techniques": techniques, "data": data}
    return own[name](bench) if name in own else rows(bench, name)


def measure(options: Options, bench: Bench, name: str, table: Rows, run: Run) -> list[str]:
    """Measures the rows of a table, saves each as soon as it is measured, and returns the failures."""
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
    # A quick run keeps its workers for the next table, except on an accelerator, where they hold half of the memory.
    if not (bench.quick and bench.on_host):
        bench.release()
    return failures


def check(options: Options, bench: Bench, tables: Mapping[str, Rows], hardware: str) -> None:
    """Measures the rows that have a ratio again, and exits with status 1 if one regressed, or if there are none.

    A row that fails is measured once more, in case another process slowed it down.
    """
    if bench.peer_python is None:
        raise SystemExit("--check compares with torchvision: pass its interpreter with --peer-python.")
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
        raise SystemExit(f"{options.folder} has no ratios for {hardware}: run `make bench` on it first.")
    if not all(verdicts):
        raise SystemExit(1)


def asked_for(options: Options, table: Rows) -> Iterator[tuple[str, ...]]:
    """Yields the names of the requested rows of a table."""
    return (key for key in table if options.only is None or re.search(options.only, " ".join(key)))


def rounded(value: Any) -> Any:
    """Rounds a cell to six significant digits."""
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def describe(bench: Bench) -> Run:
    """Describes this machine and its software."""
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
