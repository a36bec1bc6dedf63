"""Simplifies programs for export: folds frozen norms into convolutions, and folds constants."""

import ast
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax
from jax import lax
from jax.core import Tracer
from jax.extend import core

from .._xla import TRICKS, plain_operations
from ..nn import Conv2d, FrozenBatchNorm


Module = TypeVar("Module")

# Constants with more elements than this are not folded, since they would enlarge the file: the runtime computes them.
LARGEST_CONSTANT = 2**20
CONTROL_FLOW = ("scan", "while", "cond")


def fold_norms(model: Module) -> Module:
    """Returns a copy of `model` with each `FrozenBatchNorm` folded into the weight and bias of its convolution.

    Norms and convolutions are paired by field name, for example `norm1` with `conv1`, tuples `norms` with `convs`, and
    `output_norms` with `output`. Other norms depend on the image and are left unchanged.

    >>> import jax.numpy as jnp, jax.random as jr
    >>> from detectax_eqx.nn import resnet18
    >>> body = resnet18(key=jr.key(0), width=8)
    >>> folded, image = fold_norms(body), jnp.ones((3, 32, 32))
    >>> bool(jnp.allclose(body(image)[-1], folded(image)[-1], rtol=1e-4))
    True
    """

    def parts(model: Any) -> list[Any]:
        return [part for pair in _pairs(model) for part in pair]

    folded = [part for conv, norm in _pairs(model) for part in (_folded(conv, norm), eqx.nn.Identity())]
    return eqx.tree_at(parts, model, folded) if folded else model


def _pairs(node: Any) -> Iterator[tuple[Conv2d, FrozenBatchNorm]]:
    fields = vars(node) if isinstance(node, eqx.Module) else {}
    for name, child in fields.items():
        if isinstance(child, FrozenBatchNorm):
            yield fields[name.replace("norm", "conv")], child
        elif isinstance(child, tuple) and child and all(isinstance(norm, FrozenBatchNorm) for norm in child):
            convs = name.replace("norms", "convs")
            yield from zip(fields[convs if convs in fields else name.removesuffix("_norms")], child, strict=True)
    for child in node if isinstance(node, tuple) else fields.values():
        yield from _pairs(child)


def _folded(conv: Conv2d, norm: FrozenBatchNorm) -> Conv2d:
    # (w * x + b - mean) * scale + norm.bias = (w * scale) * x + shift
    scale = norm.weight * lax.rsqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    weight = conv.weight * scale[:, None, None, None]
    return eqx.tree_at(lambda c: (c.weight, c.bias), conv, (weight, shift), is_leaf=lambda leaf: leaf is None)


Rewrites = Mapping[str, Callable[..., Any]]


def trace(function: Callable[..., Any], *specs: Any) -> core.ClosedJaxpr:
    """Traces `function` to plain operations. A convolution and its bias become one operation, `convolve`."""
    with plain_operations([trick for trick in TRICKS if trick != "convolution"]):
        return jax.make_jaxpr(function)(*specs)


def fold_constants(jaxpr: core.ClosedJaxpr, *, rewrites: Rewrites | None = None) -> core.ClosedJaxpr:
    """Returns the same program with constants folded, unused operations removed and inner functions inlined.

    Most of the folded operations compute anchors. About a third of the operations remain, which matters for converters
    whose running time grows with their number.

    - `rewrites`: functions that replace operations outside loops and branches, by name. A replacement takes the
      operands and parameters of a primitive, or the operands and options of a named call (`_xla.named_call`).
    """

    def run(*arguments: Any) -> list[Any]:
        return _evaluate(jaxpr.jaxpr, jaxpr.consts, arguments, rewrites or {})

    return jax.make_jaxpr(run)(*jaxpr.in_avals)


def _size(aval: Any) -> int:
    return math.prod(aval.shape)


def _evaluate(jaxpr: core.Jaxpr, consts: Any, arguments: Any, rewrites: Rewrites) -> list[Any]:
    values: dict[core.Var, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
    for eqn in _needed(jaxpr):
        operands = [atom.val if isinstance(atom, core.Literal) else values[atom] for atom in eqn.invars]
        traced = any(isinstance(operand, Tracer) for operand in operands)
        if traced or any(_size(var.aval) > LARGEST_CONSTANT for var in eqn.outvars):
            results = _apply(eqn, operands, rewrites)
        else:
            with jax.ensure_compile_time_eval():
                results = _apply(eqn, operands, {})  # replacements have no values of their own
        values.update(zip(eqn.outvars, results, strict=True))
    return [atom.val if isinstance(atom, core.Literal) else values[atom] for atom in jaxpr.outvars]


def _needed(jaxpr: core.Jaxpr) -> list[Any]:
    """The operations that the results depend on.

    After rewriting, the operations that lay out features for `ops.roi_align` may be unused.
    """
    needed, eqns = {atom for atom in jaxpr.outvars if not isinstance(atom, core.Literal)}, []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(var in needed for var in eqn.outvars):
            needed.update(atom for atom in eqn.invars if not isinstance(atom, core.Literal))
            eqns.append(eqn)
    return eqns[::-1]


def _named(eqn: Any) -> tuple[str, dict[str, Any]]:
    """The name of an operation, and its parameters or, for a named call, its options."""
    called = eqn.params.get("name", "")
    if not called.endswith(")"):
        return eqn.primitive.name, eqn.params
    call = ast.parse(called, mode="eval").body
    assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
    return call.func.id, {option.arg: ast.literal_eval(option.value) for option in call.keywords if option.arg}


def _apply(eqn: Any, operands: list[Any], rewrites: Rewrites) -> list[Any]:
    name, options = _named(eqn)
    if name in rewrites:
        return jax.tree.leaves(rewrites[name](*operands, **options))
    if eqn.primitive.name not in CONTROL_FLOW:
        for inner in filter(None, map(eqn.params.get, ("jaxpr", "call_jaxpr", "call"))):
            return _evaluate(inner.jaxpr, inner.consts, operands, rewrites)
    results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return results if eqn.primitive.multiple_results else [results]
