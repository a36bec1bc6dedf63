"""Conversion of parameters from RF-DETR and LW-DETR, and to them, by name."""

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
from ._lw_detr import lw_detr_names, rf_detr_names_of
from ._names import is_counter, without_prefixes
from ._rename import FieldNames, Names, foreign_names
from ._source import arrays_by_name
from ._trees import named_leaves, named_values


Model = TypeVar("Model", bound=eqx.Module)

_DETECTOR: FieldNames = {
    "backbone": "backbone.0",
    "first_stage": "transformer",
    "queries": {"features": "query_feat.weight", "boxes": "refpoint_embed.weight"},
    "decoder": "transformer.decoder",
    "class_logits": "class_embed",
    "deltas": "bbox_embed",
}
# The names of RF-DETR's files. The first stages of all groups are one module here, and have no number; queries, keys
# and values of the backbone are one array, as are those of the decoder in the file.
_NAMES: Names = {
    models.RFDETR: _DETECTOR,
    models.RFDETRSeg: _DETECTOR | {"mask_head": "segmentation_head"},
    models.QueryMaskHead: {
        "blocks": "blocks.{i}",
        "pixels": "spatial_features_proj",
        "query_block": "query_features_block",
        "queries": "query_features_proj",
    },
    models.PixelBlock: {"conv": "dwconv", "linear": "pwconv1"},
    models.QueryBlock: {"norm": "norm_in", "linear1": "layers.0", "linear2": "layers.2"},
    models.QueryHead: {
        "projection": "enc_output",
        "norm": "enc_output_norm",
        "class_logits": "enc_out_class_embed",
        "deltas": "enc_out_bbox_embed",
    },
    models.Decoder: {"positions": "ref_point_head"},
    models.DecoderLayer: {"self_attention": "self_attn", "cross_attention": "cross_attn"},
    nn.QueryAttention: {"qkv": {"weight": "in_proj_weight", "bias": "in_proj_bias"}, "projection": "out_proj"},
    nn.DeformableAttention: {
        "offsets": "sampling_offsets",
        "weights": "attention_weights",
        "values": "value_proj",
        "projection": "output_proj",
    },
    nn.ProjectedViT: {
        "body": "encoder.encoder",
        "resizes": "projector.stages_sampling.{i}",
        "projectors": "projector.stages.{i}.0",
        "norms": "projector.stages.{i}.1",
    },
    nn.WindowedViT: {
        "patches": "embeddings.patch_embeddings.projection",
        "positions": {"table": "embeddings.position_embeddings"},
        "class_token": {"token": "embeddings.cls_token", "position": "embeddings.class_position"},
        "blocks": "encoder.layer.{i}",
        "norm": "layernorm",
    },
    nn.TransformerBlock: {
        "attention": {"qkv": "attention.attention.qkv", "projection": "attention.output.dense"},
        "scale1": {"scale": "layer_scale1.lambda1"},
        "scale2": {"scale": "layer_scale2.lambda1"},
    },
    nn.C2f: {"split": "cv1", "blocks": "m.{i}", "join": "cv2"},
    nn.ConvNorm: {"norm": "bn"},
}
# Entries of a file that are not parameters, and a token that is used in the training of DINOv2 only.
_IGNORED = re.compile(r"^_kp_active_mask$|\.mask_token$")
_GROUP = re.compile(r"^(transformer\.enc_out\w*)\.(\d+)\.(.*)$")
_POSITIONS = re.compile(r"^(.*embeddings\.)position_embeddings$")
_QUERIES = ("query_feat.weight", "refpoint_embed.weight")
_PARTS = ("query", "key", "value")
_BODY = "backbone.0.encoder.encoder."


def _rf_detr_names(model: Any) -> dict[str, str]:
    """Maps the names of `named_leaves(model)` to those that `read_rf_detr` returns."""
    # Both convolutions of a block of the projector form a pair here.
    return {
        ours: re.sub(r"(\.m\.\d+)\.([01])\.", lambda m: f"{m[1]}.cv{int(m[2]) + 1}.", theirs)
        for ours, theirs in foreign_names(model, _NAMES).items()
    }


