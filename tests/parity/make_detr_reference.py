"""Writes Hugging Face's results of DETR and Deformable DETR: `python -m tests.parity.make_detr_reference`.

For each of the tiny detectors whose parameters, images and objects `tests/detr_tiny.py` draws, a file in `tests/data`
holds detections, losses and gradients. The files `…_names.json` there hold Hugging Face's names and shapes of the
parameters on ResNet-50.
"""
# pyright: reportMissingImports=false

import json
from pathlib import Path
from typing import Any

import numpy as np

from detectax_eqx.weights import read_detr

from .. import detr_tiny as tiny
from .detr_models import adjust, arrays_of, detections, losses, new_detector, tiny_detector


DATA = Path(__file__).parent.parent / "data"
# The parameters whose gradients are stored, by the names of DETR's authors.
GRADIENTS = {
    "query_embed.weight",
    "transformer.level_embed",
    "transformer.reference_points.weight",
    "transformer.enc_output.weight",
    "transformer.enc_output_norm.bias",
    "transformer.pos_trans_norm.weight",
    "transformer.encoder.layers.0.self_attn.in_proj_weight",
    "transformer.encoder.layers.0.self_attn.sampling_offsets.bias",
    "transformer.encoder.layers.1.self_attn.value_proj.weight",
    "transformer.encoder.layers.1.linear1.bias",
    "transformer.decoder.layers.0.self_attn.in_proj_bias",
    "transformer.decoder.layers.0.multihead_attn.in_proj_weight",
    "transformer.decoder.layers.0.cross_attn.attention_weights.weight",
    "transformer.decoder.layers.1.cross_attn.sampling_offsets.weight",
    "transformer.decoder.layers.1.norm3.weight",
    "transformer.decoder.norm.weight",
    "class_embed.weight",
    "class_embed.0.weight",
    "class_embed.2.weight",
    "bbox_embed.layers.1.weight",
    "bbox_embed.0.layers.1.weight",
    "bbox_embed.2.layers.2.bias",
    "input_proj.weight",
    "input_proj.0.1.weight",
    "input_proj.3.1.bias",
    "backbone.0.body.layer3.0.conv2.weight",
    "backbone.0.body.conv1.weight",
}


def reference(kind: str) -> dict[str, np.ndarray]:
    """Detections in two images, alone and on a common canvas, and losses with gradients, in double precision."""
    model = tiny_detector(kind)
    adjusted = adjust(model, tiny.images()[0], tiny.SHORT, tiny.LONG)
    result = {f"adjusted.{name}": array.copy() for name, array in adjusted.items()}
    model = model.double()
    for i, image in enumerate(tiny.images()):
        for name, canvas in (("alone", None), ("padded", tiny.CANVAS)):
            found = detections(model, image, tiny.SHORT, tiny.LONG, canvas)
            result |= {f"{i}.{name}.{key}": array for key, array in found.items()}
    pixels, boxes, labels, valid = tiny.targets()
    terms = losses(model, pixels, tiny.SIZES, boxes, labels, valid)
    result |= {f"loss.{term}": np.array(value.item()) for term, value in terms.items()}
    total: Any = sum(terms.values())
    total.backward()
    grads = {name: x.grad.numpy() for name, x in model.named_parameters() if x.grad is not None}
    for name, array in read_detr(grads).items():
        if name in GRADIENTS:
            result[f"grad.{name}"] = array.astype(np.float32)
    return result


if __name__ == "__main__":
    for kind in tiny.KINDS:
        arrays: Any = reference(kind)
        np.savez_compressed(DATA / f"{kind}.npz", **arrays)
    for kind in ("detr", "deformable_detr", "deformable_detr_two_stage"):
        names = {name: list(x.shape) for name, x in arrays_of(new_detector("resnet50", kind)).items()}
        (DATA / f"{kind}_names.json").write_text(json.dumps(names, separators=(",", ":")) + "\n", encoding="utf-8")
