"""Identifies the model of a weights file from the names and shapes of its parameters."""

import re
from collections.abc import Mapping
from typing import Any

from ._names import current_name
from ._trees import WeightsError


# Keyed by whether the blocks are bottlenecks, and the number of blocks per stage.
_RESNETS: dict[tuple[bool, tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2)): "ResNet-18",
    (False, (3, 4, 6, 3)): "ResNet-34",
    (True, (3, 4, 6, 3)): "ResNet-50",
    (True, (3, 4, 23, 3)): "ResNet-101",
    (True, (3, 8, 36, 3)): "ResNet-152",
}
# Prefixes of names that identify a kind of detector, torchvision's and this package's. The first match counts.
_CASCADE = ("roi_heads.box_predictor.0.", "box_head.stages.")
_DETECTORS = (
    (("backbone.0.encoder.blocks.",), "LW-DETR"),
    (("transformer.level_embed", "references."), "Deformable DETR"),
    (("transformer.enc_out", "first_stage."), "RF-DETR"),
    (("transformer.encoder.", "encoder.0.linear1."), "DETR"),
    (("roi_heads.mask_predictor.", "roi_heads.mask_head.", "mask_head."), "Mask R-CNN"),
    (("roi_heads.keypoint_predictor.", "roi_heads.keypoint_head.", "keypoint_head."), "Keypoint R-CNN"),
    (("roi_heads.box_predictor.", "box_head."), "Faster R-CNN"),
    (("head.regression_head.bbox_ctrness.", "centerness."), "FCOS"),
    (("head.classification_head.conv", "head.cls_subnet.", "class_tower."), "RetinaNet"),
    (("head.classification_head.", "class_heads."), "SSD"),
)
# Bodies other than ResNets, by a pattern in torchvision's names or this package's.
_OTHER_BODIES = (
    (re.compile(r"(^|\.)\d+\.block\.\d|layers\.\d+\.layers\.2\.fc1\."), "MobileNetV3"),
    (re.compile(r"(^|\.)(features\.28|extra\.0\.5|convs\.12)\.weight$"), "VGG-16"),
    (re.compile(r"(^|\.)\d+\.conv\.\d|layers\.\d+\.layers\.2\.weight"), "MobileNetV2"),
)
# Prefixes of a body's names in torchvision, which this package shares, and in Detectron2.
_BODIES = ("backbone.body.", "backbone.bottom_up.", "backbone.0.body.")
_HEATMAPS = ("keypoint_predictor.kps_score_lowres.bias", "keypoint_head.heatmaps.bias")
_CLASS_LOGITS = (
    "class_embed.0.bias",
    "head.cls_score.bias",
    "box_predictor.cls_score.bias",
    "box_predictor.0.cls_score.bias",
    "classification_head.cls_logits.bias",
    "class_logits.bias",
    "class_embed.bias",
)
# The box outputs of dense detectors, four per anchor. Their class outputs are also per anchor.
_DENSE_DELTAS = ("head.regression_head.bbox_reg.bias", "head.bbox_pred.bias", "deltas.bias")
_SECOND_RPN = ("rpn.head.conv.1.", "rpn.convs.1.")
_STEM = 64  # channels of the first convolution in every published ResNet


