"""Names of parameters: this package's, torchvision's of today and of the first days, and what wrappers make of them."""

import re
from collections.abc import Mapping
from typing import Any


# From a leaf's path in our modules to torchvision's name for it. Applied in order; most layers keep their name.
_TO_TORCHVISION = (
    (r"^faster_rcnn\.", ""),
    (r"\bnorm(\d)\.", r"bn\1."),
    (r"\blayers\.(\d)\.", lambda m: f"layer{int(m[1]) + 1}."),
    (r"\bdownsample\.conv\.", "downsample.0."),
    (r"\bdownsample\.norm\.", "downsample.1."),
    (r"\bfpn\.lateral\.(\d)\.", r"fpn.inner_blocks.\1.0."),
    (r"\bfpn\.output\.(\d)\.", r"fpn.layer_blocks.\1.0."),
    (r"^rpn\.conv\.", "rpn.head.conv.0.0."),
    (r"^rpn\.objectness\.", "rpn.head.cls_logits."),
    (r"^rpn\.deltas\.", "rpn.head.bbox_pred."),
    (r"^box_head\.class_logits\.", "roi_heads.box_predictor.cls_score."),
    (r"^box_head\.box_deltas\.", "roi_heads.box_predictor.bbox_pred."),
    (r"^box_head\.", "roi_heads.box_head."),
    (r"^mask_head\.convs\.(\d)\.", r"roi_heads.mask_head.\1.0."),
    (r"^mask_head\.upsample\.", "roi_heads.mask_predictor.conv5_mask."),
    (r"^mask_head\.mask_logits\.", "roi_heads.mask_predictor.mask_fcn_logits."),
)

# torchvision renamed layers over time; its published checkpoints keep the first names.
_FIRST_NAMES = (
    (r"\b(inner_blocks|layer_blocks)\.(\d)\.(weight|bias)$", r"\1.\2.0.\3"),
    (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
    (r"\bmask_head\.mask_fcn(\d)\.", lambda m: f"mask_head.{int(m[1]) - 1}.0."),
)
# What wrappers put before every name: DataParallel, Lightning and other trainers, torch.compile.
_PREFIXES = ("module.", "model.", "_orig_mod.")
# Counters that are not parameters: of batches, and of the models that an average is of.
_COUNTERS = re.compile(r"(^|\.)(num_batches_tracked|n_averaged)$")


def to_torchvision_name(name: str) -> str:
    """torchvision's name of a parameter, for this package's; a name of torchvision's stays."""
    return _rename(name, _TO_TORCHVISION)


def current_name(name: str) -> str:
    """torchvision's name of today for any that it had."""
    return _rename(name, _FIRST_NAMES)


def is_counter(name: str) -> bool:
    """Whether an entry counts batches or averaged models, and is no parameter."""
    return _COUNTERS.search(name) is not None


def without_prefixes(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The same arrays, without the prefixes of wrappers that all names have."""
    while prefix := next((p for p in _PREFIXES if arrays and all(name.startswith(p) for name in arrays)), None):
        arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
    return dict(arrays)


def _rename(name: str, rules: tuple[tuple[str, Any], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
