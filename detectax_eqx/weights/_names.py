"""Names that parameters had once, in torchvision and here, and what wrappers and trainers put around them."""

import re
from collections.abc import Mapping
from typing import Any


# torchvision renamed layers over time; its published checkpoints keep the first names.
_FIRST_NAMES = (
    (r"\b(inner_blocks|layer_blocks)\.(\d)\.(weight|bias)$", r"\1.\2.0.\3"),
    (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
    (r"\bmask_head\.mask_fcn(\d)\.", lambda m: f"mask_head.{int(m[1]) - 1}.0."),
    # RetinaNet's convolutions and ReLUs were one list: 0, 2, 4, 6.
    (r"_head\.conv\.([0246])\.(weight|bias)$", lambda m: f"_head.conv.{int(m[1]) // 2}.0.{m[2]}"),
)
# This package had a Faster R-CNN within its Mask R-CNN, and one convolution in its region proposal network.
_OWN_FIRST_NAMES = ((r"^faster_rcnn\.", ""), (r"^rpn\.conv\.", "rpn.convs.0."))
# What wrappers put before every name: DataParallel, Lightning and other trainers, torch.compile.
_PREFIXES = ("module.", "model.", "_orig_mod.")
# Counters that are not parameters: of batches, and of the models that an average is of.
_COUNTERS = re.compile(r"(^|\.)(num_batches_tracked|n_averaged)$")


def current_name(name: str) -> str:
    """torchvision's name of today for one that it gave up. Other detectors may have that name: check first."""
    return _rename(name, _FIRST_NAMES)


def current_own_name(name: str) -> str:
    """This package's name of today for one that it gave up."""
    return _rename(name, _OWN_FIRST_NAMES)


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
