"""Measures this machine and writes the tables of BENCHMARKS.md.

    python experiments/benchmark.py                       # everything, about 40 minutes on two CPU cores
    python experiments/benchmark.py --quick               # small sizes, about two minutes
    python experiments/benchmark.py --tables ops --only nms

torchvision runs beside this project, each in a process of its own, in turn (A B A B …) and after a check that both give
the same result. It is looked for in this environment, or in that of `--peer-python`. A row that disagrees is not
written. Rows of other hardware stay as they are.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import tyro
from _benchmark import rows_detectors, rows_ops
from _benchmark.agreement import Disagreement
from _benchmark.bench import Bench, Table
from _benchmark.process import WorkerError, own_python
from _benchmark.tables import Run, write_rows
from rich.console import Console


TableName = Literal["training", "inference", "ops"]
TABLES: dict[TableName, Table] = {
    "training": rows_detectors.training_table(),
    "inference": rows_detectors.inference_table(),
    "ops": rows_ops.table(),
}
console = Console(highlight=False)


@dataclass
class Options:
    """Options of the benchmark."""

    quick: bool = False
    """Small sizes and few repeats; the rows say so."""
    tables: tuple[TableName, ...] = tuple(TABLES)
    """Which tables to measure."""
    only: str | None = None
    """A regular expression: measure only rows in whose name it is found; the others stay."""
    peer_python: Path | None = None
    """The interpreter of an environment with torchvision. Default: this one, if it has it."""
    file: Path = Path(__file__).parents[1] / "BENCHMARKS.md"
    """The file whose tables are replaced."""


def main(options: Options) -> None:
    """Measures table after table and writes each as soon as it is there."""
    peer = options.peer_python or (own_python() if find_spec("torchvision") else None)
    failures = []
    with TemporaryDirectory() as folder:
        bench = Bench(quick=options.quick, peer_python=peer, folder=Path(folder))
        try:
            run = describe(bench)
            for name in options.tables:
                table = TABLES[name]
                rows = table.rows(bench)
                chosen = [row for row in rows if options.only is None or re.search(options.only, " ".join(row.key))]
                console.print(f"[bold]{name}[/bold]: " + ", ".join((*table.keys, *table.columns)), soft_wrap=True)
                done = []
                for i, row in enumerate(chosen):
                    label = " | ".join(row.key)
                    try:
                        with console.status(f"{i + 1} of {len(chosen)}: {label}"):
                            done.append((*row.key, *row.measure()))
                        console.print("  " + " | ".join(done[-1]), soft_wrap=True)
                    except (Disagreement, WorkerError) as error:
                        failures.append(f"{name}: {label}: {error}")
                        console.print(f"  {label}: [red]not written[/red]: {error}", soft_wrap=True)
                bench.release()
                if done:
                    whole = len(done) == len(rows)
                    header = (*table.keys, *table.columns)
                    write_rows(options.file, name, header, done, run, num_keys=len(table.keys), whole=whole)
        finally:
            bench.release()
    if failures:
        raise SystemExit("Not written:\n" + "\n".join(failures))


def describe(bench: Bench) -> Run:
    """This machine and what runs on it."""
    with bench.pair() as workers:
        abouts = [worker.about() for worker in workers if worker is not None]
    versions = {name: version for about in abouts for name, version in about["versions"].items()}
    here = abouts[0]
    count, kind = here["count"], here["kind"]
    hardware = f"{count} CPU cores ({kind})" if here["platform"] == "cpu" else f"{count} × {kind}"
    return Run(
        hardware=hardware + (", quick" if bench.quick else ""),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        commit=commit(),
        date=date.today().isoformat(),
        command="`" + " ".join(["python", "experiments/benchmark.py", *sys.argv[1:]]) + "`",
    )


def commit() -> str:
    """The commit that is measured, and whether files differ from it."""
    here = str(Path(__file__).parent)

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/BENCHMARKS.md")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (", changed" if changed else "")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
