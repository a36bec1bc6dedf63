"""Detectron2's and Caffe2's parameter names, and where Detectron2 arranges parameters in another way, as data."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from .. import models, nn
from ._rename import FieldNames, Names, foreign_names


# Entries of a file that are not parameters.
_IGNORED = re.compile(
    r"(^|\.)(num_batches_tracked|pixel_mean|pixel_std)$|anchor_generator\.cell_anchors\.|\.relative_position_index$|^(fc1000|pred|stem\.fc)[._]"
)
# Caffe2's names of a ResNet.
_CAFFE2_BLOCK = re.compile(r"^res(\d)_(\d+)_branch(1|2a|2b|2c)_(w|bn_s|bn_b|bn_rm|bn_riv)$")
_CAFFE2_STEM = {"conv1_w": "weight"} | {
    f"{prefix}_bn_{code}": f"norm.{name}"
    for prefix in ("res_conv1", "conv1")
    for code, name in (("s", "weight"), ("b", "bias"), ("rm", "running_mean"), ("riv", "running_var"))
}
_CAFFE2_LAYERS = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
_CAFFE2_KINDS = {
    "w": "weight",
    "bn_s": "norm.weight",
    "bn_b": "norm.bias",
    "bn_rm": "norm.running_mean",
    "bn_riv": "norm.running_var",
}


def is_ignored(name: str) -> bool:
    """Whether an entry of a file is not a parameter: a counter, preprocessing, anchors or a classifier's last layer."""
    return _IGNORED.search(name) is not None


def current_detectron2_name(name: str) -> str:
    """Replaces a name of Caffe2's ResNets by Detectron2's.

    >>> current_detectron2_name("res2_0_branch2a_bn_s")
    'res2.0.conv1.norm.weight'
    """
    if name in _CAFFE2_STEM:
        return f"stem.conv1.{_CAFFE2_STEM[name]}"
    if match := _CAFFE2_BLOCK.match(name):
        stage, block, layer, kind = match.groups()
        return f"res{stage}.{block}.{_CAFFE2_LAYERS[layer]}.{_CAFFE2_KINDS[kind]}"
    return name


def _box_head(stage: str) -> FieldNames:
    """The names of a box head's fields. `stage`: in a cascade, its number after a dot."""
    return {
        "fc6": f"box_head{stage}.fc1",
        "fc7": f"box_head{stage}.fc2",
        "convs": lambda i: f"box_head{stage}.conv{i + 1}",
        "norms": lambda i: f"box_head{stage}.conv{i + 1}.norm",
        "fc": f"box_head{stage}.fc1",
        "class_logits": f"box_predictor{stage}.cls_score",
        "box_deltas": f"box_predictor{stage}.bbox_pred",
    }


def _simple_level(i: int) -> FieldNames:
    """The names of the fields of a level in ViTDet's pyramid, whose layers form one list: P2 has the most."""
    level = f"simfp_{i + 2}"
    convs = (4, 1, 0, 1)[i]  # position of the first convolution; those before it are upsampling, or pooling in P5
    return {
        "upsample": lambda j: f"{level}.{3 * j}",
        "norm": f"{level}.1",
        "lateral": f"{level}.{convs}",
        "lateral_norm": f"{level}.{convs}.norm",
        "output": f"{level}.{convs + 1}",
        "output_norm": f"{level}.{convs + 1}.norm",
    }


def _names(first_level: int, rpn_depth: int) -> Names:
    """The names of fields, for a pyramid from P`first_level` on and an RPN of `rpn_depth` convolutions."""
    return {
        models.FasterRCNN: {"rpn": "proposal_generator.rpn_head", "box_head": "roi_heads"},
        models.MaskRCNN: {
            "rpn": "proposal_generator.rpn_head",
            "box_head": "roi_heads",
            "mask_head": "roi_heads.mask_head",
        },
        models.KeypointRCNN: {
            "rpn": "proposal_generator.rpn_head",
            "box_head": "roi_heads",
            "keypoint_head": "roi_heads.keypoint_head",
        },
        models.RPN: {
            "convs": lambda i: "conv" if rpn_depth == 1 else f"conv.conv{i}",
            "objectness": "objectness_logits",
            "deltas": "anchor_deltas",
        },
        models.BoxHead: _box_head(""),
        models.ConvBoxHead: _box_head(""),
        models.CascadeHead: {"stages": lambda i: _box_head(f".{i}")},
        models.MaskHead: {
            "convs": lambda i: f"mask_fcn{i + 1}",
            "norms": lambda i: f"mask_fcn{i + 1}.norm",
            "upsample": "deconv",
            "mask_logits": "predictor",
        },
        models.KeypointHead: {"convs": lambda i: f"conv_fcn{i + 1}", "heatmaps": "score_lowres"},
        # In a tower of Detectron2, convolutions and ReLUs form one list.
        models.RetinaNet: {
            "class_tower": {"convs": lambda i: f"head.cls_subnet.{2 * i}"},
            "class_logits": "head.cls_score",
            "box_tower": {"convs": lambda i: f"head.bbox_subnet.{2 * i}"},
            "deltas": "head.bbox_pred",
        },
        nn.BackboneWithFPN: {"body": "bottom_up", "fpn": ""},
        nn.FPN: {
            "lateral": lambda i: f"fpn_lateral{first_level + i}",
            "lateral_norms": lambda i: f"fpn_lateral{first_level + i}.norm",
            "output": lambda i: f"fpn_output{first_level + i}",
            "output_norms": lambda i: f"fpn_output{first_level + i}.norm",
            "top": "top_block",
        },
        nn.ResNet: {"conv1": "stem.conv1", "norm1": "stem.conv1.norm", "layers": lambda i: f"res{i + 2}"},
        nn.BasicBlock: {"norm1": "conv1.norm", "norm2": "conv2.norm", "downsample": "shortcut"},
        nn.Bottleneck: {"norm1": "conv1.norm", "norm2": "conv2.norm", "norm3": "conv3.norm", "downsample": "shortcut"},
        nn.Downsample: {"conv": "", "norm": "norm"},
        nn.ViTFPN: {"body": "net", "levels": _simple_level},
        nn.WindowedViT: {
            "patches": "patch_embed.proj",
            "positions": "pos_embed",
            "class_token": {"token": "cls_token", "position": "cls_position"},
        },
        nn.ViT: {"patches": "patch_embed.proj", "positions": "pos_embed", "class_token": "cls_token"},
        nn.PatchPositions: {"table": ""},
        nn.TransformerBlock: {"attention": "attn", "scale1": "ls1", "scale2": "ls2"},
        nn.LayerScale: {"scale": "gamma"},
        nn.SelfAttention: {"projection": "proj", "positions": ""},
        nn.Swin: {
            "patches": "patch_embed.proj",
            "patch_norm": "patch_embed.norm",
            "merges": "layers.{i}.downsample",
            "norms": lambda i: f"norm{i}",
        },
        nn.PositionBias: {"table": "relative_position_bias_table"},
        nn.RelativeOffsets: {"vertical": "rel_pos_h", "horizontal": "rel_pos_w"},
    }