def describe(arrays: Mapping[str, Any]) -> str | None:
    """Describes the model with these parameters, for example `"a Faster R-CNN on a ResNet-18 with 91 outputs"`.

    Returns `None` if the model is not recognised.

    - `arrays`: objects with a `shape`, under torchvision's names or this package's.

    >>> import numpy as np
    >>> blocks = {f"layer{i}.{j}.conv2.weight": np.zeros(1) for i in (1, 2, 3, 4) for j in (0, 1)}
    >>> describe({"conv1.weight": np.zeros((64, 3, 7, 7)), "bn1.running_var": np.zeros(64), **blocks})
    'a ResNet-18'
    """
    arrays = {current_name(name): array for name, array in arrays.items()}
    prefix = next((prefix for prefix in _BODIES if any(name.startswith(prefix) for name in arrays)), "")
    body = _body({name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)})
    body = body or next((f"a {kind}" for pattern, kind in _OTHER_BODIES if any(map(pattern.search, arrays))), None)
    detector = next((kind for parts, kind in _DETECTORS if any(name.startswith(parts) for name in arrays)), None)
    if detector is not None:
        if any(name.startswith(_CASCADE) for name in arrays):
            detector = f"Cascade {detector.removeprefix('Faster ')}"
        source = " of Detectron2" if prefix == _BODIES[1] else ""
        second = " of the second version" if any(name.startswith(_SECOND_RPN) for name in arrays) else ""
        logits = next((array.shape for name, array in arrays.items() if name.endswith(_CLASS_LOGITS)), ())
        outputs = logits[-1] if logits else 0  # RF-DETR has an axis of groups before them
        anchors = next((_length(array) // 4 for name, array in arrays.items() if name in _DENSE_DELTAS), 1)
        with_outputs = f" with {outputs // anchors} outputs" if outputs and anchors else ""
        points = next((_length(array) for name, array in arrays.items() if name.endswith(_HEATMAPS)), 0)
        with_outputs += f" and {points} keypoints" if points else ""
        article = "an" if detector.startswith(("RF", "LW")) else "a"
        return f"{article} {detector}{source}{second} on {body or 'a backbone'}{with_outputs}"
    last = max((name for name in arrays if re.fullmatch(r"(fc|classifier\.\d)\.weight", name)), default=None)
    if body is not None and last is not None:
        classes = _length(arrays[last])
        return f"{body} {'ImageNet ' if classes == 1000 else ''}classifier with {classes} classes"
    return body


def _length(array: Any) -> int:
    """The first side of an array's shape, 0 for a scalar."""
    return array.shape[0] if array.shape else 0


def _body(arrays: Mapping[str, Any]) -> str | None:
    """Describes the ResNet or its variant with these parameters; `None` if they do not belong to a ResNet."""
    arrays = {_block_name(name): array for name, array in arrays.items()}
    blocks = {match.groups() for name in arrays if (match := re.match(r"layer([1-4])\.(\d+)\.", name))}
    if "conv1.weight" not in arrays or not blocks:
        return None
    counts = tuple(sum(stage == str(k) for stage, _ in blocks) for k in (1, 2, 3, 4))
    name = _RESNETS.get(("layer1.0.conv3.weight" in arrays, counts), f"ResNet of {'-'.join(map(str, counts))} blocks")
    width = _length(arrays["conv1.weight"])
    middle = getattr(arrays.get("layer1.0.conv2.weight"), "shape", ())  # (channels, channels per group, 3, 3)
    if "layer1.0.conv3.weight" in arrays and len(middle) == 4 and middle[:2] != (width, width):
        groups, depth = middle[0] // middle[1], name.removeprefix("ResNet-")
        wide = f"Wide ResNet-{depth}-{middle[0] // width}"
        name = wide if groups == 1 else f"ResNeXt-{depth} {groups}x{middle[1]}d"
    width = "" if width == _STEM else f" of width {width}"
    return f"a {name}{width}{'' if 'bn1.running_var' in arrays else ' with GroupNorm'}"


def _block_name(name: str) -> str:
    """Returns torchvision's name of a ResNet parameter from any name, as far as this file needs it."""
    name = re.sub(r"^layers\.(\d)\.", lambda m: f"layer{int(m[1]) + 1}.", re.sub(r"^norm1\.", "bn1.", name))
    name = re.sub(r"^res([2-5])\.", lambda m: f"layer{int(m[1]) - 1}.", name)
    return re.sub(r"^stem\.conv1\.(norm\.)?", lambda m: "bn1." if m[1] else "conv1.", name)


def explain(error: WeightsError, source: str, arrays: Mapping[str, Any], wanted: Mapping[str, Any]) -> WeightsError:
    """Prepends a line to an error that says which model the weights seem to belong to, if it is a different model.

    - `arrays`: the arrays of the source, as for `describe`.
    - `wanted`: the arrays of the model, as for `describe`.
    """
    theirs, ours = describe(arrays), describe(wanted)
    backbone = {name: array for name, array in arrays.items() if not name.startswith(("fc.", "classifier."))}
    if theirs is None or ours in (theirs, describe(backbone)):
        return error
    line = f"{source} seems to be {theirs}{f', but the model is {ours}' if ours else ''}."
    return WeightsError(f"{line}\n{error}", missing=error.missing, unused=error.unused, mismatched=error.mismatched)
