"""Function calls that keep a name in a traced program."""

from collections.abc import Callable, Hashable
from functools import cache, partial
from typing import Any

import jax


def named_call(function: Callable[..., Any], *arrays: Any, **options: Hashable) -> Any:
    """Computes `function(*arrays, **options)` as one call named after the function and its options.

    Exporters and profilers can then recognise it in a traced program: `_keep` with `top=3` is the call `keep(top=3)`,
    whose operands are the leaves of `arrays`.

    >>> def _double(x, *, times): return x * 2 * times
    >>> jaxpr = jax.make_jaxpr(lambda x: named_call(_double, x, times=3))(1.0)
    >>> jaxpr.eqns[0].params["name"]
    'double(times=3)'
    """
    return _jitted(function, tuple(sorted(options.items())))(*arrays)


@cache
def _jitted(function, options):
    call = partial(function, **dict(options))
    listed = ", ".join(f"{name}={value!r}" for name, value in options)
    call.__name__ = f"{function.__name__.lstrip('_')}({listed})"  # type: ignore[attr-defined]
    return jax.jit(call)
