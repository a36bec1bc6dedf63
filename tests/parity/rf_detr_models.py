"""RF-DETR's own detectors with random, decisive parameters. Needs the package rfdetr (1.11.2)."""
# pyright: reportMissingImports=false

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import torchvision.transforms.functional as F
from rfdetr import config
from rfdetr.models.backbone import dinov2
from rfdetr.models.lwdetr import build_criterion_from_config, build_model_from_config
from rfdetr.models.postprocess import PostProcess
from rfdetr.training.param_groups import get_param_dict

from detectax_eqx.weights import read_rf_detr

from .. import rf_detr_tiny as tiny


MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# rfdetr's names of the sizes.
SIZES = {"nano": "Nano", "small": "Small", "medium": "Medium", "large": "Large", "xlarge": "XLarge"}
SIZES |= {"2xlarge": "2XLarge"}


def new_detector(name: str, **changes: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The detector that is called `name` here, and its loss, with parameters of `rf_detr_tiny.random_array`."""
    masks = name.startswith("rf_detr_seg_")
    size = SIZES[name.rpartition("_")[2]]
    options = {"pretrain_weights": "none", "device": "cpu"} | changes
    model_config = getattr(config, f"RFDETR{'Seg' if masks else ''}{size}Config")(**options)
    train_config = (config.SegmentationTrainConfig if masks else config.TrainConfig)(dataset_dir=".", output_dir=".")
    model = build_model_from_config(model_config, train_config)
    criterion, _ = build_criterion_from_config(model_config, train_config)
    randomize(model)
    return model, criterion


def tiny_detector(kind: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """RF-DETR's counterpart of `rf_detr_tiny.build(kind)`, and its loss."""
    get_config, widths = dinov2.get_config, dinov2.size_to_width

    def tiny_config(*arguments: Any) -> dict[str, Any]:
        sizes = {"hidden_size": tiny.CHANNELS, "num_attention_heads": tiny.HEADS, "num_hidden_layers": tiny.DEPTH}
        return get_config(*arguments) | sizes

    dinov2.get_config, dinov2.size_to_width = tiny_config, widths | {"small": tiny.CHANNELS}
    try:
        return new_detector(
            "rf_detr_nano" if kind == "boxes" else "rf_detr_seg_nano",
            hidden_dim=tiny.WIDTH,
            patch_size=tiny.PATCH,
            num_windows=2,
            resolution=tiny.SIZE,
            positional_encoding_size=tiny.SIDE,
            out_feature_indexes=list(tiny.TAPS),
            dec_layers=tiny.LAYERS,
            sa_nheads=4,
            ca_nheads=4,
            num_queries=tiny.QUERIES,
            num_select=tiny.QUERIES,
            group_detr=tiny.GROUPS,
            num_classes=tiny.CLASSES - 1,
        )
    finally:
        dinov2.get_config, dinov2.size_to_width = get_config, widths


def arrays_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The parameters by name."""
    return {name: array.detach().numpy() for name, array in model.state_dict().items()}


def randomize(model: torch.nn.Module) -> None:
    """Sets the parameters that `read_rf_detr` reads to those of `rf_detr_tiny.random_array`, in its arrangement."""
    ours = {name: tiny.random_array(name, array.shape) for name, array in read_rf_detr(arrays_of(model)).items()}
    state = {name: torch.from_numpy(np.array(array)) for name, array in tiny.in_their_arrangement(ours).items()}
    model.load_state_dict(state, strict=False)


def randomize_file(path: Path) -> None:
    """Replaces the parameters of a safetensors file as `randomize` does those of a model."""
    arrays = safetensors.numpy.load_file(path)
    ours = {name: tiny.random_array(name, array.shape) for name, array in read_rf_detr(arrays).items()}
    safetensors.numpy.save_file(arrays | tiny.in_their_arrangement(ours), path, {"format": "pt"})


def parameter_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """The parameters of `rf_detr_nano` in groups with the learning rates of rfdetr's defaults."""
    settings = config.TrainConfig(dataset_dir=".", output_dir=".").model_dump()
    options = {
        "out_feature_indexes": config.RFDETRNanoConfig(pretrain_weights="none", device="cpu").out_feature_indexes
    }
    return get_param_dict(SimpleNamespace(**settings | options), model)


def centre_masks(model: torch.nn.Module, images: torch.Tensor) -> None:
    """Shifts the embeddings of pixels so that masks have about as many pixels inside as outside."""
    head, seen = model.segmentation_head, []
    hook = head.spatial_features_proj.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    with torch.no_grad():
        model.eval()(images)
        hook.remove()
        head.spatial_features_proj.bias.sub_(seen[-1].mean((0, 2, 3)))


def prepared(image: np.ndarray, size: int) -> torch.Tensor:
    """An image as RF-DETR's `predict` passes it to the model."""
    x = F.resize(F.to_tensor(np.array(image)), [size, size], antialias=False)
    return F.normalize(x, MEAN, STD)[None]


def detections(
    model: torch.nn.Module, image: np.ndarray, size: int, count: int, *, pixels: torch.Tensor | None = None
) -> dict[str, np.ndarray]:
    """Scores, labels and boxes of an image, and masks if there are any. `pixels`: what `prepared` gave for it."""
    with torch.no_grad():
        output = model.eval()(prepared(image, size) if pixels is None else pixels)
    (found,) = PostProcess(count)(output, torch.tensor([image.shape[:2]]))
    found = {name: x.numpy() for name, x in found.items()}
    if "masks" in found:
        found["masks"] = found["masks"][:, 0]
    return found


@contextmanager
def fixed_points() -> Iterator[None]:
    """Draws the points of masks by `rf_detr_tiny.points`."""
    rand = torch.rand

    def draw(*shape: int, **options: Any) -> torch.Tensor:
        if len(shape) != 3:
            return rand(*shape, **options)
        return torch.from_numpy(tiny.points(shape[1])).to(torch.get_default_dtype()).expand(shape[0], -1, -1).clone()

    torch.rand = draw
    try:
        yield
    finally:
        torch.rand = rand


@contextmanager
def double_precision() -> Iterator[None]:
    """Makes conversions to float32 conversions to float64."""
    to_float = torch.Tensor.float
    torch.Tensor.float = lambda self, *_, **__: self.double()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.Tensor.float = to_float
        torch.set_default_dtype(torch.float32)


def losses(
    model: torch.nn.Module,
    criterion: torch.nn.Module,
    pixels: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    masks: np.ndarray,
    valid: np.ndarray,
    *,
    all_groups: bool = True,
) -> dict[str, torch.Tensor]:
    """The weighted losses of a batch, summed over layers, by the names that they have here.

    Without `all_groups`, those of the first group of queries, as if there were no other.
    """
    height, width = pixels.shape[1:3]
    dtype = next(model.parameters()).dtype
    mean, std = (torch.tensor(values, dtype=dtype) * 255 for values in (MEAN, STD))
    images = ((torch.from_numpy(pixels).to(dtype) - mean) / std).permute(0, 3, 1, 2)
    objects = []
    for i, rows in enumerate(valid):
        x = torch.from_numpy(boxes[i, rows]).to(dtype) / torch.tensor([width, height] * 2, dtype=dtype)
        cxcywh = torch.cat([(x[:, :2] + x[:, 2:]) / 2, x[:, 2:] - x[:, :2]], dim=1)
        objects.append({"boxes": cxcywh, "labels": torch.from_numpy(labels[i, rows]).long()})
        if "masks" in criterion.losses:
            objects[-1]["masks"] = torch.from_numpy(masks[i, rows])
    model.train(all_groups)
    criterion.train(all_groups)
    with fixed_points():
        terms = criterion(model(images), objects)
    names = {"loss_class": "loss_ce", "loss_l1": "loss_bbox", "loss_giou": "loss_giou"}
    names |= {"loss_mask": "loss_mask_ce", "loss_dice": "loss_mask_dice"}
    weights = criterion.weight_dict
    result = {}
    for ours, theirs in names.items():
        values = [weights[name] * terms[name] for name in terms if name.startswith(theirs) and name in weights]
        if values:
            result[ours] = sum(values[1:], values[0])
    return result
