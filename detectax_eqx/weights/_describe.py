"""What a file of weights seems to be, told by torchvision's names and their shapes."""

import re
from collections.abc import Mapping
from typing import Any

from ._trees import WeightsError


# Blocks per stage, and whether they are bottlenecks.
_RESNETS: dict[tuple[bool, tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2)): "ResNet-18",
    (False, (3, 4, 6, 3)): "ResNet-34",
    (True, (3, 4, 6, 3)): "ResNet-50",
    (True, (3, 4, 23, 3)): "ResNet-101",
    (True, (3, 8, 36, 3)): "ResNet-152",
}
# Parts of names that only one kind of detector has; the first that is found counts.
_DETECTORS = (
    ("roi_heads.mask_predictor.", "Mask R-CNN"),
    ("roi_heads.keypoint_predictor.", "Keypoint R-CNN"),
    ("roi_heads.box_predictor.", "Faster R-CNN"),
    ("head.regression_head.bbox_ctrness.", "FCOS"),
    ("head.classification_head.conv", "RetinaNet"),
    ("head.classification_head.", "SSD"),
)
_STEM = 64  # channels of the first convolution of every published ResNet


def describe(arrays: Mapping[str, Any]) -> str | None:
    """What a model with these parameters is, such as `"a Faster R-CNN on a ResNet-18 with 91 outputs"`, or `None`.

    - `arrays`: anything with a shape, under torchvision's names.

    >>> import numpy as np
    >>> blocks = {f"layer{i}.{j}.conv2.weight": np.zeros(1) for i in (1, 2, 3, 4) for j in (0, 1)}
    >>> describe({"conv1.weight": np.zeros((64, 3, 7, 7)), "bn1.running_var": np.zeros(64), **blocks})
    'a ResNet-18'
    """
    prefix = "backbone.body." if any(name.startswith("backbone.body.") for name in arrays) else ""
    body = _body({name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)})
    detector = next((kind for part, kind in _DETECTORS if any(name.startswith(part) for name in arrays)), None)
    if detector is not None:
        second = " of the second version" if any(name.startswith("rpn.head.conv.1.") for name in arrays) else ""
        outputs = next((a.shape[0] for name, a in arrays.items() if name.endswith("box_predictor.cls_score.bias")), 0)
        return f"a {detector}{second} on {body or 'a backbone'}{f' with {outputs} outputs' if outputs else ''}"
    if body is not None and "fc.weight" in arrays:
        classes = arrays["fc.weight"].shape[0]
        return f"{body} {'ImageNet ' if classes == 1000 else ''}classifier with {classes} classes"
    return body


def _body(arrays: Mapping[str, Any]) -> str | None:
    """The ResNet with these parameters, or `None` if they are no ResNet's."""
    blocks = {match.groups() for name in arrays if (match := re.match(r"layer([1-4])\.(\d+)\.", name))}
    if "conv1.weight" not in arrays or not blocks:
        return None
    counts = tuple(sum(stage == str(k) for stage, _ in blocks) for k in (1, 2, 3, 4))
    name = _RESNETS.get(("layer1.0.conv3.weight" in arrays, counts), f"ResNet of {'-'.join(map(str, counts))} blocks")
    width = arrays["conv1.weight"].shape[0]
    width = "" if width == _STEM else f" of width {width}"
    return f"a {name}{width}{'' if 'bn1.running_var' in arrays else ' with GroupNorm'}"


def explain(error: WeightsError, source: str, arrays: Mapping[str, Any], wanted: Mapping[str, Any]) -> WeightsError:
    """The error of weights that do not fit, with a first line that says what they seem to be, if that is why.

    - `arrays`: of the source, and `wanted`: of the model, both under torchvision's names.
    """
    theirs, ours = describe(arrays), describe(wanted)
    backbone = {name: array for name, array in arrays.items() if not name.startswith("fc.")}
    if theirs is None or ours in (theirs, describe(backbone)):
        return error
    line = f"{source} seems to be {theirs}{f', but the model is {ours}' if ours else ''}."
    return WeightsError(f"{line}\n{error}", missing=error.missing, unused=error.unused, mismatched=error.mismatched)
