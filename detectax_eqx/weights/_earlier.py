"""Where arrays lie in the checkpoints of runs from before a detector had a preprocessing of its own."""

from typing import Any

from ._trees import named_leaves


def earlier_paths(model: Any) -> dict[str, str]:
    """The path of each of a detector's arrays in such a checkpoint, by the array's name in the model of today.

    A mask head stood beside a detector of its own there, and the RPN had one convolution.

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
