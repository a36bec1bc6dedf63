"""torchvision's parameters, by name, both ways."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from ._pth import read_pth
from ._trees import LISTED, WeightsError, named_leaves, named_values, replace_leaves


Model = TypeVar("Model", bound=eqx.Module)

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


def load_torchvision(model: Model, source: str | os.PathLike | Mapping[str, Any]) -> Model:
    """A copy of `model` with torchvision's parameters.

    - `model`: a `FasterRCNN` or `MaskRCNN` of one of the builders, or a `ResNet` for an ImageNet classifier's
      checkpoint, whose `fc` layer is left aside. Its shapes are enough (`equinox.filter_eval_shape`).
    - `source`: a `.pth` file, read without torch and without running anything in it, or a mapping from torchvision's
      names to arrays.

    Every parameter of the model is written and every entry of the source used; otherwise a `WeightsError` lists what is
    missing, left over, of another shape or no floats, or has numbers that are not finite. BatchNorm's
    counters (`num_batches_tracked`) do not count.

    torchvision's detectors count the background among their classes: their 91 are `num_classes=90` here, and label `k`
    here is their `k + 1`.

    >>> import jax.random as jr
    >>> from detectax_eqx.nn import resnet18
    >>> body = resnet18(key=jr.key(0), width=8)
    >>> arrays = to_torchvision(body)
    >>> arrays["layer1.0.bn1.running_var"].shape
    (8,)
    >>> loaded = load_torchvision(body, arrays)
    """
    arrays = read_pth(source) if isinstance(source, str | os.PathLike) else source
    # A classifier's last layer has no place in a backbone, and is told by the absence of any detector's prefix.
    classifier = not any(name.startswith("backbone.") for name in arrays)
    wanted = {_rename(name, _TO_TORCHVISION): (name, leaf) for name, leaf in named_leaves(model).items()}
    replacements, broken = {}, []
    for name, array in arrays.items():
        if name.endswith("num_batches_tracked") or (classifier and name in ("fc.weight", "fc.bias")):
            continue
        name = _rename(name, _FIRST_NAMES)
        ours, leaf = wanted.get(name, (name, None))
        array = np.asarray(array)
        # What does not fit stays as it is, to be told of: only then is nothing copied that a shape alone makes large.
        if leaf is not None and array.shape == leaf.shape and jnp.issubdtype(array.dtype, jnp.floating):
            with np.errstate(over="ignore"):
                array = array.astype(leaf.dtype)
            if not np.isfinite(array).all():
                broken.append(name)
        replacements[ours] = array
    origin = Path(source).name if isinstance(source, str | os.PathLike) else "the given arrays"
    loaded = replace_leaves(model, replacements, source=origin)
    if broken:
        raise WeightsError(f"{origin} has numbers that are not finite, in {', '.join(broken[:LISTED])}.")
    return loaded


def load_torchvision_backbone(model: Model, source: str | os.PathLike | Mapping[str, Any]) -> Model:
    """A copy of a detector whose ResNet has the parameters of an ImageNet classifier's checkpoint.

    `source` is as for `load_torchvision`. The pyramid and the heads keep their values.

    >>> import jax.random as jr
    >>> from detectax_eqx.models import FasterRCNN
    >>> from detectax_eqx.nn import ResNetFPN, resnet18
    >>> backbone = ResNetFPN(resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    >>> model = FasterRCNN(backbone, 3, key=jr.key(2), hidden_size=32)
    >>> arrays = to_torchvision(resnet18(key=jr.key(3), width=8))
    >>> loaded = load_torchvision_backbone(model, arrays)
    >>> bool((loaded.backbone.body.conv1.weight == arrays["conv1.weight"]).all())
    True
    """

    def body(tree):
        return getattr(tree, "faster_rcnn", tree).backbone.body

    return eqx.tree_at(body, model, load_torchvision(body(model), source))


def to_torchvision(model: eqx.Module) -> dict[str, np.ndarray]:
    """The model's parameters under torchvision's names, for `load_state_dict` after `torch.from_numpy`.

    The inverse of `load_torchvision`; takes the same models. Raises a `ValueError` for shapes without values.

    >>> import jax.random as jr
    >>> from detectax_eqx.nn import resnet18
    >>> to_torchvision(resnet18(key=jr.key(0), width=8))["layer4.1.conv2.weight"].shape
    (64, 64, 3, 3)
    """
    return {_rename(name, _TO_TORCHVISION): np.array(leaf) for name, leaf in named_values(model).items()}


def _rename(name: str, rules: tuple[tuple[str, Any], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
