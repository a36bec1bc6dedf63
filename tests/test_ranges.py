"""Every numeric option of every script has a range, which is checked before anything is read."""

import importlib
import math
import sys
import typing
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest


EXPERIMENTS = Path(__file__).parents[1] / "experiments"
# Without numeric options; run_stablehlo.py is made to be copied and follows none of the package's conventions.
WITHOUT_OPTIONS = {"list_detectors", "run_stablehlo"}
SCRIPTS = sorted({path.stem for path in EXPERIMENTS.glob("[!_]*.py")} - WITHOUT_OPTIONS)
OUTSIDE = {
    "positive": (0, -1, math.nan, math.inf),
    "at least 0": (-1, math.nan),
    "in 0..1": (1.7, -0.1, math.nan),
    "a positive multiple of 32": (33, 0, -32),
}
# Checked against the run (devices, processes) rather than against a range; `--selection` and `--sampling` are checked
# against the fields of the detector's own (tests/malformed/options.py).
CHECKED_ELSEWHERE = {("train", "num_processes"), ("train", "process_id"), ("train", "sampling")}
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
    """Whether a type hint contains int or float; bool does not count, nor do the words of a Literal."""
    return hint in (int, float) or any(map(is_number, typing.get_args(hint)))


def shaped(hint, number):
    """A value of the type of a hint, in which every number is `number`."""
    if hint in (int, float):
        return hint(number) if hint is float or math.isfinite(number) else number
    inner = [part for part in typing.get_args(hint) if is_number(part)]
    if typing.get_origin(hint) is tuple:
        count = 1 if Ellipsis in typing.get_args(hint) else len(inner)
        return tuple(shaped(inner[0], number) for _ in range(count))
    return shaped(inner[0], number)


def groups_of(options) -> dict[str, Any]:
    """The classes of options that are nested as fields of `options`, by field name."""
    return {field.name: field.type for field in fields(options) if is_dataclass(field.type)}


def numbers_of(script):
    """The type of each numeric option, and the field of `Options` that holds its group, or `None`."""
    options = module_of(script).Options
    owners = {None: options, **groups_of(options)}
    hints = [(owner, typing.get_type_hints(one)) for owner, one in owners.items()]
    return {name: (hint, owner) for owner, part in hints for name, hint in part.items() if is_number(hint)}


def ranges_of(script):
    """`(requirement, option)` for each option with a range: the script's own options, and those of its groups."""
    module = module_of(script)
    groups = groups_of(module.Options).values()
    several = [getattr(module.Options, "RANGES", {}), *(getattr(group, "RANGES", {}) for group in groups)]
    return [(what, name) for ranges in several for what, names in ranges.items() for name in names.split()]


def required(options, path) -> dict[str, Any]:
    """Values for the options without a default: a path, a tuple of one, or a group of such values."""
    hints = typing.get_type_hints(options)
    names = [field.name for field in fields(options) if field.default is MISSING and field.default_factory is MISSING]
    groups = {name: hints[name](**required(hints[name], path)) for name in names if is_dataclass(hints[name])}
    return {name: (path,) if "tuple" in str(hints[name]) else path for name in names} | groups


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_has_a_range(script):
    numbers, ranged = numbers_of(script), [name for _, name in ranges_of(script)]
    assert len(ranged) == len(set(ranged))
    forgotten = numbers.keys() - set(ranged) - {name for of, name in CHECKED_ELSEWHERE if of == script}
    assert not forgotten, f"{script}.py checks no range of {sorted(forgotten)}: add them to its RANGES"
    assert set(ranged) <= numbers.keys()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_number_out_of_range_is_refused_before_anything_is_read(script, tmp_path):
    module, numbers = module_of(script), numbers_of(script)
    groups, none = groups_of(module.Options), tmp_path / "none"
    for what, name in ranges_of(script):
        for number in OUTSIDE[what]:
            hint, owner = numbers[name]
            given = {name: shaped(hint, number)}
            if owner is not None:
                given = {owner: groups[owner](**required(groups[owner], none) | given)}
            options = module.Options(**required(module.Options, none) | given)
            with pytest.raises(SystemExit) as refused:
                module.main(options)
            message = str(refused.value)
            assert message.startswith(f"--{name.replace('_', '-')} is ") and message.endswith(f"it must be {what}.")
    assert not list(tmp_path.iterdir())
