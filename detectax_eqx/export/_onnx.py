"""Exports a detector to one ONNX file, and compares the file with the model before it is kept."""
# pyright: reportMissingImports=false

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from ..files import whole_file
from ..models import AbstractDetector, Selection
from ..nn import cast
from ..weights import named_leaves
from ._compare import HALF, SINGLE, UNMATCHED_SCORE, check_counts, compare_detections, name_of, valid_rows
from ._extras import quiet, require
from ._fold import fold_constants, fold_norms, trace
from ._program import Shape, about_model, checked_selection, detection_program, image_program


OUTPUTS: tuple[str, ...] = ("boxes", "scores", "labels", "valid", "masks", "mask_boxes")


def save_onnx(
    model: AbstractDetector,
    path: str | os.PathLike,
    *,
    shape: Shape,
    images: Sequence[UInt8[np.ndarray, "_ _ c"]],
    class_names: Sequence[str],
    selection: Selection | None = None,
    half: bool = False,
    unmatched_score: float = UNMATCHED_SCORE,
    image_names: Sequence[str] = (),
) -> None:
    """Writes a detector to an ONNX file, including resizing, NMS, RoIAlign and masks, using standard ONNX operators.

    The inputs are `images`, uint8 `(b, h, w, c)` padded to `shape.source` and RGB if c is 3, and `image_sizes`, their
    `(height, width)` as int32 `(b, 2)`. The outputs are `boxes`, `scores`, `labels`, `valid` and, if the model predicts
    them, `masks` and `mask_boxes`, as in `Detections`. The metadata of the file holds `class_names`, `shape`,
    `preprocessing` and `selection` as JSON.

    - `images`: real images. Before the file is kept, onnxruntime's detections in them are compared with the model's. A
      black image is added if the model detects nothing in it.
    - `selection`: which detections the file keeps; default `model.selection`, see `detection_program`.
    - `half`: convolutions and matrix products in float16; norms, softmax and boxes stay float32. The file is half as
      large. Its detections are compared with those of the model in float32: equal labels, boxes with an IoU of at
      least .5, and scores within .05, in all but a tenth of the detections in each image.
    - `unmatched_score`: the score up to which a detection of the file or of the model may be unmatched. Rounding
      differs between runtimes, and can move the overlap of two proposals, or the rank of one, across a threshold.
    - `image_names`: the names of the images in error messages; default their positions.

    The function needs the extra `onnx`. The mask head runs on all `max_detections` boxes, including invalid ones. The
    file is written atomically.

    Raises an `ExportError` if a detection differs by more than .05 pixels, 1e-4 in its score or .01 in its mask, or if
    a detection with a score above `unmatched_score` has no counterpart with its label and an IoU of at least .5. Raises
    a `ValueError` for a detector of keypoints, if the number of `class_names` differs from the model's number of
    classes, if an image does not fit, or if `unmatched_score` is not in 0..1. Raises an `ImportError` that names the
    extra if it is not installed.
    """
    require("onnx")
    import onnx

    metadata = about_model(model, class_names, selection) | {"shape": asdict(shape)}
    if not images:
        raise ValueError("images must hold at least one image to compare on.")
    if "keypoints" in model.needs:
        raise ValueError(
            f"model must not predict keypoints, got a {type(model).__name__}: the search for their maximum is a loop "
            "whose length depends on the box. Use save_stablehlo, which takes any detector."
        )
    proto = to_proto(model, shape, selection, half=half)
    onnx.helper.set_model_props(proto, {name: json.dumps(value) for name, value in metadata.items()})
    with whole_file(path) as temporary:
        onnx.save_model(proto, temporary)
        compare_onnx(
            model,
            temporary,
            shape=shape,
            images=images,
            selection=selection,
            half=half,
            unmatched_score=unmatched_score,
            image_names=image_names,
        )


def read_onnx(path: str | os.PathLike) -> tuple[Any, dict[str, Any]]:
    """Reads a file written by `save_onnx`. Returns the `onnx.ModelProto` and a dictionary of its metadata.

    The metadata holds `class_names`, `shape`, `preprocessing` and `selection`. The last two are dictionaries of the
    fields of the model's dataclasses.
    """
    require("onnx")
    import onnx

    proto = onnx.load(os.fspath(path))
    about = {entry.key: json.loads(entry.value) for entry in proto.metadata_props}
    sides = {name: tuple(about["shape"][name]) for name in ("source", "canvas")}
    shape = Shape(**about["shape"] | sides)
    return proto, about | {"shape": shape}


def to_proto(model: AbstractDetector, shape: Shape, selection: Selection | None, *, half: bool = False) -> Any:
    """Converts the detector to an `onnx.ModelProto`."""
    folded = fold_norms(model)
    folded = cast(folded, jnp.float16) if half else folded
    program = image_program(folded, shape, selection)
    specs = {
        "images": jax.ShapeDtypeStruct((*shape.source, shape.channels), np.uint8),
        "image_sizes": jax.ShapeDtypeStruct((2,), np.int32),
    }

    def run(*inputs: Any) -> dict[str, Any]:
        return dict(zip(OUTPUTS, jax.tree.leaves(program(*inputs)), strict=False))

    return convert(run, specs, folded, batch=shape.batch)


