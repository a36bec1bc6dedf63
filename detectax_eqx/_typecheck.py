"""The type checker that the import hook applies to every function and module of the package.

Beartype detects the violation, and this module writes the error message. The default message prints every argument,
such as a whole detector, which takes hundreds of lines.
"""

import contextlib
import inspect
import io
import re
from collections.abc import Callable
from functools import cache, wraps
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import equinox as eqx
import jax
import numpy as np
from beartype import BeartypeConf, beartype
from beartype.door import is_bearable
from beartype.roar import BeartypeCallHintParamViolation, BeartypeCallHintViolation
from jaxtyping import AnnotationError, TypeCheckError, print_bindings


# `is_pep484_tower`: an `int` is accepted as a `float`, so that `spatial_scale=1` works.
CONF = BeartypeConf(is_pep484_tower=True)
# The maximum number of characters of a value or a type in a message.
WIDTH = 160


class CallTypeError(TypeCheckError, AnnotationError):
    """A value has the wrong type. The message names the function, the expected type, the value and a remedy.

    It is a `jaxtyping.TypeCheckError`, and therefore a `TypeError`. It is also an `AnnotationError`, because jaxtyping
    passes those on unchanged and replaces the message of any other exception.
    """


def check(function: Callable) -> Callable:
    """Wraps `function` so that each call checks the arguments and the result against their annotations.

    The checking code is generated at the first call: to generate it for all functions of the package takes seconds.
    """

    @cache
    def checked() -> Callable:
        return beartype(conf=CONF)(function)

    @wraps(function)
    def call(*args, **kwargs):
        __tracebackhide__ = True
        try:
            return checked()(*args, **kwargs)
        except BeartypeCallHintViolation as error:
            message = _message(function, args, kwargs, error)
        # Outside the `except` clause, so that beartype's exception, which prints whole arrays, is not its context.
        raise CallTypeError(message)

    return call


def _message(function: Callable, args: tuple, kwargs: dict[str, Any], error: BeartypeCallHintViolation) -> str:
    name, hints = f"{function.__module__}.{function.__qualname__}", function.__annotations__
    if isinstance(error, BeartypeCallHintParamViolation):
        arguments = inspect.signature(function).bind(*args, **kwargs).arguments
        # In beartype's order: the first argument that names an axis sets its length for those after it.
        wrong = [key for key, value in arguments.items() if key in hints and not _fits(value, hints[key])]
        if not wrong:  # for example, one of `*args`
            return f"{name}: {_one_line(str(error))}"
        what, hint, value, subject = f"parameter '{wrong[0]}'", hints[wrong[0]], arguments[wrong[0]], wrong[0]
    else:
        # jaxtyping checks the result by calling a function that takes it as its last argument and returns it.
        what, hint, value, subject = "the result", hints["return"], list(kwargs.values())[-1], "it"
    axes = _axes()
    lines = [f"{name}: {what} has a wrong type.", f"  expected: {_written(hint)}" + (f" with {axes}" if axes else "")]
    return "\n".join([*lines, f"  got:      {_described(value)}", f"  {_remedy(value, hint, subject)}"])


def _fits(value: Any, hint: Any) -> bool:
    return is_bearable(value, hint, conf=CONF)


def _axes() -> str:
    """The axis lengths that the arguments have bound so far, such as `n=3`."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        print_bindings()
    arrays = printed.getvalue().split("PyTree structure")[0]
    return _one_line(", ".join(line for line in arrays.splitlines() if re.match(r"\w+=", line)))


def _described(value: Any) -> str:
    """Describes a value in one line: arrays by dtype and shape, modules by name, other objects with their type."""
    if isinstance(value, str):
        return _one_line(repr(value))
    text = eqx.tree_pformat(value, width=10**6, truncate_leaf=lambda node: isinstance(node, eqx.Module))
    known = isinstance(value, jax.Array | np.ndarray | eqx.Module | int | float | complex | tuple | list | dict | None)
    return _one_line(text if known else f"{type(value).__module__}.{type(value).__qualname__}: {text}")


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."


def _members(hint: Any) -> list[Any]:
    """The members of a union, or the type itself."""
    if get_origin(hint) is Annotated:
        return _members(get_args(hint)[0])
    if isinstance(hint, UnionType) or get_origin(hint) is Union:
        return [member for part in get_args(hint) for member in _members(part)]
    return [hint]


def _written(hint: Any) -> str:
    """A type as it is written in source code."""
    names = []
    for member in _members(hint):
        if hasattr(member, "dim_str"):
            array = "np.ndarray" if member.array_type is np.ndarray else "Array"
            names.append(f'{member.__name__.split("[")[0]}[{array}, "{member.dim_str}"]')
        elif member is type(None):
            names.append("None")
        else:
            names.append(member.__name__ if isinstance(member, type) and not get_args(member) else str(member))
    return _one_line(re.sub(r"\b(jaxtyping|typing|jaxlib\._jax|detectax_eqx[\w.]*)\.", "", " | ".join(names)))


def _remedy(value: Any, hint: Any, name: str) -> str:
    """How to get a value of the expected type, in one line."""
    # A type may define its own remedy: `Annotated[type, function]`, where the function takes the value and its name.
    for part in [hint, *get_args(hint)]:
        if get_origin(part) is Annotated and (special := get_args(part)[1](value, name)):
            return special
    arrays = [member for member in _members(hint) if hasattr(member, "dim_str")]
    is_array = isinstance(value, jax.Array | np.ndarray)
    if not arrays:
        static = " It is static, so it cannot be an array or a traced value." if is_array else ""
        return f"Pass {_written(hint)} for {name}.{static}"
    if any(member.__name__.startswith("Key[") for member in arrays):
        return f"Pass a key for {name}: jax.random.key(0)."
    wanted = next((member for member in arrays if isinstance(value, member.array_type)), arrays[0])
    dtype = next((d for d in ("float32", "int32", "uint8", "bool") if d in wanted.dtypes), wanted.dtypes[0])
    if not is_array:
        return f"Pass an array: jnp.asarray({name}, jnp.{dtype})."
    steps = []
    if value.dtype.name not in wanted.dtypes:
        steps.append(f"Cast it: {name}{'.real' if value.dtype.kind == 'c' else ''}.astype(jnp.{dtype}).")
    if not isinstance(value, wanted.array_type):
        steps.append(f"Convert it to a JAX array: jnp.asarray({name}).")
    return " ".join(steps) or _shape_remedy(value, wanted, name)


def _shape_remedy(value: Any, wanted: Any, name: str) -> str:
    axes = wanted.dim_str.split()
    variadic = any(axis.startswith(("*", "...")) for axis in axes)
    if not variadic and value.ndim == len(axes) + 1:
        return "It has one axis too many. For a batch, map the function over its examples with jax.vmap."
    shape = f"({', '.join(axes)}{',' if len(axes) == 1 else ''})"
    return f"Give {name} the shape {shape}; an axis has the same length wherever its name occurs."
