"""Hugging Face's LW-DETR with random, decisive parameters. Needs the package transformers."""
# pyright: reportMissingImports=false

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LwDetrConfig, LwDetrForObjectDetection, LwDetrViTConfig

from detectax_eqx.weights import read_rf_detr

from .. import lw_detr_tiny as tiny
from .detr_models import normalized


# Sizes of the authors' scripts: channels, the number of blocks, those with windows, those with maps, and queries.
SIZES = {
    "tiny": (192, 6, [0, 2, 4], [2, 4, 6], 100),
    "small": (192, 10, [0, 1, 3, 6, 7, 9], [3, 5, 6, 10], 300),
    "medium": (384, 10, [0, 1, 3, 6, 7, 9], [3, 5, 6, 10], 300),
    "large": (384, 10, [0, 1, 3, 6, 7, 9], [3, 5, 6, 10], 300),
    "xlarge": (768, 10, [0, 1, 3, 6, 7, 9], [3, 5, 6, 10], 300),
}
# What else the two large sizes have.
LARGE = {
    "projector_scale_factors": [2.0, 0.5],
    "d_model": 384,
    "decoder_self_attention_heads": 12,
    "decoder_cross_attention_heads": 24,
    "decoder_n_points": 4,
}


def new_detector(size: str) -> LwDetrForObjectDetection:
    """A whole detector with parameters of `lw_detr_tiny.random_array`."""
    channels, blocks, windows, maps, queries = SIZES[size]
    body = {"hidden_size": channels, "num_hidden_layers": blocks, "num_attention_heads": 12, "image_size": 1024}
    options = LARGE if "large" in size else {}
    return _build(body | {"window_block_indices": windows, "out_indices": maps}, 91, num_queries=queries, **options)


def tiny_detector(kind: str) -> LwDetrForObjectDetection:
    """Hugging Face's counterpart of `lw_detr_tiny.build`."""
    body = {
        "hidden_size": tiny.CHANNELS,
        "num_hidden_layers": tiny.TAPS[-1],
        "num_attention_heads": tiny.HEADS,
        "image_size": tiny.SIZE,
        "pretrain_image_size": tiny.PRETRAINED * tiny.PATCH,
        "patch_size": tiny.PATCH,
        "window_block_indices": [i for i in range(tiny.TAPS[-1]) if i not in tiny.GLOBAL],
        "out_indices": list(tiny.TAPS),
    }
    return _build(
        body,
        tiny.CLASSES,
        d_model=tiny.WIDTH,
        decoder_layers=tiny.LAYERS,
        num_queries=tiny.QUERIES,
        group_detr=tiny.GROUPS,
        decoder_ffn_dim=tiny.HIDDEN,
        decoder_self_attention_heads=4,
        decoder_cross_attention_heads=4,
        projector_scale_factors=[2.0**doublings for doublings in tiny.KINDS[kind]],
    )


def _build(body: dict[str, Any], num_labels: int, **options: Any) -> LwDetrForObjectDetection:
    levels = {"projector_scale_factors": [1.0], "decoder_n_points": 2} | options
    config = LwDetrConfig(
        backbone_config=LwDetrViTConfig(**body), num_labels=num_labels, attn_implementation="eager", **levels
    )
    model = LwDetrForObjectDetection(config)
    randomize(model)
    return model.eval()


def randomize(model: LwDetrForObjectDetection) -> None:
    """Sets the parameters to those of `lw_detr_tiny.random_array`.

    Each is found by reading a file in which its numbers are their own positions.
    """
    state = model.state_dict()
    starts = np.cumsum([0, *(array.numel() for array in state.values())])
    positions = {
        name: np.arange(start, start + array.numel(), dtype=np.float64).reshape(array.shape) + 1
        for start, (name, array) in zip(starts, state.items(), strict=False)
    }
    values = np.zeros(starts[-1] + 1)
    for name, array in read_rf_detr(positions).items():
        values[array.astype(np.int64)] = tiny.random_array(name, array.shape)
    with torch.no_grad():
        for name, array in state.items():
            if array.dtype.is_floating_point:
                array.copy_(torch.from_numpy(values[positions[name].astype(np.int64)]))


def detections(model: LwDetrForObjectDetection, image: np.ndarray, size: int, count: int) -> dict[str, np.ndarray]:
    """Scores, labels and boxes of an image, of the best pairs of query and class, as LW-DETR's `PostProcess`."""
    resized = np.asarray(Image.fromarray(np.asarray(image)).resize((size, size), Image.Resampling.BILINEAR))
    pixels = torch.from_numpy(resized.copy()).permute(2, 0, 1)[None].to(model.dtype)
    mask = torch.ones(1, size, size, dtype=torch.long)
    with torch.no_grad():
        output = model.eval()(normalized(pixels, mask), pixel_mask=mask)
    scores, best = output.logits[0].sigmoid().flatten().topk(count)
    queries, labels = best // output.logits.shape[2], best % output.logits.shape[2]
    centres, sides = output.pred_boxes[0][queries].split(2, dim=1)
    scale = torch.tensor(image.shape[1::-1] * 2)
    boxes = torch.cat([centres - sides / 2, centres + sides / 2], dim=1) * scale
    boxes = torch.minimum(boxes.clamp(min=0), scale)
    return {"scores": scores.numpy(), "labels": labels.numpy(), "boxes": boxes.numpy()}


def losses(
    model: LwDetrForObjectDetection, pixels: np.ndarray, boxes: np.ndarray, labels: np.ndarray, valid: np.ndarray
) -> dict[str, torch.Tensor]:
    """The weighted losses of a batch, summed over the first stage and all layers, by the names that they have here.

    Norms of the projector have fixed statistics.
    """
    dtype, (height, width) = model.dtype, pixels.shape[1:3]
    objects = []
    for i, rows in enumerate(valid):
        x = torch.from_numpy(boxes[i, rows]).to(dtype) / torch.tensor([width, height] * 2, dtype=dtype)
        cxcywh = torch.cat([(x[:, :2] + x[:, 2:]) / 2, x[:, 2:] - x[:, :2]], dim=1)
        objects.append({"boxes": cxcywh, "class_labels": torch.from_numpy(labels[i, rows]).long()})
    mask = torch.ones(pixels.shape[:3], dtype=torch.long)
    images = normalized(torch.from_numpy(pixels).to(dtype).permute(0, 3, 1, 2), mask)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    terms = model(images, pixel_mask=mask, labels=objects).loss_dict
    names = {"loss_class": ("loss_ce", 1), "loss_l1": ("loss_bbox", 5), "loss_giou": ("loss_giou", 2)}
    return {
        ours: weight * torch.stack([value for name, value in terms.items() if name.startswith(theirs)]).sum()
        for ours, (theirs, weight) in names.items()
    }
