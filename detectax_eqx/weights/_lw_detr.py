"""Names of LW-DETR's parameters, of its authors and of Hugging Face, in terms of RF-DETR's, which descends from it."""

import re
from collections.abc import Mapping

import numpy as np

from ._detectron2_names import in_three


# From Hugging Face's names, former and current, to those of the authors.
_HUGGING_FACE: tuple[tuple[str, str], ...] = (
    (r"^model\.backbone\.backbone\.embeddings\.position_embeddings$", "backbone.0.encoder.pos_embed"),
    (r"^model\.backbone\.backbone\.embeddings\.projection\.", "backbone.0.encoder.patch_embed.proj."),
    (r"^model\.backbone\.backbone\.encoder\.layer\.", "backbone.0.encoder.blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.", ".mlp."),
    (r"(\.blocks\.\d+)\.attention\.(o_proj|output)\.", r"\1.attn.proj."),
    (r"(\.blocks\.\d+)\.attention\.(attention\.query|q_proj)\.", r"\1.attn.q_"),
    (r"(\.blocks\.\d+)\.attention\.(attention\.key|k_proj)\.", r"\1.attn.k_"),
    (r"(\.blocks\.\d+)\.attention\.(attention\.value|v_proj)\.", r"\1.attn.v_"),
    (r"^model\.backbone\.projector\.scale_layers\.(\d+)\.layer_norm\.", r"backbone.0.projector.stages.\1.1."),
    (r"^model\.backbone\.projector\.scale_layers\.(\d+)\.projector_layer\.", r"backbone.0.projector.stages.\1.0."),
    (
        r"^model\.backbone\.projector\.scale_layers\.(\d+)\.sampling_layers\.(\d+)\.layers\.",
        r"backbone.0.projector.stages_sampling.\1.\2.",
    ),
    (r"(\.stages_sampling\..*)\.norm\.", r"\1.bn."),
    (r"(\.stages\.\d+\.0\.)bottlenecks\.", r"\1m."),
    (r"(\.stages\.\d+\.0\..*)conv([12])\.conv\.", r"\1cv\2.conv."),
    (r"(\.stages\.\d+\.0\..*)conv([12])\.norm\.", r"\1cv\2.bn."),
    (r"^model\.decoder\.layernorm\.", "transformer.decoder.norm."),
    (r"^model\.(decoder|enc_)", r"transformer.\1"),
    (r"^model\.reference_point_embed\.", "refpoint_embed."),
    (r"^model\.query_feat\.", "query_feat."),
    (r"^(transformer\.decoder\..*)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"^(transformer\.decoder\..*)\.cross_attn_layer_norm\.", r"\1.norm2."),
    (r"^(transformer\.decoder\..*)\.layer_norm\.", r"\1.norm3."),
    (r"^(transformer\.decoder\..*)\.mlp\.fc([12])\.", r"\1.linear\2."),
    (r"\.self_attn\.([qkv])_proj\.", r".self_attn.\1_"),
    (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
)
# From the authors' names to RF-DETR's; `lw_detr_names` applies them the other way round.
_RF_DETR: tuple[tuple[str, str], ...] = (
    ("backbone.0.encoder.pos_embed", "backbone.0.encoder.encoder.embeddings.position_embeddings"),
    ("backbone.0.encoder.patch_embed.proj.", "backbone.0.encoder.encoder.embeddings.patch_embeddings.projection."),
    ("backbone.0.encoder.blocks.", "backbone.0.encoder.encoder.encoder.layer."),
    (".attn.proj.", ".attention.output.dense."),
    (".attn.qkv_", ".attention.attention.qkv."),
    (".gamma_1", ".layer_scale1.lambda1"),
    (".gamma_2", ".layer_scale2.lambda1"),
)


def rf_detr_names_of(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of LW-DETR by RF-DETR's names and in the arrangement of this package; others as they are.

    Keys have no bias there: it would have no effect, and is 0 here. The position of a class token is not used.
    """
    named: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        for pattern, replacement in _HUGGING_FACE:
            name = re.sub(pattern, replacement, name)
        named[name] = array
    if not any(name.startswith("backbone.0.encoder.blocks.") for name in named):
        return dict(arrays)
    result: dict[str, np.ndarray] = {}
    for name, array in _joined(named).items():
        for theirs, ours in _RF_DETR:
            name = name.replace(theirs, ours)
        result[name] = array[0, 1:] if name.endswith(".position_embeddings") and array.ndim == 3 else array
    return result


def _joined(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays with queries, keys and values of each attention in one."""
    result: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        match = re.fullmatch(r"(.*\.(?:attn|self_attn)\.)([qkv])_(weight|bias)", name)
        if name.endswith(".attn.qkv.weight"):
            result[name.replace(".qkv.", ".qkv_")] = in_three(array)
        elif match is None:
            result[name] = array
        elif match[2] == "q":
            own = match[1].endswith("self_attn.")
            key = arrays.get(f"{match[1]}k_{match[3]}", None if own or match[3] == "weight" else np.zeros_like(array))
            parts = (array, key, arrays.get(f"{match[1]}v_{match[3]}"))
            if all(part is not None and part.shape == array.shape for part in parts):
                stacked = np.stack([part for part in parts if part is not None])
                result[f"{match[1]}{'in_proj' if own else 'qkv'}_{match[3]}"] = stacked
            else:
                result[name] = array
        elif f"{match[1]}q_{match[3]}" not in arrays:
            result[name] = array
    return result


def lw_detr_names(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of LW-DETR by its authors' names, from those of RF-DETR in the arrangement of this package."""
    result: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        for theirs, ours in _RF_DETR:
            name = name.replace(ours, theirs)
        if name.endswith(".pos_embed"):  # with a class token's, which is not used
            result[name] = np.concatenate([np.zeros_like(array[:1]), array])[None]
        elif name.endswith(".attn.qkv_weight"):
            result[name.replace(".qkv_", ".qkv.")] = array.reshape(-1, array.shape[-1])
        elif name.endswith(".attn.qkv_bias"):
            result |= {name.replace(".qkv_", ".q_"): array[0], name.replace(".qkv_", ".v_"): array[2]}
        else:
            result[name] = array
    return result