def read_rf_detr(source: str | os.PathLike | Mapping[str, Any]) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Reads parameters by RF-DETR's names, in the arrangement of this package.

    - `source`: a `.pth` or `.pt` file of RF-DETR (see `read_pth`: an average of the weights is preferred, and other
      objects in the file are ignored), a `.safetensors` file with the same names, or a mapping from names to arrays.
      Or one of LW-DETR, of its authors or of Hugging Face: names are replaced by RF-DETR's.

    The first stages of all groups are stacked. Queries, keys and values of an attention are stacked too, and the
    position of the class token is an entry of its own.

    >>> arrays = read_rf_detr({f"transformer.enc_output.{group}.bias": np.zeros(8) for group in (0, 1)})
    >>> {name: array.shape for name, array in arrays.items()}
    {'transformer.enc_output.bias': (2, 8)}
    """
    arrays = without_prefixes(arrays_by_name(source))
    ignored = {name for name in arrays if is_counter(name) or _IGNORED.search(name)}
    arrays = {name: np.asarray(array) for name, array in arrays.items() if name not in ignored}
    return _ours(rf_detr_names_of(arrays))


def _ours(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays in the arrangement of this package."""
    result: dict[str, np.ndarray] = {}
    groups: dict[str, dict[int, np.ndarray]] = {}
    for name, array in arrays.items():
        if match := _GROUP.match(name):
            groups.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = array
        elif (match := re.fullmatch(r"(.*\.attention\.attention\.)query\.(weight|bias)", name)) and all(
            f"{match[1]}{part}.{match[2]}" in arrays for part in _PARTS
        ):
            result[f"{match[1]}qkv.{match[2]}"] = np.stack([arrays[f"{match[1]}{part}.{match[2]}"] for part in _PARTS])
        elif re.search(r"\.attention\.attention\.(key|value)\.", name):
            query = re.sub(r"\.(key|value)\.", ".query.", name)
            if query not in arrays:
                result[name] = array
        elif re.search(r"\.in_proj_(weight|bias)$", name):
            in_parts = array.ndim == (3 if name.endswith("weight") else 2)
            result[name] = array if in_parts else in_three(array)
        elif (match := _POSITIONS.match(name)) and array.ndim == 3:
            result[name], result[f"{match[1]}class_position"] = array[0, 1:], array[0, :1]
        elif name.endswith("embeddings.cls_token") and array.ndim == 3:
            result[name] = array[0]
        else:
            result[name] = array
    for name, parts in groups.items():
        result[name] = np.stack([parts[group] for group in sorted(parts)])
    return result


