"""Conversion of parameters from DETR and Deformable DETR, and to them, by name."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import numpy as np
from jaxtyping import Shaped

from .. import models, nn
from ._detectron2_names import in_three
from ._load import load_named
from ._names import is_counter, without_prefixes
from ._rename import Names, foreign_names
from ._source import arrays_by_name
from ._torchvision_names import TORCHVISION
from ._trees import named_leaves, named_values


Model = TypeVar("Model", bound=eqx.Module)

# The norm after each attention of the decoder, which has another order there.
_DEFORMABLE_LAYER = {"self_attention": "self_attn", "cross_attention": "cross_attn", "norm1": "norm2", "norm2": "norm1"}
_DEFORMABLE_LAYER |= {name: name for name in ("linear1", "linear2", "norm3")}


def _deformable_layer(i: int) -> dict[str, str]:
    """The fields of a layer of Deformable DETR's decoder."""
    return {ours: f"transformer.decoder.layers.{i}.{theirs}" for ours, theirs in _DEFORMABLE_LAYER.items()}


# Stands for the number of layers of the decoder, after whose predictions those of a first stage follow.
_AFTER_LAST = "layers"
# The names of facebookresearch's files, and of fundamentalvision's.
_NAMES: Names = {
    nn.ResNet: TORCHVISION[nn.ResNet],
    nn.BasicBlock: TORCHVISION[nn.BasicBlock],
    nn.Bottleneck: TORCHVISION[nn.Bottleneck],
    nn.Downsample: TORCHVISION[nn.Downsample],
    nn.ProjectedResNet: {"body": "backbone.0.body", "projection": "input_proj"},
    nn.ProjectedLevels: {"body": "backbone.0.body", "projections": "input_proj.{i}.0", "norms": "input_proj.{i}.1"},
    models.DETR: {
        "backbone": "",
        "encoder": "transformer.encoder.layers.{i}",
        "queries": "query_embed",
        "decoder": "transformer.decoder.layers.{i}",
        "norm": "transformer.decoder.norm",
        "class_logits": "class_embed",
        "boxes": "bbox_embed",
    },
    models.DeformableDETR: {
        "backbone": "",
        "levels": "transformer.level_embed",
        "encoder": "transformer.encoder.layers.{i}",
        "queries": "",
        "decoder": _deformable_layer,
        "class_logits": "class_embed.{i}",
        "deltas": "bbox_embed.{i}",
    },
    models.LearnedQueries: {"table": "query_embed", "references": "transformer.reference_points"},
    models.CellQueries: {
        "projection": "transformer.enc_output",
        "norm": "transformer.enc_output_norm",
        "class_logits": f"class_embed.{_AFTER_LAST}",
        "deltas": f"bbox_embed.{_AFTER_LAST}",
        "positions": "transformer.pos_trans",
        "positions_norm": "transformer.pos_trans_norm",
    },
    models.EncoderLayer: {"attention": "self_attn"},
    models.DecoderLayer: {"self_attention": "self_attn", "cross_attention": "multihead_attn"},
    nn.QueryAttention: {"qkv": {"weight": "in_proj_weight", "bias": "in_proj_bias"}, "projection": "out_proj"},
    nn.DeformableAttention: {
        "offsets": "sampling_offsets",
        "weights": "attention_weights",
        "values": "value_proj",
        "projection": "output_proj",
    },
}
# From Hugging Face's names, former and current, to those of the authors.
_RULES: tuple[tuple[str, str], ...] = (
    (r"^model\.backbone\.(conv_encoder\.)?model\.", "backbone.0.body."),
    (r"^model\.input_proj(ection)?\.", "input_proj."),
    (r"^model\.query_position_embeddings\.", "query_embed."),
    (r"^model\.decoder\.layernorm\.", "transformer.decoder.norm."),
    (r"^model\.(encoder|decoder|level_embed|reference_points|(?:enc_output|pos_trans)(?:_norm)?)\b", r"transformer.\1"),
    (r"^class_labels_classifier\.", "class_embed."),
    (r"^bbox_predictor\.", "bbox_embed."),
    (r"^(transformer\.encoder\..*)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"^(transformer\.encoder\..*)\.final_layer_norm\.", r"\1.norm2."),
    (r"\.final_layer_norm\.", ".norm3."),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.(mlp\.)?fc([12])\.", r".linear\2."),
    # The predictions by which boxes are refined are those of the layers.
    (r"^transformer\.decoder\.(class|bbox)_embed\.", r"\1_embed."),
)
_DECODER_RULES = (
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.encoder_attn_layer_norm\.", ".norm2."),
    (r"\.encoder_attn\.", ".multihead_attn."),
)
_DEFORMABLE_RULES = (
    (r"\.self_attn_layer_norm\.", ".norm2."),
    (r"\.encoder_attn_layer_norm\.", ".norm1."),
    (r"\.encoder_attn\.", ".cross_attn."),
)
_HUGGING_FACE = re.compile(r"model\.(backbone\.(conv_encoder|model)|input_proj|query_position|encoder|decoder)")
_PARTS = ("q_proj", "k_proj", "v_proj")
# A prediction of a layer of Deformable DETR.
_PREDICTION = re.compile(r"((?:class|bbox)_embed)\.(\d+)(\..*)")


def _detr_names(model: Any) -> dict[str, str]:
    """Maps the names of `named_leaves(model)` to those that `read_detr` returns."""
    layers = str(len(model.decoder)) if isinstance(model, models.DeformableDETR) else _AFTER_LAST
    place = f"_embed.{_AFTER_LAST}."
    return {ours: theirs.replace(place, f"_embed.{layers}.") for ours, theirs in foreign_names(model, _NAMES).items()}


def read_detr(source: str | os.PathLike | Mapping[str, Any]) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Reads parameters by the names of the authors of DETR or Deformable DETR, in the arrangement of this package.

    - `source`: a `.pth` file of theirs (see `read_pth`), a `.safetensors` file of Hugging Face, or a mapping with the
      names of either.

    Queries, keys and values of an attention are stacked. Counters (`num_batches_tracked`) are dropped, and so are
    arrays that a file holds twice.

    >>> arrays = read_detr({"model.query_position_embeddings.weight": np.zeros((100, 256))})
    >>> list(arrays)
    ['query_embed.weight']
    """
    named = arrays_by_name(source)
    if not any(map(_HUGGING_FACE.match, named)):  # whose names have a prefix that is no wrapper's
        named = without_prefixes(named)
    deformable = any(".sampling_offsets." in name for name in named)
    rules = (*_RULES, *(_DEFORMABLE_RULES if deformable else _DECODER_RULES))
    arrays: dict[str, np.ndarray] = {}
    for name, array in named.items():
        new, array = _renamed(name, rules), np.asarray(array)
        if is_counter(name) or (new in arrays and np.array_equal(arrays[new], array)):
            continue
        arrays[name if new in arrays else new] = array  # one that differs stays, and is refused
    result: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        match = re.fullmatch(r"(.*_attn\.)[qkv]_proj\.(weight|bias)", name)
        parts = [] if match is None else [arrays.get(f"{match[1]}{part}.{match[2]}") for part in _PARTS]
        if match is not None and all(part is not None and part.shape == array.shape for part in parts):
            result[f"{match[1]}in_proj_{match[2]}"] = np.stack([part for part in parts if part is not None])
        else:
            result[name] = in_three(array) if re.search(r"\.in_proj_(weight|bias)$", name) else array
    return result


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def load_detr(model: Model, source: str | os.PathLike | Mapping[str, Any]) -> Model:
    """Returns a copy of `model` with parameters of DETR or Deformable DETR.

    - `model`: a detector made by `models.detr` or `models.deformable_detr`. Its shapes are sufficient
      (`equinox.filter_eval_shape`).
    - `source`: any source that `read_detr` accepts. Nothing in it is run.

    Published files use COCO's category ids as labels: there are 91 classes, and 0 is unused.

    Every parameter of the model must be in the source, and every entry of the source must be used. Otherwise, raises a
    `WeightsError` that lists entries that are missing, unused, of another shape, not floating point, or not finite.

    >>> import jax.random as jr
    >>> from detectax_eqx.models import detr
    >>> from detectax_eqx.nn import ProjectedResNet, resnet18
    >>> backbone = ProjectedResNet(resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    >>> model = detr(backbone, 3, key=jr.key(2), layers=1, queries=5, heads=2, hidden_size=8)
    >>> loaded = load_detr(model, to_detr(model))
    >>> bool((loaded.class_logits.bias == model.class_logits.bias).all())
    True
    """
    origin = Path(source).name if isinstance(source, str | os.PathLike) else "the given mapping"
    arrays, names = read_detr(source), _detr_names(model)
    wanted = set(names.values())
    repeated = {name for name in arrays.keys() - wanted if _repeats(name, arrays)}
    return load_named(model, {name: x for name, x in arrays.items() if name not in repeated}, names, origin)


def _repeats(name: str, arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether a prediction of a layer is that of the first layer, as where all layers share it."""
    match = _PREDICTION.fullmatch(name)
    first = None if match is None else arrays.get(f"{match[1]}.0{match[3]}")
    return first is not None and np.array_equal(first, arrays[name])


def detr_shapes(model: eqx.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a model's parameters by the names of `read_detr`. The model may consist of shapes only.

    >>> import jax.random as jr
    >>> from detectax_eqx.nn import ProjectedResNet, resnet18
    >>> backbone = ProjectedResNet(resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    >>> detr_shapes(backbone)["input_proj.weight"]
    (16, 64, 1, 1)
    """
    names = _detr_names(model)
    return {names[name]: tuple(leaf.shape) for name, leaf in named_leaves(model).items()}


def to_detr(model: eqx.Module) -> dict[str, np.ndarray]:
    """Returns the parameters of a model by the names of its authors, in their arrangement, for `load_state_dict`.

    The inverse of `load_detr`. A prediction that all layers of Deformable DETR share has the name of the first, and
    those by which boxes are refined are not repeated. Raises a `ValueError` for shapes without values.

    >>> import jax.random as jr
    >>> from detectax_eqx.nn import QueryAttention
    >>> to_detr(QueryAttention(8, 2, key=jr.key(0)))["in_proj_weight"].shape
    (24, 8)
    """
    names = _detr_names(model)
    arrays = {names[name]: np.array(leaf) for name, leaf in named_values(model).items()}
    return {
        name: array.reshape(-1, *array.shape[2:]) if name.endswith(("in_proj_weight", "in_proj_bias")) else array
        for name, array in arrays.items()
    }
