"""Hugging Face's DETR and Deformable DETR with random, decisive parameters. Needs the package transformers."""
# pyright: reportMissingImports=false

import copy
import re
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torchvision.models import resnet
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessorPil,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessorPil,
)
from transformers.loss import loss_deformable_detr
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss
from transformers.models.deformable_detr import modeling_deformable_detr
from transformers.models.detr import modeling_detr

from detectax_eqx.weights import read_detr
from detectax_eqx.weights._detr import (
    _DECODER_RULES as DECODER_RULES,
    _DEFORMABLE_RULES as DEFORMABLE_RULES,
    _PARTS as PARTS,
    _RULES as RULES,
    _renamed,
)

from .. import detr_tiny as tiny


MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class TinyBody(torch.nn.Module):
    """A ResNet of one bottleneck per stage, by torchvision's and timm's names."""

    def __init__(self, width: int, *, skip: bool):
        """`skip`: leave out the first map, as in Deformable DETR."""
        super().__init__()
        self.skip = int(skip)
        channels = [4 * width * 2**i for i in range(4)]
        self.channels = channels[self.skip :]
        self.conv1 = torch.nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(width)
        for i, (before, after) in enumerate(zip([width, *channels[:-1]], channels, strict=True)):
            stride = 1 if i == 0 else 2
            shortcut = torch.nn.Sequential(
                torch.nn.Conv2d(before, after, 1, stride=stride, bias=False), torch.nn.BatchNorm2d(after)
            )
            block = resnet.Bottleneck(before, after // 4, stride=stride, downsample=shortcut)
            self.add_module(f"layer{i + 1}", torch.nn.Sequential(block))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = torch.nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        maps = []
        for i in range(4):
            x = getattr(self, f"layer{i + 1}")(x)
            maps.append(x)
        return maps[self.skip :]


def new_detector(backbone: str, kind: str = "detr", **changes: Any) -> torch.nn.Module:
    """A whole detector on timm's `backbone`, with parameters of `detr_tiny.random_array`."""
    options = {"num_labels": 91, "backbone": backbone, "attn_implementation": "eager"} | changes
    if kind == "detr":
        model = DetrForObjectDetection(DetrConfig(**options))
    else:
        costs = {"class_cost": 2, "with_box_refine": kind != "deformable_detr", "two_stage": kind.endswith("two_stage")}
        options |= {"two_stage_num_proposals": options.get("num_queries", 300)}
        model = DeformableDetrForObjectDetection(DeformableDetrConfig(**(costs | options)))
        if costs["with_box_refine"]:  # transformers 5.24 ties the predictions of all layers to each other
            for name in ("class_embed", "bbox_embed"):
                setattr(model, name, torch.nn.ModuleList(map(copy.deepcopy, getattr(model, name))))
            model.model.decoder.bbox_embed = model.bbox_embed
        if costs["two_stage"]:
            model.model.decoder.class_embed = model.class_embed
            model.model.get_proposal_pos_embed = partial(sines, channels=model.config.d_model // 2)
    randomize(model)
    return model.eval()


def sines(logits: torch.Tensor, channels: int) -> torch.Tensor:
    """`channels` sines and cosines of each side of boxes `(b, q, 4)`, given as logits, in the precision of these.

    The method of transformers 5.24 rounds to single precision.
    """
    wavelengths = 10000 ** (torch.arange(0, channels, 2, dtype=logits.dtype) / channels)
    angles = 2 * torch.pi * logits.sigmoid()[..., None] / wavelengths
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(2)


def renamed(name: str, model: torch.nn.Module) -> str:
    """The authors' name of a parameter."""
    if isinstance(model, DetrForObjectDetection):
        return _renamed(name, (*RULES, *DECODER_RULES))
    name = _renamed(name, (*RULES, *DEFORMABLE_RULES))
    return name if model.config.with_box_refine else re.sub(r"(class|bbox)_embed\.\d+", r"\1_embed.0", name)


def tiny_detector(kind: str = "detr") -> torch.nn.Module:
    """Hugging Face's counterpart of `detr_tiny.build`."""
    sizes = {"encoder": tiny.LAYERS, "decoder": tiny.LAYERS}
    options = {f"{part}_layers": layers for part, layers in sizes.items()}
    options |= {f"{part}_attention_heads": tiny.HEADS for part in sizes}
    options |= {f"{part}_ffn_dim": tiny.HIDDEN for part in sizes}
    module = modeling_detr if kind == "detr" else modeling_deformable_detr
    options |= {"num_labels": tiny.CLASSES, "d_model": tiny.CHANNELS, "num_queries": tiny.QUERIES}
    with mock.patch.object(module, "load_backbone", lambda _: TinyBody(tiny.WIDTH, skip=kind != "detr")):
        return new_detector("resnet50", kind, **options)


def arrays_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The parameters by name."""
    return {name: array.detach().numpy() for name, array in model.state_dict().items()}


def randomize(model: torch.nn.Module) -> None:
    """Sets the parameters to those of `detr_tiny.random_array`, by the names of DETR's authors."""
    theirs = {}
    for name, array in read_detr(arrays_of(model)).items():
        theirs[name] = tiny.random_array(name, tiny.flat(name, array.shape))
    state = {}
    for name in model.state_dict():
        ours, part = renamed(name, model), name.rpartition(".")[0].rpartition(".")[2]
        if part in PARTS:
            ours = renamed(name.replace(f".{part}.", ".in_proj_"), model)
            array = theirs[ours].reshape(3, -1, *theirs[ours].shape[1:])[PARTS.index(part)]
        else:
            array = theirs[ours]
        state[name] = torch.from_numpy(np.array(array))
    model.load_state_dict(state)


def adjust(
    model: torch.nn.Module, image: np.ndarray, short: int, long: int, canvas: tuple[int, int] | None = None
) -> dict[str, np.ndarray]:
    """Makes cells, classes and boxes differ: each channel has mean 0 over an image, and a deviation of 1;
    in DETR, all channels together have it.

    Returns the parameters that it changed, by the names of DETR's authors. Random layers of that depth map all queries
    to nearly the same.
    """
    deformable, count = isinstance(model, DeformableDetrForObjectDetection), 0
    if not deformable:
        layers = {
            "input_proj": model.model.input_projection,
            "class_embed": model.class_labels_classifier,
            "bbox_embed.layers.2": model.bbox_predictor.layers[-1],
        }
    else:
        layers = {}
        count = len(model.class_embed)
        order = [count - 1, *range(count - 1)] if model.config.two_stage else range(count)
        for i in order if model.config.with_box_refine else [count - 1]:
            name = i if model.config.with_box_refine else 0  # of predictions that all layers share
            layers[f"class_embed.{name}"] = model.class_embed[i]
            layers[f"bbox_embed.{name}.layers.2"] = model.bbox_embed[i].layers[-1]
    changed = {}
    for name, layer in layers.items():
        outputs: list[torch.Tensor] = []
        hook = layer.register_forward_hook(lambda _, __, output, outputs=outputs: outputs.append(output.detach()))
        detections(model, image, short, long, canvas)
        hook.remove()
        x = outputs[0][0]
        x = x.flatten(1).T if x.ndim == 3 else x  # (cells or queries, channels)
        # Queries of Deformable DETR are so alike that one class would have all of the best pairs.
        scale = 1 / (x - x.mean(0)).std(0 if deformable else None).expand(x.shape[1])
        with torch.no_grad():
            layer.weight.mul_(scale.reshape(-1, *[1] * (layer.weight.ndim - 1)))
            layer.bias.sub_(x.mean(0)).mul_(scale)
            if deformable and model.config.two_stage and name == f"class_embed.{count - 1}":
                # Cells without a proposal, which are all alike, are not among the best.
                inner = model.model
                zeros = layer(inner.enc_output_norm(inner.enc_output(torch.zeros(1, inner.config.d_model))))
                sign = -torch.sign(zeros[0, 0])
                layer.weight[0].mul_(sign)
                layer.bias[0].mul_(sign)
        changed |= {f"{name}.weight": layer.weight.detach().numpy(), f"{name}.bias": layer.bias.detach().numpy()}
    return changed


def detections(
    model: torch.nn.Module,
    image: np.ndarray,
    short: int,
    long: int,
    canvas: tuple[int, int] | None = None,
) -> dict[str, np.ndarray]:
    """Scores, labels and boxes of an image by Hugging Face's processor, sorted by score. `canvas`: to which to pad.

    For a model in double precision, pixels are normalised here: the processor rounds them to single precision.
    """
    size = {"shortest_edge": short, "longest_edge": long}
    detr = isinstance(model, DetrForObjectDetection)
    processor = (DetrImageProcessorPil if detr else DeformableDetrImageProcessorPil)(size=size)
    pad = {} if canvas is None else {"pad_size": {"height": canvas[0], "width": canvas[1]}}
    raw = {} if model.dtype == torch.float32 else {"do_rescale": False, "do_normalize": False}
    inputs = processor(images=np.asarray(image), return_tensors="pt", **pad, **raw)
    pixels, mask = inputs["pixel_values"].to(model.dtype), inputs["pixel_mask"]
    pixels = normalized(pixels, mask) if raw else pixels
    with torch.no_grad():
        output = model(pixels, pixel_mask=mask)
    (found,) = processor.post_process_object_detection(output, 0.0, torch.tensor([image.shape[:2]]))
    order = np.argsort(-found["scores"].numpy(), kind="stable")
    return {name: x.numpy()[order] for name, x in found.items()}


def normalized(pixels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Pixels 0..255 of `(b, 3, h, w)` less ImageNet's mean by its deviation, and zeros outside `mask`."""
    mean, std = (torch.tensor(values, dtype=pixels.dtype).reshape(3, 1, 1) * 255 for values in (MEAN, STD))
    return (pixels - mean) / std * mask[:, None]


def losses(
    model: torch.nn.Module,
    pixels: np.ndarray,
    sizes: tuple[tuple[int, int], ...],
    boxes: np.ndarray,
    labels: np.ndarray,
    valid: np.ndarray,
) -> dict[str, torch.Tensor]:
    """The weighted losses of a batch, summed over layers, by the names that they have here.

    Hugging Face has a weight of 1 for the classes of Deformable DETR, whose authors have 2.
    """
    dtype = next(model.parameters()).dtype
    mask = torch.zeros(pixels.shape[:3], dtype=torch.long)
    objects = []
    for i, (rows, (height, width)) in enumerate(zip(valid, sizes, strict=True)):
        mask[i, :height, :width] = 1
        x = torch.from_numpy(boxes[i, rows]).to(dtype) / torch.tensor([width, height] * 2, dtype=dtype)
        cxcywh = torch.cat([(x[:, :2] + x[:, 2:]) / 2, x[:, 2:] - x[:, :2]], dim=1)
        objects.append({"boxes": cxcywh, "class_labels": torch.from_numpy(labels[i, rows]).long()})
    images = normalized(torch.from_numpy(pixels).to(dtype).permute(0, 3, 1, 2), mask)
    detr = isinstance(model, DetrForObjectDetection)
    torch.set_default_dtype(dtype)  # that of the weights of classes
    try:
        terms = (_terms if detr else _deformable_terms)(model, images, mask, objects)
    finally:
        torch.set_default_dtype(torch.float32)
    classes = 1 if detr else 2
    names = {"loss_class": ("loss_ce", classes), "loss_l1": ("loss_bbox", 5), "loss_giou": ("loss_giou", 2)}
    return {
        ours: weight * torch.stack([value for name, value in terms.items() if name.startswith(theirs)]).sum()
        for ours, (theirs, weight) in names.items()
    }


def _terms(
    model: DetrForObjectDetection, images: torch.Tensor, mask: torch.Tensor, objects: list[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """The losses of all layers by Hugging Face's names.

    With `auxiliary_loss`, transformers 5.24 passes the norm of a layer's output to the next layer, unlike DETR's
    authors. So each layer's output is taken from a model without.
    """
    outputs: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: outputs.append(output))
        for layer in model.model.decoder.layers
    ]
    model(images, pixel_mask=mask)
    for hook in hooks:
        hook.remove()
    features = model.model.decoder.layernorm(torch.stack(outputs))
    logits, predicted = model.class_labels_classifier(features), model.bbox_predictor(features).sigmoid()
    config = DetrConfig(**(model.config.to_dict() | {"auxiliary_loss": True}))
    return ForObjectDetectionLoss(logits[-1], objects, "cpu", predicted[-1], config, logits, predicted)[1]


def _deformable_terms(
    model: DeformableDetrForObjectDetection,
    images: torch.Tensor,
    mask: torch.Tensor,
    objects: list[dict[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """The same of Deformable DETR.

    transformers 5.24 has no loss of the first of two stages: this is that of the authors, by their names.
    """
    config = model.config
    config.auxiliary_loss = True
    output = model(images, pixel_mask=mask, labels=objects)
    if not config.two_stage:
        return output.loss_dict
    costs = {name: getattr(config, name) for name in ("class_cost", "bbox_cost", "giou_cost")}
    matcher = loss_deformable_detr.DeformableDetrHungarianMatcher(**costs)
    criterion = loss_deformable_detr.DeformableDetrImageLoss(
        matcher, config.num_labels, config.focal_alpha, ["labels", "boxes"]
    )
    cells = {"logits": output.enc_outputs_class, "pred_boxes": output.enc_outputs_coord_logits.sigmoid()}
    binary = [one | {"class_labels": torch.zeros_like(one["class_labels"])} for one in objects]
    return output.loss_dict | {f"{name}_enc": value for name, value in criterion(cells, binary).items()}