def _part(model: Any, kind: type) -> Any:
    """The first part of a model of this class, or `None`."""
    parts = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, kind))
    return next((part for part in parts if isinstance(part, kind)), None)


def detectron2_names(model: Any) -> dict[str, str]:
    """Maps the names of `named_leaves(model)` to Detectron2's names."""
    pyramid, rpn = _part(model, nn.FPN), _part(model, models.RPN)
    levels = 4 if pyramid is None else len(pyramid.lateral)  # up to P5
    return foreign_names(model, _names(6 - levels, 1 if rpn is None else len(rpn.convs)))


class Layout(NamedTuple):
    """How Detectron2 arranges a parameter.

    - `pattern`: of its name. `to_ours`, `to_theirs`: rearrange an array.
    """

    pattern: re.Pattern[str]
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


def layouts(model: Any, *, bgr: bool) -> tuple[Layout, ...]:
    """The parameters of a model that Detectron2 arranges in another way. `bgr`: whether its images are BGR."""
    rules = [
        # The background is Detectron2's last class and our first. It has neither a box nor a mask there.
        (r"^roi_heads\.box_predictor\.(\d\.)?cls_score\.", _last_first, _first_last),
        (r"^roi_heads\.mask_head\.predictor\.", _after_zeros(1), lambda x: x[1:]),
    ]
    if _part(model, models.CascadeHead) is None:  # its stages have one box for all classes
        rules.append((r"^roi_heads\.box_predictor\.bbox_pred\.", _after_zeros(4), lambda x: x[4:]))
    # Queries, keys and values are rows of one layer.
    rules.append((r"\.attn\.qkv\.", in_three, lambda x: x.reshape(-1, *x.shape[2:])))
    # The first position is that of the class token, which detectors do not have.
    rules.append((r"(^|\.)pos_embed$", lambda x: x[0, 1:], lambda x: _after_zeros(1)(x)[None]))
    if bgr:  # (o, i, k, k)
        rules.append((r"(^|^backbone\.bottom_up\.)stem\.conv1\.weight$", _reversed_inputs, _reversed_inputs))
    if type(model) is models.RetinaNet:
        # Our anchors of a cell are ordered by ratio, then by size; Detectron2's the other way round.
        sizes, ratios = len(model.anchor_sizes[0]), len(model.aspect_ratios)
        rules.append((r"^head\.(cls_score|bbox_pred)\.", _transposed(sizes, ratios), _transposed(ratios, sizes)))
    return tuple(Layout(re.compile(pattern), *functions) for pattern, *functions in rules)


def _last_first(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x[-1:], x[:-1]])


def _first_last(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x[1:], x[:1]])


def _after_zeros(count: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: np.concatenate([np.zeros((count, *x.shape[1:]), x.dtype), x])


def in_three(x: np.ndarray) -> np.ndarray:
    """Cuts the rows into three equal parts, if possible; other shapes are reported later."""
    return x if not x.ndim or x.shape[0] % 3 else x.reshape(3, -1, *x.shape[1:])


def _reversed_inputs(x: np.ndarray) -> np.ndarray:
    return x[:, ::-1]


def _transposed(rows: int, columns: int) -> Callable[[np.ndarray], np.ndarray]:
    """Transposes the first axis as `(rows, columns)` blocks."""

    def transpose(x: np.ndarray) -> np.ndarray:
        if x.shape[0] % (rows * columns):
            return x  # of another number of anchors, which is reported
        return x.reshape(rows, columns, -1).swapaxes(0, 1).reshape(x.shape)

    return transpose
