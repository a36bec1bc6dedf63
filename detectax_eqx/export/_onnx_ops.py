"""ONNX operators that replace named calls and primitives, and their conversion to a graph.

NMS and RoIAlign are functions in ONNX's text syntax. In a traced program each is a primitive that declares only the
shapes and dtypes of its results. jax2onnx converts the primitive to a call, and `with_functions` inlines the function.
"""
# pyright: reportMissingImports=false

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray, Tracer
from jax.custom_batching import custom_vmap
from jax.extend.core import Primitive
from jaxtyping import Array


# An array in a traced program, or a constant.
Operand = Any
DOMAIN, OPSET = "detectax_eqx", 18


_call_p = Primitive("onnx_call")
_call_p.multiple_results = True
_call_p.def_abstract_eval(lambda *operands, function, results: [ShapedArray(*result) for result in results])


@cache
def register_calls() -> None:
    """Registers a jax2onnx plugin that converts each call to a node of that name in this package's domain."""
    from jax2onnx.plugins.plugin_system import PrimitiveLeafPlugin, register_primitive

    @register_primitive(jaxpr_primitive=_call_p.name)
    class _Call(PrimitiveLeafPlugin):
        def lower(self, ctx: Any, eqn: Any) -> None:
            operands = [ctx.get_value_for_var(var) for var in eqn.invars]
            results = [ctx.get_value_for_var(var) for var in eqn.outvars]
            names = [result.name for result in results]
            calls = getattr(ctx.builder, eqn.params["function"])(*operands, _domain=DOMAIN, _outputs=names)
            for var, result, call in zip(eqn.outvars, results, [calls] if len(names) == 1 else calls, strict=True):
                call.type, call.shape = result.type, result.shape
                ctx.bind_value_for_var(var, call)


