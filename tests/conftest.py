"""Tests run with strict promotion, on eight devices of the CPU, warnings being errors (pyproject.toml)."""

import os
from pathlib import Path


os.environ.setdefault("JAX_PLATFORMS", "cpu")  # whatever else is there: a GPU, or libtpu without a TPU
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.random as jr
import pytest


jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

BEGIN, END = "<!-- reliability -->", "<!-- /reliability -->"


# Files that train, or start scripts, take minutes each. They are handed out first, so that the end of a run is made of
# short ones, which spread evenly.
LONGEST = (
    *("experiments", "mutations", "kill", "truth", "resume", "models", "malformed", "train_options", "scaling"),
    *(
        "export",
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
    """The order in which files are handed to processes, see `LONGEST`."""
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Lets go of a file's compiled programs at its end: those of all files are many gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def getkey():
    """A function that gives a fresh key at each call, the same ones in every run of a test."""
    state = {"key": jr.key(0)}

    def fresh():
        state["key"], key = jr.split(state["key"])
        return key

    return fresh


def pytest_addoption(parser):
    parser.addoption("--tally", metavar="FILE", type=Path, help="write the table of faults between FILE's markers")


@pytest.fixture
def tally(record_property):
    """A function that notes how often a fault was tried and survived, for the table at the end."""

    def note(fault, tried, survived, outcome):
        record_property("tally", (fault, int(tried), int(survived), outcome))

    return note


def pytest_terminal_summary(terminalreporter, config):
    """Prints the table of faults tried and survived, and writes it to `--tally`.

    Of a run of some tests only, rows that it has nothing on stay. Run whole files: several tests may add to one row.
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
        before, rest = file.read_text().split(BEGIN)
        old, after = rest.split(END)
        everything = config.args_source is config.ArgsSource.TESTPATHS and not config.option.keyword
        if not (everything and config.option.markexpr == "long or not long"):
            faults = read_table(old) | faults
        file.write_text(f"{before}{BEGIN}\n{table(faults)}\n{END}{after}")


def table(faults):
    """Lines of a table in Markdown, from what was tried, what survived and the outcome by fault."""
    rows = [("fault", "tried", "survived", "outcome"), ("---",) * 4]
    rows += [(fault, *map(str, row)) for fault, row in sorted(faults.items())]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def read_table(text):
    """What `table` was given."""
    rows = [line.strip("| ").split(" | ") for line in text.strip().splitlines()[2:]]
    return {fault: row for fault, *row in rows}
