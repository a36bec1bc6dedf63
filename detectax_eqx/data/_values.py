"""Checks of single values of a JSON file, for the modules that check its parts."""

from typing import Any, no_type_check


# Larger coordinates and areas cannot be measurements in pixels. NaN and infinities fail the comparison with it, too.
LARGEST = 1e9


@no_type_check
def is_int(value: Any) -> bool:
    """Whether a value is an integer and not a bool, which Python counts as one."""
    return type(value) is int


@no_type_check
def are_numbers(values: list) -> bool:
    """Whether all values are finite numbers of a usable size."""
    return set(map(type, values)) <= {int, float} and all(-LARGEST < value < LARGEST for value in values)


def show(value: Any) -> str:
    """The value in an error message, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