def load_rf_detr(model: Model, source: str | os.PathLike | Mapping[str, Any]) -> Model:
    """Returns a copy of `model` with RF-DETR's parameters.

    - `model`: a detector made by `models.rf_detr` or `models.rf_detr_seg`, also LW-DETR. Its shapes are sufficient
      (`equinox.filter_eval_shape`).
    - `source`: any source that `read_rf_detr` accepts. Nothing in it is run.

    RF-DETR's files have one class more than there are categories: published files use COCO's category ids as labels,
    so that 0 is unused; files of detectors that were fine-tuned count from 0, and the last is unused. A model with
    fewer groups of queries than the source takes the first of them: 1 suffices for detection.

    Every parameter of the model must be in the source, and every entry of the source must be used. Otherwise, raises a
    `WeightsError` that lists entries that are missing, unused, of another shape, not floating point, or not finite.

    >>> import jax.random as jr
    >>> from detectax_eqx.models import rf_detr
    >>> from detectax_eqx.nn import ProjectedViT, WindowedViT
    >>> body = WindowedViT(8, 2, key=jr.key(0), patch_size=4, side=4, windows=2, taps=(1, 2))
    >>> backbone = ProjectedViT(body, key=jr.key(1), channels=16)
    >>> options = {"size": 16, "layers": 1, "queries": 5, "self_heads": 2, "cross_heads": 2, "hidden_size": 8}
    >>> model = rf_detr(backbone, 3, key=jr.key(2), groups=2, **options)
    >>> arrays = to_rf_detr(model)
    >>> arrays["query_feat.weight"].shape
    (10, 16)
    >>> one = rf_detr(backbone, 3, key=jr.key(3), groups=1, **options)
    >>> load_rf_detr(one, arrays).queries.features.shape
    (1, 5, 16)
    """
    arrays = read_rf_detr(source)
    leaves, names = named_leaves(model), _rf_detr_names(model)
    for ours, theirs in names.items():
        wanted, array = leaves[ours].shape, arrays.get(theirs)
        if array is None:
            continue
        if theirs in _QUERIES and array.ndim == 2 and len(array) % wanted[1] == 0:
            array = array.reshape(-1, wanted[1], array.shape[1])
        if theirs in _QUERIES or theirs.startswith("transformer.enc_out"):
            arrays[theirs] = array[: wanted[0]] if array.ndim == len(wanted) else array
    origin = Path(source).name if isinstance(source, str | os.PathLike) else "the given mapping"
    return load_named(model, arrays, names, origin)


def rf_detr_shapes(model: eqx.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a model's parameters by the names of `read_rf_detr`. The model may consist of shapes only.

    >>> import jax.random as jr
    >>> from detectax_eqx.nn import WindowedViT
    >>> body = WindowedViT(8, 2, key=jr.key(0), patch_size=4, side=4, windows=2, taps=(1, 2))
    >>> rf_detr_shapes(body)["embeddings.position_embeddings"]
    (16, 8)
    """
    names = _rf_detr_names(model)
    return {names[name]: tuple(leaf.shape) for name, leaf in named_leaves(model).items()}


def to_rf_detr(model: eqx.Module) -> dict[str, np.ndarray]:
    """Returns the parameters of a model by RF-DETR's names, in its arrangement, for `load_state_dict`.

    The inverse of `load_rf_detr`; `mask_token`, which RF-DETR does not use, is left out. For LW-DETR, names are those
    of its authors. Raises a `ValueError` for shapes without values.

    >>> import jax.random as jr
    >>> from detectax_eqx.nn import WindowedViT
    >>> body = WindowedViT(8, 2, key=jr.key(0), patch_size=4, side=4, windows=2, taps=(1, 2))
    >>> to_rf_detr(body)["embeddings.position_embeddings"].shape
    (1, 17, 8)
    """
    names = _rf_detr_names(model)
    arrays = {names[name]: np.array(leaf) for name, leaf in named_values(model).items()}
    body = {name: array for name, array in arrays.items() if name.startswith(_BODY)}
    if not body or f"{_BODY}embeddings.class_position" in body:
        return _theirs(arrays)
    return lw_detr_names(body) | _theirs({name: array for name, array in arrays.items() if name not in body})


def _theirs(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays in the arrangement of RF-DETR: the inverse of `_ours`."""
    result: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if name.startswith("transformer.enc_out"):
            base, _, rest = name.removeprefix("transformer.").partition(".")
            result |= {f"transformer.{base}.{group}.{rest}": part for group, part in enumerate(array)}
        elif name in _QUERIES:
            result[name] = array.reshape(-1, array.shape[-1])
        elif ".qkv." in name:
            result |= {name.replace("qkv", part): array[i] for i, part in enumerate(_PARTS)}
        elif name.endswith(("in_proj_weight", "in_proj_bias")):
            result[name] = array.reshape(-1, *array.shape[2:])
        elif match := _POSITIONS.match(name):
            result[name] = np.concatenate([arrays[f"{match[1]}class_position"], array])[None]
        elif name.endswith("embeddings.cls_token"):
            result[name] = array[None]
        elif not name.endswith("embeddings.class_position"):
            result[name] = array
    return result
