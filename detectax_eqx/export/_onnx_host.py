"""Exports a detector to two ONNX files; the host runs NMS after each of them."""
# pyright: reportMissingImports=false

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import UInt8

from ..models import (
    AbstractDetector,
    Proposals,
    RPNOutput,
    Selection,
    TwoStageSelection,
    box_detections,
    extract,
    propose,
    roi_features,
)
from ._extras import require
from ._fold import fold_norms
from ._host import host_nms
from ._onnx import convert
from ._parts import two_stage_parts
from ._program import Shape, about_model, resize_rule


DEFAULT_SELECTION = TwoStageSelection()
Runner = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


def save_onnx_parts(
    model: AbstractDetector,
    folder: str | os.PathLike,
    *,
    shape: Shape,
    class_names: Sequence[str],
    selection: Selection | None = None,
    num_candidates: int = 1000,
) -> None:
    """Writes `proposals.onnx` and `detections.onnx` to a folder.

    The files contain no NMS, no loops and no outputs of varying length. The first file maps an image to its features
    and the highest-scoring boxes of each level. The second file maps the proposals that remain after NMS to the
    `num_candidates` highest-scoring detections. `host_detections` runs both files, with NMS after each.

    - `model`: a two-stage detector that predicts boxes only.
    - `selection`: which detections are kept, a `TwoStageSelection`; default `model.selection`.

    Raises a `ValueError` for any other detector or for a batch other than 1, and an `ImportError` that names the extra
    `onnx` if it is not installed.
    """
    require("onnx")
    import onnx

    if shape.batch != 1:
        raise ValueError(f"batch must be 1 if NMS runs on the host, got {shape.batch}.")
    metadata = about_model(model, class_names, selection) | {"shape": asdict(shape)}
    folded = fold_norms(model)
    parts = two_stage_parts(folded, selection)
    maps = jax.eval_shape(
        lambda image, size: extract(parts.model, image, size)[0].maps,
        jax.ShapeDtypeStruct((*shape.canvas, shape.channels), np.float32),
        jax.ShapeDtypeStruct((2,), np.int32),
    )
    first = {
        "images": jax.ShapeDtypeStruct((1, *shape.source, shape.channels), np.uint8),
        "image_sizes": jax.ShapeDtypeStruct((1, 2), np.int32),
    }
    second = {
        "proposals": jax.ShapeDtypeStruct((parts.selection.post_nms_top_n, 4), np.float32),
        "proposals_valid": jax.ShapeDtypeStruct((parts.selection.post_nms_top_n,), np.bool_),
        "resized": jax.ShapeDtypeStruct((2,), np.int32),
    } | {f"features{i}": feature for i, feature in enumerate(maps)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    calls = {"nms_indices": _best_indices}
    proposals = partial(_proposals, parts, shape, resize_rule(model, shape))
    detections = partial(_detections, parts, num_candidates)
    for name, function, specs in (("proposals", proposals, first), ("detections", detections, second)):
        proto = convert(function, specs, folded, calls=calls)
        onnx.helper.set_model_props(proto, {key: json.dumps(value) for key, value in metadata.items()})
        onnx.save_model(proto, folder / f"{name}.onnx")


def _proposals(parts, shape, size_on_canvas, images, image_sizes):
    """The program of the first file: the highest-scoring boxes of each level, and the features."""
    detector, _, chosen = parts
    resized = size_on_canvas(image_sizes[0])
    pixels = detector.preprocessing.place(
        images[0], image_size=image_sizes[0], output_size=resized, canvas=shape.canvas
    )
    rois, _, output = extract(detector, pixels, resized)
    proposals = [
        propose(
            RPNOutput((logits,), (deltas,), (anchors,)),
            resized.astype(jnp.float32),
            pre_nms_top_n=chosen.pre_nms_top_n,
            post_nms_top_n=chosen.pre_nms_top_n,
            min_size=chosen.rpn_min_size,
            rank_by_logits=chosen.rpn_rank_by_logits,
            weights=detector.rpn.weights,
        )
        for logits, deltas, anchors in zip(output.logits, output.deltas, output.anchors, strict=True)
    ]
    level_indices = [jnp.full(level.scores.shape, i, jnp.int32) for i, level in enumerate(proposals)]
    return {
        "boxes": jnp.concatenate([level.boxes for level in proposals]),
        "scores": jnp.concatenate([level.scores for level in proposals]),
        "labels": jnp.concatenate(level_indices),
        "valid": jnp.concatenate([level.valid for level in proposals]),
        "resized": resized,
    } | {f"features{i}": feature for i, feature in enumerate(rois.maps)}


def _detections(parts, num_candidates, proposals, valid, resized, *features):
    """The program of the second file: the highest-scoring detections from the proposals, before NMS."""
    detector, head, chosen = parts
    logits, deltas = head(roi_features(detector, features).pool(proposals, output_size=head.pool_size))
    candidates = box_detections(
        logits,
        deltas,
        Proposals(proposals, jnp.zeros(valid.shape), valid),
        resized.astype(jnp.float32),
        score_threshold=chosen.score_threshold,
        max_detections=num_candidates,
        min_size=chosen.box_min_size,
        weights=head.weights,
    )
    return {name: getattr(candidates, name) for name in ("boxes", "scores", "labels", "valid")}


def _best_indices(boxes, scores, *rest, iou_threshold, max_outputs):
    """Replaces `nms_indices` by the highest-scoring valid rows, without suppression."""
    valid, lowest = rest[-1], float(jnp.finfo(scores.dtype).min)
    scores = jnp.where(valid, scores, lowest)
    if max_outputs > scores.shape[0]:
        scores = jnp.concatenate([scores, jnp.full(max_outputs - scores.shape[0], lowest)])
    best, indices = lax.top_k(scores, max_outputs)
    return jnp.where(best > lowest, indices, 0), best > lowest


def host_detections(
    proposals: Runner,
    detections: Runner,
    image: UInt8[np.ndarray, "h w c"],
    *,
    shape: Shape,
    selection: TwoStageSelection = DEFAULT_SELECTION,
) -> dict[str, np.ndarray]:
    """Runs the two files of `save_onnx_parts` and `host_nms` on an image. Returns `boxes`, `scores` and `labels`.

    - `proposals`, `detections`: functions that run the two files, from inputs by name to outputs by name.
    - `selection`: the selection that the files were written with.
    """
    padded = np.zeros((1, *shape.source, shape.channels), np.uint8)
    padded[0, : image.shape[0], : image.shape[1]] = image
    sizes = np.array([image.shape[:2]], np.int32)
    outputs = dict(proposals({"images": padded, "image_sizes": sizes}))
    boxes, scores, levels, valid = (outputs.pop(name) for name in ("boxes", "scores", "labels", "valid"))
    # NMS treats each level separately. The second file takes this many proposals from all levels together.
    capacity = selection.post_nms_top_n
    kept = host_nms(boxes, scores, levels, valid, iou_threshold=selection.rpn_nms_threshold, max_outputs=capacity)
    padded_boxes = np.zeros((capacity, 4), np.float32)
    padded_boxes[: len(kept)] = boxes[kept]
    resized = outputs["resized"]
    candidates = detections(outputs | {"proposals": padded_boxes, "proposals_valid": np.arange(capacity) < len(kept)})
    boxes, scores, labels, valid = (candidates[name] for name in ("boxes", "scores", "labels", "valid"))
    kept = host_nms(
        boxes, scores, labels, valid, iou_threshold=selection.nms_threshold, max_outputs=selection.max_detections
    )
    ratio = np.array(image.shape[:2], np.float32) / resized.astype(np.float32)
    return {"boxes": boxes[kept] * ratio[[1, 0, 1, 0]], "scores": scores[kept], "labels": labels[kept]}
