"""Writes Hugging Face's results of LW-DETR for the tests: `python -m tests.parity.make_lw_detr_reference`.

`tests/data/lw_detr.npz` and `lw_detr_levels.npz` hold detections, losses and gradients of the tiny detectors whose
parameters `tests/lw_detr_tiny.py` draws, on the images and objects of `tests/rf_detr_tiny.py`.
`tests/data/lw_detr_names.json` holds Hugging Face's names and shapes of the parameters of LW-DETR tiny and xlarge.
"""
# pyright: reportMissingImports=false

import json
from pathlib import Path
from typing import Any

import numpy as np

from detectax_eqx.weights import read_rf_detr

from .. import lw_detr_tiny as tiny, rf_detr_tiny
from .detr_models import arrays_of
from .lw_detr_models import detections, losses, new_detector, tiny_detector


DATA = Path(__file__).parent.parent / "data"
# The parameters whose gradients are stored, as `read_rf_detr` names them.
GRADIENTS = {
    "refpoint_embed.weight",
    "transformer.enc_output.weight",
    "transformer.decoder.layers.0.cross_attn.sampling_offsets.weight",
    "backbone.0.projector.stages_sampling.0.1.0.weight",
    "backbone.0.projector.stages_sampling.1.2.0.conv.weight",
    "backbone.0.projector.stages.0.0.cv2.conv.weight",
    "backbone.0.encoder.encoder.encoder.layer.1.attention.attention.qkv.weight",
    "backbone.0.encoder.encoder.encoder.layer.0.layer_scale2.lambda1",
    "backbone.0.encoder.encoder.embeddings.position_embeddings",
}


def reference(kind: str) -> dict[str, np.ndarray]:
    """Detections in two images, and losses with gradients in double precision."""
    model = tiny_detector(kind)
    result: dict[str, np.ndarray] = {}
    for i, image in enumerate(rf_detr_tiny.images()):
        result |= {f"{i}.{key}": x for key, x in detections(model, image, tiny.SIZE, tiny.QUERIES).items()}
    pixels, boxes, labels, _, valid = rf_detr_tiny.targets()
    terms = losses(model.double(), pixels, boxes, labels, valid)
    result |= {f"loss.{term}": np.array(value.item()) for term, value in terms.items()}
    total: Any = sum(terms.values())
    total.backward()
    grads = {name: x.grad.numpy() for name, x in model.named_parameters() if x.grad is not None}
    arrays = {name: x for name, x in read_rf_detr(grads).items() if name in GRADIENTS}
    return result | {f"grad.{name}": array.astype(np.float32) for name, array in arrays.items()}


def names_of(size: str) -> dict[str, list[int]]:
    """Names and shapes of the parameters of a whole detector."""
    return {name: list(x.shape) for name, x in arrays_of(new_detector(size)).items() if "num_batches" not in name}


if __name__ == "__main__":
    for kind in tiny.KINDS:
        arrays: Any = reference(kind)
        np.savez_compressed(DATA / f"{kind}.npz", **arrays)
    names = {size: names_of(size) for size in ("tiny", "xlarge")}
    (DATA / "lw_detr_names.json").write_text(json.dumps(names, separators=(",", ":")) + "\n", encoding="utf-8")
