"""Runs notebooks from top to bottom, each in a fresh kernel, and saves their outputs in them.

    python experiments/run_notebooks.py                          # all of notebooks/, in order
    python experiments/run_notebooks.py notebooks/01_ops.ipynb

Prints the processor time of each. The exit status is 1 if a cell fails or a notebook exceeds `--limit`.
"""

import resource
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import nbformat
from _shared import check_ranges, console, run
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from tyro.conf import Positional


FOLDER = Path(__file__).parents[1] / "notebooks"


@dataclass
class Options:
    """Options of a run."""

    notebooks: Positional[tuple[Path, ...]] = ()
    """Notebook files. Default: all in notebooks/, by name."""
    limit: float = 300
    """Limit of processor time per notebook, in seconds."""

    RANGES: ClassVar[dict[str, str]] = {"positive": "limit"}


def main(options: Options) -> None:
    """Runs the notebooks in order: later ones may use files that earlier ones left in runs/notebooks."""
    check_ranges(options)
    slow = []
    for path in options.notebooks or sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        before = cpu_seconds()
        # Without times, a run with the same outputs leaves the file unchanged.
        client = NotebookClient(
            notebook,
            timeout=None,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(path.parent.resolve())}},
        )
        try:
            client.execute()
        except (CellExecutionError, DeadKernelError) as error:
            raise SystemExit(f"{path}: {error}") from None
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if not is_alarm(output)]
        nbformat.write(notebook, path)
        seconds = cpu_seconds() - before
        console.print(f"{path.name}: {seconds:.0f} s of processor time", highlight=False)
        if seconds > options.limit:
            slow.append(path.name)
    if slow:
        raise SystemExit(f"More than {options.limit:g} s of processor time: {', '.join(slow)}")


def is_alarm(output: nbformat.NotebookNode) -> bool:
    """Whether an output is XLA's alarm about a slow compilation, which only means that the machine is busy."""
    return output.get("name") == "stderr" and "slow_operation_alarm" in output.text


def cpu_seconds() -> float:
    """Processor time of all kernels that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    run(main, Options, __doc__)
