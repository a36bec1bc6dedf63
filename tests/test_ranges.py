"""Every number among the options of every script has a range, which is checked before anything is read."""

import importlib
import itertools
import math
import sys
import typing
from dataclasses import MISSING, fields
from pathlib import Path

import pytest


EXPERIMENTS = Path(__file__).parents[1] / "experiments"
# Has no options that are numbers, and none of the package's ways: it is made to be copied.
WITHOUT_OPTIONS = {"run_stablehlo"}
SCRIPTS = sorted({path.stem for path in EXPERIMENTS.glob("[!_]*.py")} - WITHOUT_OPTIONS)
OUTSIDE = {
    "positive": (0, -1, math.nan, math.inf),
    "at least 0": (-1, math.nan),
    "in 0..1": (1.7, -0.1, math.nan),
    "a positive multiple of 32": (33, 0, -32),
}
# Numbers that are checked against what the run has (devices, processes), rather than a range.
# `--selection` against the fields of the detector's own selection (tests/malformed/options.py).
CHECKED_ELSEWHERE = {("train", "num_processes"), ("train", "process_id")}
CHECKED_ELSEWHERE |= {(script, "selection") for script in ("evaluate", "export", "predict")}


def module_of(script):
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        return importlib.import_module(script)
    except ImportError as error:
        if error.name in ("nbformat", "nbclient"):
            pytest.skip(f"needs {error.name}")
        raise
    finally:
        sys.path.remove(str(EXPERIMENTS))


def is_number(hint):
    """Whether a type hint holds an int or a float; a bool is none, nor are the words of a Literal."""
    return hint in (int, float) or any(map(is_number, typing.get_args(hint)))


def shaped(hint, number):
    """A value of the type of a hint, all of whose numbers are `number`."""
    if hint in (int, float):
        return hint(number) if hint is float or math.isfinite(number) else number
    inner = [part for part in typing.get_args(hint) if is_number(part)]
    if typing.get_origin(hint) is tuple:
        count = 1 if Ellipsis in typing.get_args(hint) else len(inner)
        return tuple(shaped(inner[0], number) for _ in range(count))
    return shaped(inner[0], number)


def numbers_of(script):
    module = module_of(script)
    hints = typing.get_type_hints(module.Options)
    return {name: hint for name, hint in hints.items() if is_number(hint)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_has_a_range(script):
    module, numbers = module_of(script), numbers_of(script)
    ranged = list(itertools.chain(*(names.split() for names in getattr(module, "RANGES", {}).values())))
    assert len(ranged) == len(set(ranged))
    forgotten = numbers.keys() - set(ranged) - {name for of, name in CHECKED_ELSEWHERE if of == script}
    assert not forgotten, f"{script}.py checks no range of {sorted(forgotten)}: add them to its RANGES"
    assert set(ranged) <= numbers.keys()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_number_out_of_range_is_refused_before_anything_is_read(script, tmp_path):
    module, numbers = module_of(script), numbers_of(script)
    required = [field.name for field in fields(module.Options) if field.default is MISSING]
    paths = dict.fromkeys(required, tmp_path / "none")
    tuples = {name for name in required if "tuple" in str(typing.get_type_hints(module.Options)[name])}
    paths |= dict.fromkeys(tuples, (tmp_path / "none",))
    for what, names in module.RANGES.items():
        for name, number in itertools.product(names.split(), OUTSIDE[what]):
            options = module.Options(**paths | {name: shaped(numbers[name], number)})
            with pytest.raises(SystemExit) as refused:
                module.main(options)
            message = str(refused.value)
            assert message.startswith(f"--{name.replace('_', '-')} is ") and message.endswith(f"it must be {what}.")
    assert not list(tmp_path.iterdir())
