"""Translation of the parameter names of a model to those of another library."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import equinox as eqx

from ._trees import ARRAYS, named_leaves


# For each module class, the names that the other library has for its fields. Fields that are not listed keep their
# names. A value is one of:
# - a string, in which `{i}` stands for the position if the field is a tuple; an empty string adds no level to the path;
# - a function from the position to such a string, or to a dictionary as below for the part at that position;
# - a dictionary of the same kind with names for the fields of that part, replacing the table's entry for its class.
FieldNames = Mapping[str, "str | Callable[[int], str | FieldNames] | FieldNames"]
Names = Mapping[type, FieldNames]


def foreign_names(model: Any, names: Names) -> dict[str, str]:
    """Maps the names of `named_leaves(model)`, in order, to the names of the other library.

    Fields of modules whose class is not in `names` keep their names.

    >>> import jax.random as jr
    >>> from detectax_eqx.nn import Conv2d, Downsample, FrozenBatchNorm
    >>> shortcut = Downsample(8, 16, stride=2, norm=FrozenBatchNorm, key=jr.key(0))
    >>> foreign_names(shortcut, {Downsample: {"conv": "0", "norm": "1"}})["conv.weight"]
    '0.weight'
    """
    foreign = {".".join(ours): ".".join(filter(None, theirs)) for ours, theirs in _walk(model, names, (), (), None)}
    return {name: foreign.get(name, name) for name in named_leaves(model)}


def _walk(
    node: Any, names: Names, ours: tuple[str, ...], theirs: tuple[str, ...], fields: FieldNames | None
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Yields both paths of each array below `node`. `fields` are the names of its fields; default: from the table."""
    if isinstance(node, ARRAYS):
        yield ours, theirs
    elif isinstance(node, tuple | list):
        for i, child in enumerate(node):
            yield from _walk(child, names, (*ours, str(i)), (*theirs, str(i)), None)
    elif isinstance(node, Mapping):
        for key, child in node.items():
            yield from _walk(child, names, (*ours, str(key)), (*theirs, str(key)), None)
    elif isinstance(node, eqx.Module):
        fields = names.get(type(node), {}) if fields is None else fields
        for name, child in vars(node).items():
            yield from _field(child, names, (*ours, name), theirs, fields.get(name, name))


def _field(
    child: Any, names: Names, ours: tuple[str, ...], theirs: tuple[str, ...], foreign: Any
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    if isinstance(foreign, Mapping):
        yield from _walk(child, names, ours, theirs, foreign)
    elif isinstance(child, tuple | list) and (callable(foreign) or "{i}" in foreign):
        for i, part in enumerate(child):
            name = foreign(i) if callable(foreign) else foreign.format(i=i)
            if isinstance(name, Mapping):
                yield from _walk(part, names, (*ours, str(i)), theirs, name)
            else:
                yield from _walk(part, names, (*ours, str(i)), (*theirs, str(name)), None)
    else:
        yield from _walk(child, names, ours, (*theirs, foreign), None)
