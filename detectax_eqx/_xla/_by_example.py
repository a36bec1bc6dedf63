"""Computations that run one example after another on CPU.

`by_example` is a primitive, so that it knows the examples that `vmap` adds, and differentiates the loop over them.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from ._plain import by_platform, is_plain
from ._varying import varying_like


# Above this number of intermediate values, examples are computed one after another.
MAX_VALUES = 2**22


def by_example(*arrays: Array, cpu: Callable[..., Array], default: Callable[..., Array], values: int) -> Array:
    """Computes `cpu(*arrays)` on CPU and `default(*arrays)` elsewhere; both must give the same result.

    Under `vmap`, on CPU, the examples are computed one after another if they have many intermediate values together.
    The backward pass computes those of each example again.

    - `cpu`, `default`: functions of the same identity in each call, as those of a module are.
    - `values`: approximate number of intermediate values. A function with more than `MAX_VALUES` of them has to
      recompute them itself.
    """
    if is_plain("by_example"):
        return default(*arrays)
    arrays = varying_like(arrays)
    return _by_example_p.bind(*(x[None] for x in arrays), cpu=cpu, default=default, values=values)[0]


def one_by_one(function: Callable[[Sequence[Array]], Array], arrays: Sequence[Array], axis: int) -> Array:
    """Computes `function(arrays)` in a loop over an axis, whose length is 1 in arrays that all steps share."""
    own = [x.shape[axis] != 1 for x in arrays]
    if not any(own):
        return function(arrays)

    def one(parts):
        remaining = iter(parts)
        both = [jnp.expand_dims(next(remaining), axis) if mine else x for x, mine in zip(arrays, own, strict=True)]
        return function(both).squeeze(axis)

    parts = [jnp.moveaxis(x, axis, 0) for x, mine in zip(arrays, own, strict=True) if mine]
    return jnp.moveaxis(lax.map(one, parts), 0, axis)


@partial(jax.jit, static_argnames=("cpu", "default", "values"))
def _run(*arrays, cpu, default, values):
    def one_after_another(*arrays):
        if _num_examples(arrays) * values <= MAX_VALUES:
            return _at_once(*arrays, function=cpu)
        step = lambda x: _at_once(*x, function=cpu)  # noqa: E731
        return one_by_one(step if values > MAX_VALUES else jax.checkpoint(step), arrays, axis=0)

    at_once = partial(_at_once, function=default)
    return by_platform(*arrays, cpu=one_after_another, default=at_once, trick="by_example")


def _num_examples(arrays):
    return next((len(x) for x in arrays if len(x) != 1), 1)


def _at_once(*arrays, function):
    axes = [None if len(x) == 1 else 0 for x in arrays]
    arrays = [x if axis == 0 else x[0] for x, axis in zip(arrays, axes, strict=True)]
    return jax.vmap(function, axes)(*arrays) if 0 in axes else function(*arrays)[None]


def _batch(arrays, dims, **options):
    """Adds the examples of a batch to those there are."""
    batched = [dim is not None for dim in dims]
    arrays = [x if dim is None else jnp.moveaxis(x, dim, 0) for x, dim in zip(arrays, dims, strict=True)]
    size = next(len(x) for x, own in zip(arrays, batched, strict=True) if own)
    counts = [x.shape[own] for x, own in zip(arrays, batched, strict=True)]
    count = next((count for count in counts if count != 1), 1)

    def merge(x, own):
        if not own and len(x) == 1:
            return x  # shared by all
        x = x if own else x[None]
        return jnp.broadcast_to(x, (size, count, *x.shape[2:])).reshape(size * count, *x.shape[2:])

    y = _by_example_p.bind(*(merge(x, own) for x, own in zip(arrays, batched, strict=True)), **options)
    return y.reshape(size, count, *y.shape[1:]), 0


def _differentiate(primals, tangents, **options):
    varied = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]

    def run(*values):
        arrays = list(primals)
        for i, value in zip(varied, values, strict=True):
            arrays[i] = value
        return _run(*arrays, **options)

    return jax.jvp(run, [primals[i] for i in varied], [tangents[i] for i in varied])


def _abstract(*arrays, default, **_):
    return jax.typeof(jax.eval_shape(partial(_at_once, function=default), *arrays))


_by_example_p = Primitive("by_example")
_by_example_p.def_impl(_run)
_by_example_p.def_abstract_eval(_abstract)
mlir.register_lowering(_by_example_p, mlir.lower_fun(_run, multiple_results=False))
batching.primitive_batchers[_by_example_p] = _batch
ad.primitive_jvps[_by_example_p] = _differentiate
