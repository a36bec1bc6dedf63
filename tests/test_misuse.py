"""Every public function rejects arrays of a wrong shape or dtype, and options out of range, by name, uncompiled.

The tables in misuse_cases.py hold a valid call of each function. Wrong calls are derived from it for every array, by
the array's own annotation: an extra axis, a fixed axis of another length, an axis whose length contradicts an earlier
argument, and a wrong dtype.
"""

import inspect
import re
from dataclasses import replace
from functools import partial
from types import FunctionType
from typing import Any, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detectax_eqx import Batch, Images, Targets, evaluate, ops

from .misuse_cases import (
    BOXES,
    DETECTIONS,
    ELSEWHERE,
    F32,
    I32,
    OPS,
    OPTIONS,
    OTHERS,
    TREES,
    WITH_MODEL,
    Call,
    N,
    f32,
    tiny_model,
)


def _is_array(value):
    return isinstance(value, np.ndarray) or (
        isinstance(value, jax.Array) and not jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    )


def _arrays(call):
    """`name -> array` of a call, in order; for a list of arrays, its first."""
    named = {name: value[0] if isinstance(value, list) else value for name, value in call.named().items()}
    return {name: value for name, value in named.items() if _is_array(value)}


def _annotated(annotation):
    """The array types within an annotation."""
    if hasattr(annotation, "dim_str"):
        return [annotation]
    return [array_type for part in get_args(annotation) for array_type in _annotated(part)]


def _types(call, name):
    return _annotated(inspect.signature(call.function).parameters[name].annotation)


def _axes(call, name):
    return _types(call, name)[0].dim_str.split()


def _like(array, changed):
    return jnp.asarray(changed) if isinstance(array, jax.Array) else changed


def _added_axis(array):
    return _like(array, np.asarray(array)[None])


def _longer(array, axis):
    """The array with the last entry of an axis repeated."""
    values = np.asarray(array)
    return _like(array, np.concatenate([values, values.take([-1], axis)], axis))


def _cast(array, dtype):
    return _like(array, np.asarray(array).astype(dtype))


def _wrong_arrays(call):
    """Yields `(argument, what is wrong, change that makes it so, axis that contradicts an earlier argument)`."""
    known = set()
    for name, array in _arrays(call).items():
        axes, members = _axes(call, name), _types(call, name)
        variadic = {axis for axis in axes if axis.startswith("*")}
        if variadic <= known:
            yield name, "added axis", _added_axis, None
        for position, axis in enumerate(axes, start=-len(axes)):
            if axis.isdecimal():
                yield name, f"axis {axis} longer", partial(_longer, axis=position), None
            elif axis in known - variadic:
                yield name, f"axis {axis} longer than before", partial(_longer, axis=position), axis
        for dtype in (np.complex64, np.bool_, np.int32, np.float32):
            # Complex numbers are wrong everywhere, whatever the annotation says.
            if dtype is np.complex64 or not any(isinstance(_cast(array, dtype), member) for member in members):
                yield name, np.dtype(dtype).name, partial(_cast, dtype=dtype), None
        known |= set(axes)


def _wrong_calls(calls):
    for one in calls:
        for name, what, change, axis in _wrong_arrays(one):
            named = one.named()
            value = named[name]
            named[name] = [change(array) for array in value] if isinstance(value, list) else change(value)
            yield pytest.param(one.function, named, name, axis, id=f"{one.function.__name__}-{name}-{what}")


def _check_refused(function, named, name, axis):
    signature = inspect.signature(function)
    bound = inspect.BoundArguments(signature, named)
    with pytest.raises(TypeError, match=rf"parameter '{name}'") as caught:
        function(*bound.args, **bound.kwargs)
    if axis is not None:
        assert re.search(rf"\b{axis}=", str(caught.value)), "the message does not name the axis"


def test_every_op_is_in_the_table():
    public = {value for name, value in vars(ops).items() if isinstance(value, FunctionType) and name[0] != "_"}
    assert public == {one.function for one in OPS}
    assert all(_arrays(one) for one in OPS if one.function not in (ops.anchor_grid, ops.resized_size))


@pytest.mark.parametrize("module", ELSEWHERE, ids=lambda module: module.__name__)
def test_every_function_is_in_a_table(module):
    public = {
        name
        for name, value in vars(module).items()
        if isinstance(value, FunctionType) and name[0] != "_" and value.__module__.startswith(module.__name__)
    }
    functions = {one.function for one in OTHERS} | set(WITH_MODEL) | {function for function, *_ in OPTIONS}
    covered = {name for name in public if getattr(module, name) in functions}
    assert public - covered == ELSEWHERE[module]


