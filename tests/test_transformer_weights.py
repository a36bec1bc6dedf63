"""Loading of transformers under the names of their authors, timm, torchvision and Hugging Face.

`make parity` compares features with those of the libraries themselves.
"""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx import models, nn, zoo
from detectax_eqx.weights import WeightsError, load_transformer, save_safetensors, to_detectron2


WIDTH, SIDE = 8, 4


def vit(**options):
    return nn.ViT(WIDTH, 2, 2, key=jr.key(0), side=SIDE, **options)


def swin():
    return nn.Swin(WIDTH, (1, 2, 1, 1), (1, 2, 2, 2), key=jr.key(0), window=4)


def official(body, seed=1):
    """Random arrays by the names of the transformer's authors, with a classifier's own."""
    draw = np.random.default_rng(seed)
    arrays = {name: draw.normal(size=x.shape).astype(np.float32) for name, x in to_detectron2(body).items()}
    arrays |= {"head.weight": np.ones((5, WIDTH), np.float32), "norm.weight": np.ones(WIDTH, np.float32)}
    if isinstance(body, nn.ViT):
        return arrays | {"cls_token": np.full((1, 1, WIDTH), 3.0, np.float32)}
    index = {"layers.0.blocks.0.attn.relative_position_index": np.zeros((16, 16), np.int64)}
    return {name: x for name, x in arrays.items() if not re.match(r"norm\d", name)} | index


def renamed(arrays, rules):
    result = {}
    for name, x in arrays.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        result[name] = x
    return result


def split(arrays, query):
    """With separate projections. `query`: the name of the first, with which the names of the others follow."""
    result = {}
    for name, x in arrays.items():
        if ".qkv." not in name:
            result[name] = x
            continue
        for part, piece in zip(("query", "key", "value"), np.split(x, 3), strict=True):
            result[name.replace("attn.qkv", query.replace("query", part))] = piece
    return result


