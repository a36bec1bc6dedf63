"""Vision transformers from checkpoints of classifiers: of their authors, timm, torchvision and Hugging Face."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import numpy as np
from jaxtyping import Shaped

from .. import nn
from ._detectron2_names import detectron2_names, in_three
from ._load import load_named
from ._names import without_prefixes
from ._source import arrays_by_name
from ._trees import WeightsError, named_leaves


Model = TypeVar("Model", bound=eqx.Module)

_TRANSFORMERS = (nn.ViT, nn.WindowedViT, nn.Swin)
# Names of the prefix under which Hugging Face's models with a head keep the transformer.
_PREFIX = re.compile(r"^(vit|dinov2|swin|backbone)\.")
# What a detector has no use for: heads, the decoder of a masked autoencoder, and constants.
_IGNORED = re.compile(
    r"^(head|heads|head_dist|fc_norm|pre_logits|classifier|pooler|lm_head|decoder)[._]"
    r"|^(embeddings\.)?mask_token$|\.(relative_position_index|attn_mask)$"
)
# From the names of torchvision and Hugging Face to those of the transformers' authors, which timm and Detectron2 share.
_RULES: tuple[tuple[str, Any], ...] = (
    # torchvision's ViT
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(linear_1|0)\.", ".mlp.fc1."),
    (r"\.mlp\.(linear_2|3)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
    # torchvision's Swin Transformer, in whose list patches, stages and mergers alternate
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    (r"^features\.([1357])\.(\d+)\.", lambda m: f"layers.{int(m[1]) // 2}.blocks.{m[2]}."),
    (r"^features\.([246])\.", lambda m: f"layers.{int(m[1]) // 2 - 1}.downsample."),
    # Hugging Face's
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"^encoder\.layers\.", "layers."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.(attention|self)\.", ".attn."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^hidden_states_norms\.stage(\d)\.", lambda m: f"norm{int(m[1]) - 1}."),
    (r"^layernorm\.", "norm."),
)
# What only detectors have: relative positions in ViTDet, and norms of the maps of a Swin Transformer.
_OWN = re.compile(r"\.rel_pos_[hw]$|^norm\d\.")


def read_transformer(source: str | os.PathLike | Mapping[str, Any]) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Reads the parameters of a ViT or a Swin Transformer by the names of its authors, without its heads.

    - `source`: a `.pth` or `.safetensors` file, or a mapping from names to arrays.

    The names of torchvision and Hugging Face are replaced. Separate projections to queries, keys and values are joined.
    What halves the grid between two stages belongs to the stage before it, as in the official Swin Transformer; in
    timm's files, it belongs to the stage after it.

    >>> arrays = read_transformer({"vit.embeddings.cls_token": np.ones((1, 1, 8)), "classifier.weight": np.ones(3)})
    >>> list(arrays)
    ['cls_token']
    """
    arrays = arrays_by_name(source)
    arrays = {_PREFIX.sub("", name): np.asarray(array) for name, array in without_prefixes(arrays).items()}
    arrays = {_renamed(name): array for name, array in arrays.items() if not _IGNORED.search(name)}
    if any(name.startswith("layers.3.downsample.") for name in arrays):  # timm's
        arrays = {
            re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name): array
            for name, array in arrays.items()
        }
    return _joined(arrays)


def _renamed(name: str) -> str:
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name


def _joined(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays with separate projections to queries, keys and values joined."""
    result = dict(arrays)
    for name in arrays:
        if match := re.fullmatch(r"(.*\.attn\.)query\.(weight|bias)", name):
            parts = [f"{match[1]}{part}.{match[2]}" for part in ("query", "key", "value")]
            if all(part in arrays for part in parts):
                result[f"{match[1]}qkv.{match[2]}"] = np.concatenate([result.pop(part) for part in parts])
    return result


def load_transformer(model: Model, source: str | os.PathLike | Mapping[str, Any]) -> Model:
    """Returns a copy of `model` whose transformer has the parameters of a classifier's checkpoint.

    - `model`: an `nn.ViT`, an `nn.WindowedViT` or an `nn.Swin`, or a detector on one, whose other layers keep their
      values.
    - `source`: any source that `read_transformer` accepts: checkpoints of MAE, DeiT, DINOv2 and Swin Transformer, of
      timm, torchvision and Hugging Face. Nothing in it is run.

    Relative positions of a ViT and the norms of a Swin Transformer's maps, which classifiers lack, keep their values.
    The class token, and its position with it, are dropped unless the model has one.

    Every other parameter of the transformer must be in the source, and every entry of the source must be used.
    Otherwise, raises a `WeightsError` that lists entries that are missing, unused, of another shape, not floating
    point, or not finite. Raises a `TypeError` if the model has no transformer.

    >>> import jax.random as jr
    >>> from detectax_eqx.nn import Swin
    >>> from detectax_eqx.weights import to_detectron2
    >>> body = Swin(8, (1, 1), (1, 2), key=jr.key(0), window=4)
    >>> loaded = load_transformer(body, to_detectron2(Swin(8, (1, 1), (1, 2), key=jr.key(1), window=4)))
    >>> bool((loaded.patches.weight == body.patches.weight).any())
    False
    """
    if not isinstance(model, _TRANSFORMERS):
        body = getattr(getattr(model, "backbone", None), "body", None)
        if not isinstance(body, _TRANSFORMERS):
            raise TypeError(f"model must be a ViT, a Swin or a detector on one, got {type(model).__name__}.")
        loaded = load_transformer(body, source)
        return eqx.tree_at(lambda tree: tree.backbone.body, model, loaded)
    arrays, names = read_transformer(source), detectron2_names(model)
    origin = Path(source).name if isinstance(source, str | os.PathLike) else "the given mapping"
    if not isinstance(model, nn.Swin):
        arrays = _without_class_token(arrays, model, origin)
    if isinstance(model, nn.Swin) or model.norm is None:  # a classifier's last norm
        arrays = {name: array for name, array in arrays.items() if not name.startswith("norm.")}
    for name, leaf in named_leaves(model).items():
        if _OWN.search(names[name]) and names[name] not in arrays:
            arrays[names[name]] = np.asarray(leaf)
    arrays |= {name: in_three(array) for name, array in arrays.items() if ".attn.qkv." in name and array.ndim}
    return load_named(model, arrays, names, origin)


def _without_class_token(
    arrays: dict[str, np.ndarray], model: nn.ViT | nn.WindowedViT, origin: str
) -> dict[str, np.ndarray]:
    """The arrays with positions for patches alone, and a class token with its position if the model has one."""
    arrays = dict(arrays)
    # A distilled DeiT has a second token.
    tokens = [token for token in (arrays.pop(name, None) for name in ("cls_token", "dist_token")) if token is not None]
    positions = arrays.get("pos_embed")
    if positions is None or positions.ndim != 3:
        return arrays
    arrays["pos_embed"] = positions[0, len(tokens) :]
    if model.class_token is not None:
        if not tokens:
            raise WeightsError(f"{origin} has no class token. Build the model without one.")
        if isinstance(model, nn.WindowedViT):
            arrays["cls_token"], arrays["cls_position"] = tokens[0][0], positions[0, :1]
        else:
            arrays["cls_token"] = tokens[0][0] + positions[0, :1]
    return arrays
