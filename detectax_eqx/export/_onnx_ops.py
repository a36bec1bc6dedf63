"""What ONNX has operators for, in place of this package's own forms, and how these become a graph.

Suppression and RoIAlign are functions written in ONNX, in its text syntax. While JAX traces a model they are primitives
that are known by their shapes alone; jax2onnx makes a call of each, and `with_functions` puts the function there.
"""
# pyright: reportMissingImports=false

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.custom_batching import custom_vmap
from jax.extend.core import Primitive
from jaxtyping import Array, Bool, Float, Int

from ..models import box_detections, dense_detections, propose
from ..models._box_head import _linear
from ..models._chunks import map_chunks
from ..nn import conv2d, max_pool2d, relu
from ..nn._fpn import _upsample_nearest
from ..ops import RoIFeatures, nms_indices, resize_image
from ..ops._nms import _comparable
from ..ops._roi_align import _levels


DOMAIN, OPSET = "detectax_eqx", 18


def _logistic(x: Array, **_: Any) -> Array:
    return 1 / (1 + jnp.exp(-x))


# Primitives that a runtime's own operator computes too roughly. onnxruntime's Sigmoid is off by 1e-7 in absolute terms
# and not monotonic: below a logit of -10, where a sure detector has most of its proposals, it swaps their ranks, and
# suppression then keeps others.
REWRITES = {"logistic": _logistic}

_call_p = Primitive("onnx_call")
_call_p.multiple_results = True
_call_p.def_abstract_eval(lambda *operands, function, results: [ShapedArray(*result) for result in results])


@cache
def register_calls() -> None:
    """Teaches jax2onnx that a call becomes a node of that name in this package's domain."""
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