@pytest.mark.parametrize("one", OPS + TREES, ids=lambda one: one.function.__name__)
def test_valid_calls(one):
    """Calls are only traced, so that nothing compiles."""
    jax.eval_shape(lambda: jax.tree.map(jnp.asarray, one.function(*one.arguments, **one.options)))


@pytest.mark.parametrize("function, named, name, axis", list(_wrong_calls(OPS + TREES + OTHERS)))
def test_wrong_arrays(function, named, name, axis):
    _check_refused(function, named, name, axis)


@pytest.mark.parametrize("function", WITH_MODEL, ids=lambda function: function.__name__)
def test_wrong_arrays_with_a_model(function):
    one = WITH_MODEL[function](tiny_model())
    one = one._replace(arguments=tuple(jnp.asarray(x) if _is_array(x) else x for x in one.arguments))
    cases = [case.values for case in _wrong_calls([one])]
    assert len(cases) >= 6
    for case in cases:
        _check_refused(*case)


@pytest.mark.parametrize("change", [_added_axis, partial(_cast, dtype=np.float16), partial(_cast, dtype=np.complex64)])
def test_one_wrong_map(change):
    """The type checker checks only one of the maps in a list; the others have to agree with it."""
    for maps in ([f32(1, 8, 8), change(f32(1, 4, 4))], [change(f32(1, 8, 8)), f32(1, 4, 4)]):
        with pytest.raises((TypeError, ValueError), match="features"):
            ops.multilevel_roi_align(maps, BOXES, output_size=2, strides=(4, 8))


def test_wrong_batch():
    """Images, targets and every other field have to share one batch axis."""
    ones, sizes = np.ones(2, I32), np.ones((2, 2), I32)
    targets = Targets(np.zeros((2, N, 4), F32), np.zeros((2, N), I32), np.zeros((2, N), bool))
    images = Images(np.zeros((2, 8, 8, 3), np.uint8), sizes, sizes, ones, ones > 0, canvas=(8, 8))
    Batch(images, targets, overflow=ones)
    for wrong in ({"overflow": ones[:1]}, {"targets": jax.tree.map(lambda x: x[:1], targets)}):
        with pytest.raises(ValueError, match=r"must have the same batch axes, got \(2,\), \([12],\) and \([12],\)"):
            Batch(**({"images": images, "targets": targets, "overflow": ones} | wrong))
    for name in ("sizes", "original_sizes", "indices", "valid"):
        with pytest.raises(TypeError, match=f"parameter '{name}'"):
            replace(images, **{name: getattr(images, name)[:1]})
    with pytest.raises(TypeError, match="parameter 'pixels'"):
        replace(images, pixels=np.zeros((2, 8, 8, 3), F32))


def test_wrong_results():
    sizes, ones = np.full((1, 2), 8, I32), np.ones(1, I32)
    images = Images(np.zeros((1, 8, 8, 3), np.uint8), sizes, sizes, ones, ones > 0, canvas=(8, 8))
    batched = jax.tree.map(lambda x: x[None], DETECTIONS)
    valid: dict[str, Any] = {"image_ids": [1, 2], "category_ids": [3, 4]}
    assert len(evaluate.to_coco_results(batched, images, **valid)) == N
    with pytest.raises(ValueError, match=r"detections and images .* boxes \(3, 4\)"):
        evaluate.to_coco_results(DETECTIONS, images, **valid)
    for name in valid:
        short: dict[str, Any] = valid | {name: [1]}
        with pytest.raises(ValueError, match=f"{name} has 1"):
            evaluate.to_coco_results(batched, images, **short)


def _case(function):
    return next(one for one in OPS + OTHERS if one.function is function)


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case[0].__name__}-{case[1]}-{case[2]}") for case in OPTIONS])
def test_bad_options(case):
    function, option, value, *rest = case
    one = rest[0] if rest else _case(function)
    one = one if isinstance(one, Call) else one()
    bound = inspect.BoundArguments(inspect.signature(function), one.named())
    bound.arguments[option] = value
    order = list(bound.signature.parameters)
    bound.arguments = {name: bound.arguments[name] for name in sorted(bound.arguments, key=order.index)}
    words = option.replace("_", "[_ ]")
    shown = "(, |×)".join(re.escape(str(part)) for part in (value if isinstance(value, list | tuple) else [value]))
    with pytest.raises(ValueError, match=rf"(?s)(?=.*\b{words})(?=.*{shown})"):
        _run(function, bound)


def _run(function, bound):
    """Numbers are checked when a function is traced, or when it is called if it runs on the host."""
    if function.__module__.startswith(("detectax_eqx.data", "detectax_eqx.draw", "detectax_eqx.evaluate")):
        result = function(*bound.args, **bound.kwargs)
        return list(result) if inspect.isgenerator(result) else result
    return jax.eval_shape(lambda: eqx.filter(function(*bound.args, **bound.kwargs), eqx.is_array))