def convert(
    function: Callable[..., dict[str, Any]],
    specs: dict[str, Any],
    model: Any,
    *,
    batch: int | None = None,
    calls: Mapping[str, Callable[..., Any]] | None = None,
) -> Any:
    """Converts a function to an `onnx.ModelProto`. It takes arrays like `specs`, in order, and returns arrays by name.

    - `model`: the model that the function runs. It supplies the number of classes and the names of the weights.
    - `batch`: the batch size of the file, if the function takes a single example.
    - `calls`: replacements for named calls, by name. They take precedence over ONNX operators.
    """
    import jax2onnx

    from ._onnx_ops import OPSET, Operators, register_calls, with_functions

    register_calls()
    operators = Operators(model.num_classes)
    names: list[str] = []

    def run(*inputs: Any) -> list[Any]:
        outputs = function(*inputs)
        names[:] = outputs
        return list(outputs.values())

    # Named calls are replaced per example, before batching. Primitives map best to ONNX operators after batching.
    jaxpr = fold_constants(trace(run, *specs.values()), rewrites=operators.calls | dict(calls or {}))
    if batch is not None:
        specs = {name: jax.ShapeDtypeStruct((batch, *spec.shape), spec.dtype) for name, spec in specs.items()}
        jaxpr = jax.make_jaxpr(jax.vmap(jax.extend.core.jaxpr_as_fun(jaxpr)))(*specs.values())
    # onnx_ir warns about each intermediate value for which jax2onnx recorded a shape but no dtype; runtimes infer both.
    with quiet("onnx_ir.serde"):
        proto = jax2onnx.to_onnx(
            jax.extend.core.jaxpr_as_fun(fold_constants(jaxpr, rewrites=operators.primitives)),
            list(specs.values()),
            model_name="detector",
            opset=OPSET,
            input_names=list(specs),
            output_names=names,
        )
    proto = with_functions(proto, operators.functions)
    _name_weights(proto, named_leaves(model))
    return proto


def _name_weights(proto: Any, leaves: dict[str, Any]) -> None:
    """Renames the weights of the file from numbers to their names in the model."""
    from onnx import numpy_helper

    names = {(leaf.shape, np.asarray(leaf).tobytes()): name for name, leaf in leaves.items() if leaf.size > 1}
    renamed = {}
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        name = names.pop((array.shape, array.tobytes()), None)
        if name is not None:
            renamed[tensor.name] = name
            tensor.name = name
    for node in proto.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]


def compare_onnx(
    model: AbstractDetector,
    path: str | os.PathLike,
    *,
    shape: Shape,
    images: Sequence[UInt8[np.ndarray, "_ _ c"]],
    selection: Selection | None = None,
    half: bool = False,
    unmatched_score: float = UNMATCHED_SCORE,
    image_names: Sequence[str] = (),
) -> None:
    """Runs a file of `save_onnx` in onnxruntime and compares its detections with the model's.

    The arguments and errors are those of `save_onnx`.
    """
    require("onnx")
    if not 0 <= unmatched_score <= 1:
        raise ValueError(f"unmatched_score must be in 0..1, got {unmatched_score}.")
    import onnxruntime

    chosen = checked_selection(model, selection)
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    arrays, static = eqx.partition(model, eqx.is_array)

    # The weights are passed as arguments. XLA would fold transposes of constants, slowly and with warnings.
    @jax.jit
    def jitted(arrays, images, sizes):
        return detection_program(eqx.combine(arrays, static), shape, chosen)(images, sizes)

    run = partial(jitted, arrays)
    # A black image shows no objects. A model that detects some anyway gives many locations the same score.
    black = np.zeros((*(min(32, side) for side in shape.source), shape.channels), np.uint8)
    padded, sizes = pad_images([black], shape)
    compared = list(images) if run(padded, sizes).valid[0].any() else [*images, black]
    limits: dict[str, Any] = {
        "score_threshold": chosen.score_threshold,
        "nms_threshold": getattr(chosen, "nms_threshold", 1.0),  # 1: a detector without suppression
        "max_detections": chosen.max_detections,
        "unmatched_score": unmatched_score,
        "tolerances": HALF if half else SINGLE,
    }
    counts = np.zeros(2, int)
    for start in range(0, len(compared), shape.batch):
        batch = compared[start : start + shape.batch]
        padded, sizes = pad_images(batch, shape)
        reference = jax.tree.leaves(run(jnp.asarray(padded), jnp.asarray(sizes)))
        outputs = session.run(None, {"images": padded, "image_sizes": sizes})
        named: list[dict[str, Any]] = [dict(zip(OUTPUTS, arrays, strict=False)) for arrays in (reference, outputs)]
        expected, found = named
        for i in range(len(batch)):
            where = name_of(image_names, start + i, len(images))
            counts += compare_detections(valid_rows(found, i), valid_rows(expected, i), where=where, **limits)
    check_counts(*counts.tolist(), images=len(compared))


def pad_images(images: Sequence[UInt8[np.ndarray, "_ _ c"]], shape: Shape) -> tuple[UInt8[np.ndarray, "b h w c"], Any]:
    """Pads images to the shape of a program. Returns them with their sizes. Missing images become one black pixel.

    Raises a `ValueError` if an image is larger than the source or has a different number of channels, or if there are
    more images than `shape.batch`.
    """
    if len(images) > shape.batch:
        raise ValueError(f"images must be at most {shape.batch}, the program's batch, got {len(images)}.")
    padded = np.zeros((shape.batch, *shape.source, shape.channels), np.uint8)
    sizes = np.ones((shape.batch, 2), np.int32)
    for i, image in enumerate(images):
        height, width, channels = image.shape
        if height > shape.source[0] or width > shape.source[1]:
            raise ValueError(f"images must fit the source {shape.source}, got one of {height}×{width}.")
        if channels != shape.channels:
            raise ValueError(f"images must have the shape's {shape.channels} channels, got one of {channels}.")
        padded[i, :height, :width] = image
        sizes[i] = height, width
    return padded, sizes