class Substitutes:
    """The functions to put in place of others while a model is traced, and the text of the ONNX functions they call."""

    def __init__(self, num_classes: int):
        self.functions: dict[str, str] = {}
        self.num_classes = num_classes
        self.table: dict[Callable[..., Any], Callable[..., Any]] = {
            conv2d: self._conv2d,
            relu: self._relu,
            _linear: one_by_one(self._linear),
            max_pool2d: self._max_pool2d,
            _upsample_nearest: self._upsample_nearest,
            map_chunks: one_by_one(_map_all),
            RoIFeatures.pool: one_by_one(self._pool),
            resize_image: one_by_one(inspect.unwrap(resize_image)),
            propose: one_by_one(inspect.unwrap(propose)),
            box_detections: one_by_one(inspect.unwrap(box_detections)),
            dense_detections: one_by_one(inspect.unwrap(dense_detections)),
            nms_indices: self._nms_indices,
        }

    def _call(
        self, text: str, operands: Sequence[Array], results: Sequence[tuple[tuple[int, ...], Any]]
    ) -> list[Array]:
        """A call of the ONNX function `text`, whose name is to be `NAME`; the same text is one function."""
        name = self.functions.setdefault(text, f"Function{len(self.functions)}")
        params = {"function": name, "results": tuple((shape, np.dtype(dtype)) for shape, dtype in results)}

        return _call_p.bind(*operands, **params)

    def _conv2d(
        self,
        x: Float[Array, "i h w"],
        weight: Float[Array, "o i kh kw"],
        bias: Float[Array, " o"] | None = None,
        *,
        stride: int = 1,
        padding: int = 0,
    ) -> Float[Array, "o h2 w2"]:
        parameters = {"w": weight} if bias is None else {"w": weight, "b": bias}
        line = f"y = Conv <strides = {_list(stride, 2)}, pads = {_list(padding, 4)}> (x, {', '.join(parameters)})"
        sides = _sides(x, weight.shape[2:], stride, padding)
        return self._on_images([line], x, (weight.shape[0], *sides), **parameters)

    def _max_pool2d(
        self, x: Float[Array, "c h w"], *, kernel_size: int, stride: int, padding: int = 0
    ) -> Float[Array, "c h2 w2"]:
        options = f"kernel_shape = {_list(kernel_size, 2)}, strides = {_list(stride, 2)}, pads = {_list(padding, 4)}"
        sides = _sides(x, (kernel_size, kernel_size), stride, padding)
        return self._on_images([f"y = MaxPool <{options}> (x)"], x, (x.shape[0], *sides))

    def _upsample_nearest(self, x: Float[Array, "c h w"]) -> Float[Array, "c 2*h 2*w"]:
        options = 'mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"'
        scales = "scales = Constant <value_floats = [1.0, 1.0, 2.0, 2.0]> ()"
        return self._on_images(
            [scales, f"y = Resize <{options}> (x, , scales)"], x, (x.shape[0], 2 * x.shape[1], 2 * x.shape[2])
        )

    def _relu(self, x: Float[Array, "*s"]) -> Float[Array, "*s"]:
        return self._on_images(["y = Relu (x)"], x, x.shape)

    def _linear(self, layer: eqx.nn.Linear, x: Float[Array, "n i"]) -> Float[Array, "n o"]:
        weight, bias = layer.weight, layer.bias
        assert bias is not None
        text = _function(["x", "w", "b"], ["y"], ["y = Gemm <transB = 1> (x, w, b)"])
        return self._call(text, [x, weight, bias], [((x.shape[0], weight.shape[0]), x.dtype)])[0]

    def _on_images(self, lines: Sequence[str], x: Array, shape: tuple[int, ...], **parameters: Array) -> Array:
        """The result `y`, of `shape`, of lines of ONNX for an image `x`; of a batch under `vmap`."""
        text = _function(["x", *parameters], ["y"], lines)

        def batched(x):
            return self._call(text, [x, *parameters.values()], [((x.shape[0], *shape), x.dtype)])[0]

        mapped = custom_vmap(lambda x: batched(x[None])[0])

        mapped.def_vmap(lambda axis_size, in_batched, x: (batched(x), True))
        return mapped(x)

    def _pool(
        self, rois: RoIFeatures, boxes: Float[Array, "n 4"], *, output_size: int | tuple[int, int]
    ) -> Float[Array, "n c p q"]:
        rows, columns = (output_size, output_size) if isinstance(output_size, int) else output_size
        features, strides, sampling_ratio, aligned = rois.maps, rois.strides, rois.sampling_ratio, rois.aligned
        first = strides[0].bit_length() - 1
        last = first + len(strides) - 1
        level = _levels(boxes, first, last, rois.canonical_size, rois.canonical_level) - first
        mode = "half_pixel" if aligned else "output_half_pixel"
        lines = ["minus = Constant <value_ints = [-1]> ()", "first = Constant <value_ints = [0]> ()"]
        for k, stride in enumerate(strides):
            lines += [
                f"level{k} = Constant <value = int32 {{{k}}}> ()",
                f"here{k} = Equal (level, level{k})",
                f"found{k} = NonZero (here{k})",
                f"rows{k} = Reshape (found{k}, minus)",
                f"boxes{k} = Gather (boxes, rows{k})",
                f"images{k} = Sub (rows{k}, rows{k})",
                f"maps{k} = Unsqueeze (features{k}, first)",
                f'pooled{k} = RoiAlign <mode = "avg", output_height = {rows}, output_width = {columns}, '
                f"sampling_ratio = {sampling_ratio}, spatial_scale = {1 / stride!r}, "
                f'coordinate_transformation_mode = "{mode}"> (maps{k}, boxes{k}, images{k})',
            ]
        maps = [f"features{k}" for k in range(len(strides))]
        rows_of, pooled = ([f"{name}{k}" for k in range(len(strides))] for name in ("rows", "pooled"))
        # Rows were taken level by level: a sort of their positions puts them back.
        lines += [
            f"order = Concat <axis = 0> ({', '.join(rows_of)})",
            f"all = Concat <axis = 0> ({', '.join(pooled)})",
            "count = Shape (order)",
            "sorted, place = TopK <largest = 0> (order, count)",
            "result = Gather (all, place)",
        ]
        text = _function(["boxes", "level", *maps], ["result"], lines)
        results = [((boxes.shape[0], features[0].shape[0], rows, columns), np.float32)]
        return self._call(text, [boxes, level, *features], results)[0]

    def _nms_indices(
        self,
        boxes: Float[Array, "n 4"],
        scores: Float[Array, " n"],
        valid: Bool[Array, " n"] | None = None,
        *,
        iou_threshold: float,
        max_outputs: int,
        labels: Int[Array, " n"] | None = None,
    ) -> tuple[Int[Array, " m"], Bool[Array, " m"]]:
        threshold = float(_comparable(iou_threshold, boxes))
        finite = ~jnp.isnan(scores)
        valid = finite if valid is None else valid & finite
        lines = [
            "minus = Constant <value_ints = [-1]> ()",
            "zero = Constant <value_ints = [0]> ()",
            "two = Constant <value_ints = [2]> ()",
            f"most = Constant <value_ints = [{max_outputs}]> ()",
            f"threshold = Constant <value = float {{{threshold!r}}}> ()",
            # Only the valid rows are looked at, as many as there are.
            "found = NonZero (valid)",
            "rows = Reshape (found, minus)",
            "some_boxes = Gather (boxes, rows)",
            "some_scores = Gather (scores, rows)",
            "one_boxes = Unsqueeze (some_boxes, zero)",
        ]
        if labels is None:
            lines += ["both = Constant <value_ints = [0, 1]> ()", "class_scores = Unsqueeze (some_scores, both)"]
        else:
            # A class at a time, in which rows of other classes are below every score.
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
            # A score is at least 0, and has to exceed the threshold.
            "above = Constant <value = float {-0.5}> ()",
            "selected = NonMaxSuppression (one_boxes, class_scores, count, threshold, above)",
            "column = Gather <axis = 1> (selected, two)",
            "unordered = Reshape (column, minus)",
            # Best first, and of equals the earlier row: sorted by row, then by score.
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
    """`function`, which under `vmap` is called for one example after the other: jax2onnx's gathers have no batch."""

    def call(*arguments, **options):
        arrays, static = eqx.partition((arguments, options), eqx.is_array)

        def one(arrays):
            arguments, options = eqx.combine(arrays, static)
            return function(*arguments, **options)

        mapped = custom_vmap(one)

        @mapped.def_vmap
        def _(axis_size, in_batched, arrays):
            each = [
                one(jax.tree.map(lambda x, batched, i=i: x[i] if batched else x, arrays, in_batched[0]))
                for i in range(axis_size)
            ]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
            return stacked, jax.tree.map(lambda _: True, stacked)

        return mapped(arrays)

    return call


def _list(value: int, count: int) -> str:
    return str([value] * count)


def _sides(x: Array, kernel: tuple[int, ...], stride: int, padding: int) -> tuple[int, ...]:
    """Height and width of what a window makes of an image."""
    return tuple((side + 2 * padding - k) // stride + 1 for side, k in zip(x.shape[1:], kernel, strict=True))


def _map_all(function, rows, count, *, chunk_size, kept):
    return function(*rows)


def _function(inputs: Sequence[str], outputs: Sequence[str], lines: Sequence[str]) -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return (
        f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n'
        f"NAME ({', '.join(inputs)}) => ({', '.join(outputs)}) {{\n{body}\n}}"
    )


def with_functions(proto: Any, functions: dict[str, str]) -> Any:
    """The `onnx.ModelProto` with the functions put in the place of their calls."""
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
        node.name = f"{node.op_type}_{i}"  # what was put in has none
    kept = [opset for opset in proto.opset_import if opset.domain != DOMAIN]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)
    return proto