VIT_OF_TORCHVISION = (
    (r"^patch_embed\.proj", "conv_proj"),
    (r"^cls_token", "class_token"),
    (r"^pos_embed", "encoder.pos_embedding"),
    (r"^norm\.", "encoder.ln."),
    (r"^head\.", "heads.head."),
    (r"^blocks\.(\d)\.", r"encoder.layers.encoder_layer_\1."),
    (r"\.norm(\d)", r".ln_\1"),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj", ".self_attention.out_proj"),
    (r"\.fc1", ".0"),
    (r"\.fc2", ".3"),
)
VIT_OF_HUGGING_FACE = (
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^cls_token", "embeddings.cls_token"),
    (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^head\.", "classifier."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.norm1", ".layernorm_before"),
    (r"\.norm2", ".layernorm_after"),
    (r"\.attn\.proj", ".attention.output.dense"),
    (r"\.mlp\.fc1", ".intermediate.dense"),
    (r"\.mlp\.fc2", ".output.dense"),
    (r"^(embeddings|encoder|layernorm)", r"vit.\1"),
)
SWIN_OF_TORCHVISION = (
    (r"^patch_embed\.proj", "features.0.0"),
    (r"^patch_embed\.norm", "features.0.2"),
    (r"^layers\.(\d)\.blocks\.", lambda m: f"features.{2 * int(m[1]) + 1}."),
    (r"^layers\.(\d)\.downsample\.", lambda m: f"features.{2 * int(m[1]) + 2}."),
    (r"\.fc1", ".0"),
    (r"\.fc2", ".3"),
)
SWIN_OF_TIMM = ((r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample"),)
SWIN_OF_HUGGING_FACE = (
    (r"^patch_embed\.proj", "swin.embeddings.patch_embeddings.projection"),
    (r"^patch_embed\.norm", "swin.embeddings.norm"),
    (r"^layers\.", "swin.encoder.layers."),
    (r"\.norm1", ".layernorm_before"),
    (r"\.norm2", ".layernorm_after"),
    (r"\.attn\.proj", ".attention.output.dense"),
    (r"\.attn\.relative", ".attention.self.relative"),
    (r"\.mlp\.fc1", ".intermediate.dense"),
    (r"\.mlp\.fc2", ".output.dense"),
)
SOURCES = {
    "vit-official": (vit, lambda x: x),
    "vit-checkpoint": (vit, lambda x: {f"module.{name}": array for name, array in x.items()}),
    "vit-torchvision": (vit, lambda x: renamed(x, VIT_OF_TORCHVISION)),
    "vit-hugging-face": (vit, lambda x: renamed(split(x, "attention.attention.query"), VIT_OF_HUGGING_FACE)),
    "swin-official": (swin, lambda x: x),
    "swin-torchvision": (swin, lambda x: renamed(x, SWIN_OF_TORCHVISION)),
    "swin-timm": (swin, lambda x: renamed(x, SWIN_OF_TIMM)),
    "swin-hugging-face": (swin, lambda x: renamed(split(x, "attention.self.query"), SWIN_OF_HUGGING_FACE)),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_array_arrives(name):
    make, written = SOURCES[name]
    body = make()
    arrays = official(body)
    found = to_detectron2(load_transformer(body, written(arrays)))
    for key, x in found.items():
        if key == "pos_embed":
            np.testing.assert_array_equal(x[0, 1:], arrays[key][0, 1:])
        elif re.match(r"norm\d", key):  # of maps, which classifiers lack
            assert set(np.unique(x)) in ({0.0}, {1.0})
        else:
            np.testing.assert_array_equal(x, arrays[key], err_msg=key)


def test_into_a_detector_from_a_file(tmp_path):
    """Its relative positions, its pyramid and its heads stay."""
    keys = jr.split(jr.key(2), 2)
    body = vit(window=2, global_blocks=(1,), relative_side=SIDE)
    model: Any = models.faster_rcnn(nn.ViTFPN(body, key=keys[0], channels=8), 3, key=keys[1], hidden_size=8)
    arrays = official(vit())
    save_safetensors(arrays, tmp_path / "vit.safetensors")
    loaded: Any = load_transformer(model, tmp_path / "vit.safetensors")
    np.testing.assert_array_equal(loaded.backbone.body.blocks[1].mlp.fc2.weight, arrays["blocks.1.mlp.fc2.weight"])
    positions = loaded.backbone.body.blocks[0].attention.positions
    assert not positions.vertical.any() and positions.vertical.shape == (3, WIDTH // 2)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), eqx.filter(loaded.rpn, eqx.is_array), model.rpn)
    assert all(jax.tree.leaves(same))


def test_fine_tuning_from_a_classifier(tmp_path):
    """As `train.py --init` does: the transformer is loaded, whatever the file's names and format."""
    keys = jr.split(jr.key(2), 2)
    body = vit(window=2, global_blocks=(1,), relative_side=SIDE)
    model: Any = models.faster_rcnn(nn.ViTFPN(body, key=keys[0], channels=8), 3, key=keys[1], hidden_size=8)
    arrays = official(vit())
    written = renamed(split(arrays, "attention.attention.query"), VIT_OF_HUGGING_FACE)
    save_safetensors(written, tmp_path / "a.safetensors")
    tuned: Any
    tuned, notes = zoo.initialize(model, zoo.Architecture("mask_rcnn_vitdet_b"), tmp_path / "a.safetensors")
    assert notes == ()
    np.testing.assert_array_equal(tuned.backbone.body.patches.weight, arrays["patch_embed.proj.weight"])
    np.testing.assert_array_equal(tuned.box_head.fc6.weight, model.box_head.fc6.weight)


def test_class_token():
    """Its position is part of it. The map does not depend on where it is kept, but on whether it is there."""
    arrays = official(vit())
    loaded: Any = load_transformer(
        vit(class_token=True, norm=nn.LayerNorm), arrays | {"norm.bias": np.zeros(WIDTH, "f")}
    )
    np.testing.assert_array_equal(loaded.class_token[0], arrays["cls_token"][0, 0] + arrays["pos_embed"][0, 0])
    assert loaded(jnp.ones((3, 32, 48))).shape == (WIDTH, 2, 3)
    # DeiT's file has a second token.
    distilled = arrays | {"dist_token": arrays["cls_token"], "head_dist.weight": np.ones(3, "f")}
    distilled["pos_embed"] = np.concatenate([np.full((1, 1, WIDTH), 9.0, "f"), arrays["pos_embed"]], axis=1)
    found = load_transformer(vit(), distilled)
    np.testing.assert_array_equal(found.positions.table, arrays["pos_embed"][0, 1:])


def test_windowed_vit():
    """DINOv2, whose class token and its position stay apart, into the backbone of RF-DETR."""
    body = nn.WindowedViT(WIDTH, 2, key=jr.key(0), patch_size=4, side=SIDE, windows=2, taps=(1, 2))
    plain = nn.ViT(
        WIDTH, 2, 2, key=jr.key(1), side=SIDE, patch_size=4, layer_scale=0.5, norm=nn.LayerNorm, class_token=True
    )
    arrays = official(plain)
    arrays["pos_embed"] = np.arange(17.0 * WIDTH, dtype=np.float32).reshape(1, 17, WIDTH)
    loaded = load_transformer(body, arrays)
    token: Any = loaded.class_token
    np.testing.assert_array_equal(token.token, arrays["cls_token"][0])
    np.testing.assert_array_equal(token.position, arrays["pos_embed"][0, :1])
    np.testing.assert_array_equal(loaded.positions.table, arrays["pos_embed"][0, 1:])
    scale: Any = loaded.blocks[1].scale2
    np.testing.assert_array_equal(scale.scale, arrays["blocks.1.ls2.gamma"])
    model: Any = models.rf_detr(
        nn.ProjectedViT(body, key=jr.key(2), channels=8),
        3,
        key=jr.key(3),
        queries=4,
        groups=1,
        self_heads=2,
        cross_heads=2,
        hidden_size=8,
    )
    assert eqx.tree_equal(load_transformer(model, arrays).backbone.body, loaded)


def test_what_does_not_fit():
    arrays = official(vit())
    with pytest.raises(WeightsError, match=r"1 missing in the source: blocks\.0\.mlp\.fc1\.weight"):
        load_transformer(vit(), {name: x for name, x in arrays.items() if name != "blocks.0.mlp.fc1.weight"})
    with pytest.raises(WeightsError, match="1 unused in the source: register_tokens"):
        load_transformer(vit(), arrays | {"register_tokens": np.ones((1, 4, WIDTH), "f")})
    with pytest.raises(WeightsError, match=r"positions\.table is float32 \(16, 8\) in the source but .*\(25, 8\)"):
        load_transformer(nn.ViT(WIDTH, 2, 2, key=jr.key(0), side=5), arrays)
    with pytest.raises(WeightsError, match="has no class token"):
        without = {name: x for name, x in arrays.items() if name not in ("cls_token", "norm.weight")}
        load_transformer(vit(class_token=True), without)
    with pytest.raises(TypeError, match="must be a ViT, a Swin or a detector on one, got Conv2d"):
        load_transformer(nn.Conv2d(3, 4, 1, key=jr.key(0)), arrays)
    with pytest.raises(ValueError, match="A class token has no place in windows"):
        vit(class_token=True, window=2)
