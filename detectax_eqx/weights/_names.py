"""Former names of parameters in torchvision and in this package, and prefixes that wrappers and trainers add."""

import re
from collections.abc import Mapping
from typing import Any


# torchvision renamed layers over time; its published checkpoints keep the original names.
_FORMER_NAMES = (
    (r"\b(inner_blocks|layer_blocks)\.(\d)\.(weight|bias)$", r"\1.\2.0.\3"),
    (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
    (r"\bmask_head\.mask_fcn(\d)\.", lambda m: f"mask_head.{int(m[1]) - 1}.0."),
    # RetinaNet kept convolutions and ReLUs in one list. The convolutions were at 0, 2, 4 and 6.
    (r"_head\.conv\.([0246])\.(weight|bias)$", lambda m: f"_head.conv.{int(m[1]) // 2}.0.{m[2]}"),
)
# Earlier versions of this package nested a Faster R-CNN in Mask R-CNN, and had one convolution in the RPN.
_OWN_FORMER_NAMES = ((r"^faster_rcnn\.", ""), (r"^rpn\.conv\.", "rpn.convs.0."))
# Prefixes that wrappers add to every name: DataParallel, Lightning and other trainers, torch.compile.
_PREFIXES = ("module.", "model.", "_orig_mod.")
# Counters that are not parameters: of batches, and of the models in an average.
_COUNTERS = re.compile(r"(^|\.)(num_batches_tracked|n_averaged)$")


def current_torchvision_name(name: str) -> str:
    """Replaces a former torchvision name by the current one. Other detectors may still use the name: check first."""
    return _rename(name, _FORMER_NAMES)


def current_name(name: str) -> str:
    """Replaces the name that an array of a detector had in earlier versions of this package by its current name.

    >>> current_name("faster_rcnn.rpn.conv.weight")
    'rpn.convs.0.weight'
    """
    return _rename(name, _OWN_FORMER_NAMES)


def is_counter(name: str) -> bool:
    """Whether an entry is a counter of batches or of averaged models, not a parameter."""
    return _COUNTERS.search(name) is not None


def without_prefixes(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Removes wrapper prefixes that all names share."""
    while prefix := next((p for p in _PREFIXES if arrays and all(name.startswith(p) for name in arrays)), None):
        arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
    return dict(arrays)


def _rename(name: str, rules: tuple[tuple[str, Any], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
