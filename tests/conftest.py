"""Runs the tests with strict promotion on eight CPU devices; pyproject.toml turns warnings into errors."""

import os
from pathlib import Path


os.environ.setdefault("JAX_PLATFORMS", "cpu")  # even where there is a GPU, or libtpu without a TPU
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.random as jr
import pytest


jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

BEGIN, END = "<!-- reliability -->", "<!-- /reliability -->"


# Files that train or start scripts take minutes each. They are scheduled first, so that a run ends with short files,
# which balance evenly over the processes.
LONGEST = (
    *("experiments", "mutations", "kill", "truth", "resume", "models", "malformed", "train_options", "scaling"),
    *(
        "stablehlo",
        "onnx",
        "parts",
        "saver",
        "train_step",
        "strict",
        "misuse",
        "predictor",
        "predict",
        "plain",
        "categories",
        "run_defaults",
    ),
)


def pytest_collection_modifyitems(items):
    """Schedules the files in `LONGEST` first."""
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Frees the compiled programs of each file once it has run: together they take many gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def forget_programs_of_slow_tests(request):
    """Frees those of each slow test: Linux limits the number of memory maps of a process to 65,530."""
    yield
    if any(request.node.get_closest_marker(mark) for mark in ("slow", "long")):
        jax.clear_caches()


@pytest.fixture
def getkey():
    """A function that returns a new key per call, and the same sequence of keys in every run of a test."""
    state = {"key": jr.key(0)}

    def fresh():
        state["key"], key = jr.split(state["key"])
        return key

    return fresh


def pytest_addoption(parser):
    parser.addoption("--tally", metavar="FILE", type=Path, help="write the table of faults between FILE's markers")


@pytest.fixture
def tally(record_property):
    """A function that records how often a fault was tried and survived, for the table at the end of the run."""

    def note(fault, tried, survived, outcome):
        record_property("tally", (fault, int(tried), int(survived), outcome))

    return note


def pytest_terminal_summary(terminalreporter, config):
    """Prints the table of faults tried and survived, and writes it to the file of `--tally`.

    If only some of the tests ran, rows of faults that they did not try stay as they are. Run whole files: several tests
    may add to one row.
    """
    faults = {}
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    for fault, tried, survived, outcome in [
        value
        for report in reports
        if report.when == "call"
        for name, value in report.user_properties
        if name == "tally"
    ]:
        row = faults.setdefault(fault, [0, 0, outcome])
        row[:2] = row[0] + tried, row[1] + survived
    if not faults:
        return
    terminalreporter.section("faults tried and survived")
    terminalreporter.write_line(table(faults))
    if file := config.getoption("tally"):
        before, after_begin = file.read_text().split(BEGIN)
        old, after = after_begin.split(END)
        everything = config.args_source is config.ArgsSource.TESTPATHS and not config.option.keyword
        if not (everything and config.option.markexpr == "long or not long"):
            faults = read_table(old) | faults
        file.write_text(f"{before}{BEGIN}\n{table(faults)}\n{END}{after}")


def table(faults):
    """Renders a Markdown table from a dictionary that maps each fault to `(tried, survived, outcome)`."""
    rows = [("fault", "tried", "survived", "outcome"), ("---",) * 4]
    rows += [(fault, *map(str, row)) for fault, row in sorted(faults.items())]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def read_table(text):
    """Parses the output of `table`: a dictionary of lists of strings."""
    rows = [line.strip("| ").split(" | ") for line in text.strip().splitlines()[2:]]
    return {fault: row for fault, *row in rows}