class Operators:
    """ONNX operators for the named calls and primitives of a program, and the text of the functions that they call."""

    def __init__(self, num_classes: int):
        self.functions: dict[str, str] = {}
        self.num_classes = num_classes
        # Replacements of named calls, for one example.
        self.calls: dict[str, Callable[..., Any]] = {
            "nms_indices": one_by_one(self._nms_indices),
            "roi_align": one_by_one(self._roi_align),
            "upsample_nearest": self._upsample_nearest,
            "layer_norm": self._layer_norm,
            "silu": self._silu,
            "gather": one_by_one(lax.gather_p.bind),  # jax2onnx does not support a batched gather
            "dynamic_slice": one_by_one(lax.dynamic_slice_p.bind),
        }
        # Replacements of primitives, for a batch.
        self.primitives: dict[str, Callable[..., Any]] = {
            "convolve": self._convolve,
            "dot_general": self._dot_general,
            "reduce_window_max": self._max_pool,
            "max": self._max,
            "logistic": _logistic,
        }

    def _call(
        self, text: str, operands: Sequence[Operand], results: Sequence[tuple[tuple[int, ...], Any]]
    ) -> list[Array]:
        """Calls the ONNX function `text`, which must be named `NAME`. Calls with the same text share one function."""
        name = self.functions.setdefault(text, f"Function{len(self.functions)}")
        params = {"function": name, "results": tuple((shape, np.dtype(dtype)) for shape, dtype in results)}

        return _call_p.bind(*operands, **params)

    def _convolve(self, x: Operand, weight: Operand, *bias: Operand, stride: int, padding: int) -> Array:
        """Convolves maps `(n, i, h, w)` with a weight `(o, i, kh, kw)`."""
        names = ["x", "w", "b"][: 2 + len(bias)]
        line = f"y = Conv <strides = {_list(stride, 2)}, pads = {_list(padding, 4)}> ({', '.join(names)})"
        sides = [(side + 2 * padding - k) // stride + 1 for side, k in zip(x.shape[2:], weight.shape[2:], strict=True)]
        return self._operator([line], [x, weight, *bias], names, (len(x), len(weight), *sides))

    def _dot_general(self, x: Operand, y: Operand, *, dimension_numbers: Any, **options: Any) -> Array:
        """Converts a linear layer, `(…, i)` times `(o, i)` or a constant `(…, i)`, to one Gemm operator."""
        last = ((x.ndim - 1,), (y.ndim - 1,))
        rewritten = y.ndim == 2 or (y.ndim > 2 and not isinstance(y, Tracer))
        if dimension_numbers != (last, ((), ())) or x.ndim < 2 or not rewritten:
            return lax.dot_general_p.bind(x, y, dimension_numbers=dimension_numbers, **options)
        rows = x.reshape(-1, x.shape[-1])  # (n, i)
        weight = y if y.ndim == 2 else np.asarray(y).reshape(-1, y.shape[-1])  # (o, i)
        line, shape = "z = Gemm <transB = 1> (x, y)", (len(rows), len(weight))
        product = self._operator([line], [rows, weight], ["x", "y"], shape)
        return product.reshape(*x.shape[:-1], *y.shape[:-1])

    def _max_pool(self, x: Operand, *, window_dimensions: Any, window_strides: Any, padding: Any, **_: Any) -> Array:
        """Max pooling over the last two axes."""
        pads = [low for low, _ in padding[-2:]] + [high for _, high in padding[-2:]]
        kernel, strides = list(window_dimensions[-2:]), list(window_strides[-2:])
        sides = [(side + pads[i] + pads[i + 2] - kernel[i]) // strides[i] + 1 for i, side in enumerate(x.shape[-2:])]
        maps = x.reshape(-1, *x.shape[-3:])  # (n, c, h, w)
        line = f"y = MaxPool <kernel_shape = {kernel}, strides = {strides}, pads = {pads}> (x)"
        pooled = self._operator([line], [maps], ["x"], (*maps.shape[:2], *sides))
        return pooled.reshape(*x.shape[:-2], *sides)

    def _max(self, x: Operand, y: Operand) -> Array:
        """Converts `max(x, 0)` to Relu, which runtimes fuse with the preceding operator."""
        if isinstance(y, Tracer) or np.ndim(y) or y != 0:
            return lax.max_p.bind(x, y)
        return self._operator(["y = Relu (x)"], [x], ["x"], x.shape)

    def _upsample_nearest(self, x: Operand) -> Array:
        """Nearest-neighbour upsampling of a map `(c, h, w)` by 2."""
        options = 'mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"'
        lines = [
            "scales = Constant <value_floats = [1.0, 1.0, 2.0, 2.0]> ()",
            f"y = Resize <{options}> (x, , scales)",
        ]

        def batched(x):
            return self._operator(lines, [x], ["x"], (*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]))

        mapped = custom_vmap(lambda x: batched(x[None])[0])
        mapped.def_vmap(lambda axis_size, in_batched, x: (batched(x), True))
        return mapped(x)

    def _layer_norm(self, x: Operand, weight: Operand, bias: Operand, *, epsilon: float, axis: int) -> Array:
        """Layer normalisation along the last axis of tokens `(…, c)`, or along the third last of maps `(…, c, h, w)`.

        One operator, which computes its mean and variance in float32 also where the rest is float16.
        """
        options = f"axis = -1, epsilon = {epsilon!r}"
        if weight.dtype == x.dtype:
            lines = [f"y = LayerNormalization <{options}> (x, weight, bias)"]
        else:  # the operator takes one type
            lines = [
                "w = CastLike (weight, x)",
                "b = CastLike (bias, x)",
                f"y = LayerNormalization <{options}> (x, w, b)",
            ]

        def batched(x):
            last = jnp.moveaxis(x, axis, -1)
            y = self._operator(lines, [last, weight, bias], ["x", "weight", "bias"], last.shape)
            return jnp.moveaxis(y, -1, axis)

        mapped = custom_vmap(batched)
        mapped.def_vmap(lambda axis_size, in_batched, x: (batched(x), True))
        return mapped(x)

    def _silu(self, x: Operand) -> Array:
        """`x σ(x)` as one call: jax2onnx moves transpositions past one of its two factors only."""

        def batched(x):
            return self._operator(["s = Sigmoid (x)", "y = Mul (x, s)"], [x], ["x"], x.shape)

        mapped = custom_vmap(batched)
        mapped.def_vmap(lambda axis_size, in_batched, x: (batched(x), True))
        return mapped(x)

    def _operator(
        self, lines: Sequence[str], operands: Sequence[Operand], names: Sequence[str], shape: tuple[int, ...]
    ) -> Array:
        """Evaluates lines of ONNX on named operands. The last line defines the result, which has shape `shape`."""
        text = _function(names, [lines[-1].split(" = ")[0]], lines)
        return self._call(text, operands, [(shape, operands[0].dtype)])[0]

    def _roi_align(
        self,
        *operands: Operand,
        scales: Sequence[float],
        output_size: tuple[int, int],
        sampling_ratio: int,
        aligned: bool,
    ) -> Array:
        *features, _, boxes, level = operands  # the skipped operand holds the same features as cells
        rows, columns = output_size
        mode = "half_pixel" if aligned else "output_half_pixel"
        lines = ["minus = Constant <value_ints = [-1]> ()", "first = Constant <value_ints = [0]> ()"]
        for k, scale in enumerate(scales):
            lines += [
                f"level{k} = Constant <value = int32 {{{k}}}> ()",
                f"here{k} = Equal (level, level{k})",
                f"found{k} = NonZero (here{k})",
                f"rows{k} = Reshape (found{k}, minus)",
                f"boxes{k} = Gather (boxes, rows{k})",
                f"images{k} = Sub (rows{k}, rows{k})",
                f"wide{k} = CastLike (features{k}, boxes)",  # the operator takes one type
                f"maps{k} = Unsqueeze (wide{k}, first)",
                f'pooled{k} = RoiAlign <mode = "avg", output_height = {rows}, output_width = {columns}, '
                f"sampling_ratio = {sampling_ratio}, spatial_scale = {scale!r}, "
                f'coordinate_transformation_mode = "{mode}"> (maps{k}, boxes{k}, images{k})',
            ]
        maps = [f"features{k}" for k in range(len(scales))]
        rows_of, pooled = ([f"{name}{k}" for k in range(len(scales))] for name in ("rows", "pooled"))
        # The pooled rows are grouped by level. Sorting their positions restores the original order.
        lines += [
            f"order = Concat <axis = 0> ({', '.join(rows_of)})",
            f"all = Concat <axis = 0> ({', '.join(pooled)})",
            "count = Shape (order)",
            "sorted, place = TopK <largest = 0> (order, count)",
            "ordered = Gather (all, place)",
            "result = CastLike (ordered, features0)",
        ]
        text = _function(["boxes", "level", *maps], ["result"], lines)
        results = [((boxes.shape[0], features[0].shape[0], rows, columns), features[0].dtype)]
        return self._call(text, [boxes, level, *features], results)[0]

    def _nms_indices(
        self, boxes: Operand, scores: Operand, *rest: Operand, iou_threshold: float, max_outputs: int
    ) -> tuple[Array, Array]:
        """NMS as an ONNX function. `rest` holds the labels, the validity, or both."""
        labels = next((x for x in rest if x.dtype != bool), None)
        valid = ~jnp.isnan(scores)
        for given in (x for x in rest if x.dtype == bool):
            valid = valid & given
        lines = [
            "minus = Constant <value_ints = [-1]> ()",
            "zero = Constant <value_ints = [0]> ()",
            "two = Constant <value_ints = [2]> ()",
            f"most = Constant <value_ints = [{max_outputs}]> ()",
            f"threshold = Constant <value = float {{{iou_threshold!r}}}> ()",
            # Only the valid rows are considered.
            "found = NonZero (valid)",
            "rows = Reshape (found, minus)",
            "some_boxes = Gather (boxes, rows)",
            "some_scores = Gather (scores, rows)",
            "one_boxes = Unsqueeze (some_boxes, zero)",
        ]
        if labels is None:
            lines += ["both = Constant <value_ints = [0, 1]> ()", "class_scores = Unsqueeze (some_scores, both)"]
        else:
            # One row of scores per class. Boxes of other classes get a score below all valid scores.
            lines += [
                f"classes = Constant <value = int32[{self.num_classes},1] "
                f"{{{', '.join(map(str, range(self.num_classes)))}}}> ()",
                "some_labels = Gather (labels, rows)",
                "same = Equal (some_labels, classes)",
                "lowest = Constant <value = float {-1.0}> ()",
                "scores_where = Where (same, some_scores, lowest)",
                "class_scores = Unsqueeze (scores_where, zero)",
            ]
        lines += [
            "count = Shape (rows)",
            # NonMaxSuppression keeps scores that exceed its threshold. Valid scores are at least 0.
            "above = Constant <value = float {-0.5}> ()",
            "selected = NonMaxSuppression (one_boxes, class_scores, count, threshold, above)",
            "column = Gather <axis = 1> (selected, two)",
            "unordered = Reshape (column, minus)",
            # Highest score first, ties by row: sorted by row, then by score.
            "kept = Shape (unordered)",
            "by_row, ignored = TopK <largest = 0> (unordered, kept)",
            "kept_scores = Gather (some_scores, by_row)",
            "few = Min (kept, most)",
            "best, place = TopK (kept_scores, few)",
            "chosen = Gather (by_row, place)",
            "wide = Gather (rows, chosen)",
            "missing = Sub (most, few)",
            "pads = Concat <axis = 0> (zero, missing)",
            "padded = Pad (wide, pads)",
            "indices = Cast <to = 6> (padded)",
            "start = Constant <value = int64 {0}> ()",
            "step = Constant <value = int64 {1}> ()",
            f"stop = Constant <value = int64 {{{max_outputs}}}> ()",
            "positions = Range (start, stop, step)",
            "keep = Less (positions, few)",
        ]
        operands = [boxes, scores, valid] if labels is None else [boxes, scores, valid, labels.astype(jnp.int32)]
        names = ["boxes", "scores", "valid", "labels"][: len(operands)]
        text = _function(names, ["indices", "keep"], lines)
        indices, keep = self._call(text, operands, [((max_outputs,), np.int32), ((max_outputs,), np.bool_)])
        return indices, keep


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `function` of arrays and options so that `vmap` calls it once per example and stacks the results."""

    def call(*arrays: Operand, **options: Any) -> Any:
        mapped = custom_vmap(lambda *arrays: function(*arrays, **options))

        @mapped.def_vmap
        def _(axis_size, in_batched, *arrays):
            each = [
                function(*(x[i] if batched else x for x, batched in zip(arrays, in_batched, strict=True)), **options)
                for i in range(axis_size)
            ]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
            return stacked, jax.tree.map(lambda _: True, stacked)

        return mapped(*arrays)

    return call


def _logistic(x: Operand, **_: Any) -> Array:
    """A sigmoid without onnxruntime's Sigmoid, which has an absolute error of 1e-7 and is not monotonic.

    Below a logit of -10, where a confident detector has most of its proposals, it changes the order of their scores, so
    NMS keeps different boxes.
    """
    return 1 / (1 + jnp.exp(-x))


def _list(value: int, count: int) -> str:
    return str([value] * count)


def _function(inputs: Sequence[str], outputs: Sequence[str], lines: Sequence[str]) -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return (
        f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n'
        f"NAME ({', '.join(inputs)}) => ({', '.join(outputs)}) {{\n{body}\n}}"
    )


def with_functions(proto: Any, functions: dict[str, str]) -> Any:
    """Inlines the functions into an `onnx.ModelProto`, in place of their calls."""
    import onnx.helper
    import onnx.inliner
    import onnx.parser

    del proto.functions[:]
    for text, name in functions.items():
        proto.functions.append(onnx.parser.parse_function(text.replace("NAME", name, 1)))
    if all(opset.domain != DOMAIN for opset in proto.opset_import):
        proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    proto = onnx.inliner.inline_local_functions(proto)
    for i, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type}_{i}"  # inlined nodes have no names
    opsets = [opset for opset in proto.opset_import if opset.domain != DOMAIN]
    del proto.opset_import[:]
    proto.opset_import.extend(opsets)
    return proto
