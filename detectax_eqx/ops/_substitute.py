"""Ops that another runtime has a kernel of its own for: an export puts that in their place while it traces a model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar


P = ParamSpec("P")
R = TypeVar("R")

_substitutes: ContextVar[Mapping[Callable[..., Any], Callable[..., Any]]] = ContextVar("substitutes", default={})  # noqa: B039


def replaceable(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, in whose place `substituted` can put another."""

    @wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        return _substitutes.get().get(call, function)(*arguments, **options)

    return call


@contextmanager
def substituted(substitutes: Mapping[Callable[..., Any], Callable[..., Any]]) -> Iterator[None]:
    """Within it, calls of each key (a `replaceable` function) call its value, with the same arguments."""
    token = _substitutes.set(substitutes)
    try:
        yield
    finally:
        _substitutes.reset(token)
