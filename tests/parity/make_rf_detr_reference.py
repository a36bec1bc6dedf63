"""Writes RF-DETR's own results for the tests: `python -m tests.parity.make_rf_detr_reference`.

`tests/data/rf_detr_<kind>.npz` holds detections and losses of the tiny detectors whose parameters, images and objects
`tests/rf_detr_tiny.py` draws. `tests/data/rf_detr_names.json` holds names and shapes of parameters of whole detectors.
"""
# pyright: reportMissingImports=false

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import rf_detr_tiny as tiny
from .rf_detr_models import (
    arrays_of,
    centre_masks,
    detections,
    double_precision,
    losses,
    new_detector,
    prepared,
    tiny_detector,
)


DATA = Path(__file__).parent.parent / "data"
# The parameters whose gradients are stored.
GRADIENTS = {
    "refpoint_embed.weight",
    "transformer.enc_output.1.weight",
    "transformer.enc_out_bbox_embed.2.layers.2.weight",
    "transformer.decoder.layers.0.cross_attn.sampling_offsets.weight",
    "backbone.0.projector.stages.0.0.cv2.bn.weight",
    "backbone.0.encoder.encoder.encoder.layer.1.attention.attention.query.weight",
    "backbone.0.encoder.encoder.embeddings.position_embeddings",
    "segmentation_head.blocks.0.dwconv.weight",
}


def reference(kind: str) -> dict[str, np.ndarray]:
    """Predictions on several canvases, detections in two images, and losses with gradients in double precision."""
    model, criterion = tiny_detector(kind)
    result: dict[str, np.ndarray] = {}
    if kind == "masks":
        centre_masks(model, prepared(tiny.images()[0], tiny.SIZE))
        result["bias"] = arrays_of(model)["segmentation_head.spatial_features_proj.bias"].copy()
    for height, width in tiny.CANVASES if kind == "boxes" else ():
        pixels = torch.from_numpy(np.random.default_rng(height).normal(size=(1, 3, height, width)).astype(np.float32))
        with torch.no_grad():
            output = model.eval()(pixels)
        name = f"{height}x{width}"
        result[f"{name}.logits"] = output["pred_logits"][0].numpy()
        result[f"{name}.boxes"] = output["pred_boxes"][0].numpy()
    for i, image in enumerate(tiny.images()):
        found = detections(model, image, tiny.SIZE, tiny.QUERIES)
        if "masks" in found:
            found["masks"] = np.packbits(found["masks"])
        result |= {f"{i}.{name}": array for name, array in found.items()}
    result |= losses_and_gradients(model, criterion, tiny.targets(), GRADIENTS)
    if kind == "boxes":
        found = detections(model.float(), tiny.images()[0], tiny.SIZE // 2, tiny.QUERIES)
        names = {name.replace(".1.weight", ".0.weight").replace("embed.2.", "embed.0.") for name in GRADIENTS}
        small = found | losses_and_gradients(model, criterion, tiny.small_targets(), names, all_groups=False)
        small["grad.refpoint_embed.weight"] = small["grad.refpoint_embed.weight"][: tiny.QUERIES]
        result |= {f"small.{name}": array for name, array in small.items()}
    return result


def losses_and_gradients(
    model: Any, criterion: Any, targets: Any, parameters: set[str], **options: Any
) -> dict[str, np.ndarray]:
    """The losses by the names `loss.…`, and the gradients of some parameters by `grad.…`, in double precision."""
    model.zero_grad()
    with double_precision():
        terms = losses(model.double(), criterion, *targets, **options)
        total: Any = sum(terms.values())
        total.backward()
    grads = {name: x.grad for name, x in model.named_parameters() if name in parameters}
    result = {f"loss.{term}": np.array(value.item()) for term, value in terms.items()}
    return result | {f"grad.{name}": grad.numpy().astype(np.float32) for name, grad in grads.items()}


if __name__ == "__main__":
    for kind in tiny.KINDS:
        arrays: Any = reference(kind)
        np.savez_compressed(DATA / f"rf_detr_{kind}.npz", **arrays)
    names = {}
    for name in ("rf_detr_nano", "rf_detr_seg_nano"):
        state = arrays_of(new_detector(name)[0])
        names[name] = {key: list(x.shape) for key, x in state.items() if "mask_token" not in key and "_mask" not in key}
    (DATA / "rf_detr_names.json").write_text(json.dumps(names, separators=(",", ":")) + "\n", encoding="utf-8")
