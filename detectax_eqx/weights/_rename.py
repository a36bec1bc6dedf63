"""From the names of a model's parameters to those that another library has for them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import equinox as eqx

from ._trees import ARRAYS, named_leaves


# For each module class, what the other library calls its fields; a field that is not listed keeps its name. A value is
# - a string, in which `{i}` stands for the position if the field is a tuple; empty for no level of its own;
# - a function from the position to such a string;
# - a dictionary of the same kind, which names the fields of that part instead of the table's entry for its class.
FieldNames = Mapping[str, "str | Callable[[int], str] | FieldNames"]
Names = Mapping[type, FieldNames]


def foreign_names(model: Any, names: Names) -> dict[str, str]:
    """The other library's name of each of `named_leaves(model)`, by ours and in their order.

    Modules of classes that `names` does not list keep the names of their fields.

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
    """The two paths of every array below `node`; `fields` names its fields, default the table's entry."""
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
            name = str(foreign(i)) if callable(foreign) else str(foreign.format(i=i))
            yield from _walk(part, names, (*ours, str(i)), (*theirs, name), None)
    else:
        yield from _walk(child, names, ours, (*theirs, foreign), None)
