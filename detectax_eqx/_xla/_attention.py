"""Attention that holds the logits of few heads at a time.

It is a primitive, so that `vmap` adds its examples to the sets, which are computed one after another.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from ._plain import by_platform, is_plain
from ._varying import varying_like


# Above these numbers of logits, heads are computed one after another: those of a set on CPU, and of all sets elsewhere.
MAX_LOGITS, MAX_LOGITS_ELSEWHERE = 2**22, 2**25


def attend(
    attention: Callable[..., Array],
    q: Float[Array, "g a n d"],
    k: Float[Array, "g a m d"],
    v: Float[Array, "g a m d"],
    biases: Sequence[Float[Array, "_ _ _ _ _"]],
) -> Float[Array, "g a n d"]:
    """Computes `attention(q, k, v, biases)`, which must be `softmax(q kᵀ + sum of biases) v`.

    - `biases`: arrays that broadcast to the logits as `(g, a, n, h, w)`, where `h w = m`.
    """
    arrays = [x[None] for x in varying_like((q, k, v, *biases))]
    if is_plain("attention"):
        return _by_xla(*arrays, attention=attention)[0]
    return _attend_p.bind(*arrays, attention=attention)[0]


def _quotient(arrays):
    """Attention as a quotient of two sums over the keys: the gradient of the logits then needs none."""
    q, k, v, *biases = arrays
    dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    logits = jnp.einsum("sgand,sgamd->sganm", q, k).astype(dtype)
    if biases:
        height, width = (max(bias.shape[axis] for bias in biases) for axis in (4, 5))
        separate = logits.reshape(*logits.shape[:4], height, width)
        logits = sum((bias.astype(dtype) for bias in biases), separate).reshape(logits.shape)
    weights = jnp.exp(logits - lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    total = jnp.einsum("sganm,sgamd->sgand", weights.astype(v.dtype), v, preferred_element_type=dtype)
    return (total / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)


def _one_by_one(function: Callable, arrays: Sequence[Array], axis: int) -> Array:
    """Computes `function(arrays)` in a loop over an axis, whose length is 1 in arrays that all have in common."""
    own = [x.shape[axis] > 1 for x in arrays]
    if not any(own):
        return function(arrays)

    def one(parts):
        remaining = iter(parts)
        both = [jnp.expand_dims(next(remaining), axis) if mine else x for x, mine in zip(arrays, own, strict=True)]
        return function(both).squeeze(axis)

    parts = [jnp.moveaxis(x, axis, 0) for x, mine in zip(arrays, own, strict=True) if mine]
    return jnp.moveaxis(lax.map(one, parts), 0, axis)


def _num_logits(arrays):
    q, k = arrays[:2]
    return q.shape[1] * q.shape[2] * q.shape[3] * k.shape[3]  # g a n m


@partial(jax.jit, static_argnames="attention")
def _attend(*arrays, attention):
    def cpu(*arrays):
        if len(arrays[0]) * _num_logits(arrays) <= MAX_LOGITS:
            return _quotient(arrays)
        run = jax.checkpoint(_quotient)
        if _num_logits(arrays) > MAX_LOGITS:
            run = partial(_one_by_one, run, axis=2)
        return _one_by_one(run, arrays, axis=0)

    return by_platform(*arrays, cpu=cpu, default=partial(_by_xla, attention=attention), trick="attention")


def _by_xla(*arrays, attention):
    def run(arrays):
        axes = [0 if x.shape[0] > 1 else None for x in arrays]
        squeezed = [x if axis == 0 else x[0] for x, axis in zip(arrays, axes, strict=True)]

        def one(q, k, v, *biases):
            return attention(q, k, v, biases)

        return jax.vmap(one, axes)(*squeezed) if 0 in axes else one(*squeezed)[None]

    if arrays[0].shape[0] * _num_logits(arrays) > MAX_LOGITS_ELSEWHERE:
        return _one_by_one(jax.checkpoint(run), arrays, axis=2)
    return run(arrays)


def _batch(arrays, dims, **options):
    """Adds the examples of a batch to the sets."""
    arrays = [x if dim is None else jnp.moveaxis(x, dim, 0) for x, dim in zip(arrays, dims, strict=True)]
    batched = [dim is not None for dim in dims]
    size = next(len(x) for x, own in zip(arrays, batched, strict=True) if own)
    sets = max(x.shape[own] for x, own in zip(arrays, batched, strict=True))

    def merge(x, own, shared):
        if shared and not own and len(x) == 1:
            return x
        x = x if own else x[None]
        return jnp.broadcast_to(x, (size, sets, *x.shape[2:])).reshape(-1, *x.shape[2:])

    merged = [merge(x, own, shared=i >= 3) for i, (x, own) in enumerate(zip(arrays, batched, strict=True))]
    y = _attend_p.bind(*merged, **options)
    return y.reshape(size, sets, *y.shape[1:]), 0


def _differentiate(primals, tangents, **options):
    varied = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]

    def run(*values):
        arrays = list(primals)
        for i, value in zip(varied, values, strict=True):
            arrays[i] = value
        return _attend(*arrays, **options)

    return jax.jvp(run, [primals[i] for i in varied], [tangents[i] for i in varied])


_attend_p = Primitive("attend")
_attend_p.def_impl(_attend)
_attend_p.def_abstract_eval(lambda *arrays, **options: jax.typeof(jax.eval_shape(partial(_by_xla, **options), *arrays)))
mlir.register_lowering(_attend_p, mlir.lower_fun(_attend, multiple_results=False))
batching.primitive_batchers[_attend_p] = _batch
ad.primitive_jvps[_attend_p] = _differentiate
