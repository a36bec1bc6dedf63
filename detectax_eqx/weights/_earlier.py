"""Paths of arrays in old checkpoints, written before detectors had their own preprocessing."""

from typing import Any

from ._trees import named_leaves


def earlier_paths(model: Any) -> dict[str, str]:
    """Maps the current name of each array of a detector to its path in an old checkpoint.

    In these checkpoints, a mask head was stored beside a separate Faster R-CNN, and the RPN had one convolution.

    >>> import numpy as np
    >>> earlier_paths({"mask_head": {"bias": np.zeros(2)}, "rpn": {"convs": [{"bias": np.zeros(2)}]}})
    {'mask_head.bias': 'mask_head/bias', 'rpn.convs.0.bias': 'faster_rcnn/rpn/conv/bias'}
    """
    paths = {name: name.replace(".", "/") for name in named_leaves(model)}
    masked = any(path.startswith("mask_head/") for path in paths.values())
    return {
        name: ("faster_rcnn/" if masked and not path.startswith("mask_head/") else "")
        + path.replace("rpn/convs/0/", "rpn/conv/")
        for name, path in paths.items()
    }
