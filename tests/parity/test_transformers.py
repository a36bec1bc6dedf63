"""Vision transformers at the weights of timm, torchvision and Hugging Face: the same features on canvases of any shape.

Small ones, with the blocks, windows and names of the published ones.
"""

from functools import partial
from typing import Any

import pytest


torch = pytest.importorskip("torch", reason="torch is not installed; `make parity` runs this")
torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed; `make parity` runs this")
timm = pytest.importorskip("timm", reason="timm is not installed; `make parity` runs this")
transformers = pytest.importorskip("transformers", reason="transformers is not installed; `make parity` runs this")

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from detectax_eqx import nn
from detectax_eqx.weights import load_transformer

from .double import double_precision, in_double


WIDTH, HEADS, SIDE = 48, 3, 14
DEPTHS, SWIN_HEADS, SWIN_WIDTH = (2, 2, 4, 2), (1, 2, 4, 8), 16
# The last is that of the positions. The others are not square, nor multiples of a window. Hugging Face's Swin
# Transformer shifts no window anymore after an image in which it is not to be shifted: that one comes last.
CANVASES = ((256, 320), (288, 352), (224, 224))


@torch.no_grad()
def decisive(model):
    """The model with random norms and positions, and larger weights, so that each part of it shows."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.copy_(0.3 * draw + (1.0 if name.endswith(("weight", "lambda1", "gamma")) else 0.0))
        elif parameter.ndim == 2 and "table" not in name:
            parameter.copy_(draw * (2 / parameter.shape[1]) ** 0.5)
        else:
            parameter.copy_(0.5 * draw)
    return model.eval()


def vit(layer_scale=None):
    """Our ViT, as shapes only."""
    make = partial(nn.ViT, WIDTH, 3, HEADS, side=SIDE, class_token=True, norm=nn.LayerNorm, layer_scale=layer_scale)
    return eqx.filter_eval_shape(make, key=jr.key(0))


def swin():
    """Our Swin Transformer, with norms that change nothing but the scale: its peers have none."""
    return nn.Swin(SWIN_WIDTH, DEPTHS, SWIN_HEADS, key=jr.key(0), shift_single=False)


def torchvision_vit():
    return decisive(torchvision.models.VisionTransformer(16 * SIDE, 16, 3, HEADS, WIDTH, 4 * WIDTH))


def torchvision_vit_tokens(model, images):
    tokens = torch.cat([model.class_token, model._process_input(images)], dim=1)
    return model.encoder(tokens)


def timm_vit():
    make = timm.models.vision_transformer.VisionTransformer
    return decisive(make(16 * SIDE, 16, embed_dim=WIDTH, depth=3, num_heads=HEADS, init_values=1.0, num_classes=7))


def hugging_face_dinov2():
    config = transformers.Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=HEADS, image_size=16 * SIDE, patch_size=16
    )
    return decisive(transformers.Dinov2Model(config))


def hugging_face_vit():
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        image_size=16 * SIDE,
        patch_size=16,
        layer_norm_eps=1e-6,
    )
    return decisive(transformers.ViTModel(config, add_pooling_layer=False))


def hugging_face_tokens(model, images):
    options = {"interpolate_pos_encoding": True} if isinstance(model, transformers.ViTModel) else {}
    return model(images, **options).last_hidden_state


# Each with the function that computes its tokens, its layer scale and the canvases that it takes.
VITS = {
    "torchvision": (torchvision_vit, torchvision_vit_tokens, None, CANVASES[-1:]),
    "timm": (timm_vit, lambda model, images: model.forward_features(images), 1.0, CANVASES[-1:]),
    "hugging_face_vit": (hugging_face_vit, hugging_face_tokens, None, CANVASES),
    "hugging_face_dinov2": (hugging_face_dinov2, hugging_face_tokens, 1.0, CANVASES),
}


def arrays_of(model, folder):
    """The arrays by the names that they have in files. Hugging Face's models have other names in memory."""
    if isinstance(model, transformers.PreTrainedModel):
        model.save_pretrained(folder)
        return folder / "model.safetensors"
    return {key: x.numpy() for key, x in model.state_dict().items()}


def compared(model: Any, reference, maps_of, canvases):
    """Compares the maps on each canvas in double precision."""
    reference = reference.double()
    for canvas in canvases:
        image = np.random.default_rng(0).normal(size=(3, *canvas))
        with torch.no_grad():
            expected = maps_of(reference, torch.from_numpy(image)[None])
        with double_precision():
            run: Any = in_double(model)
            found = eqx.filter_jit(run)(jnp.asarray(image))
        found = [np.asarray(x) for x in (found if isinstance(found, tuple) else (found,))]
        for ours, theirs in zip(found, expected, strict=True):
            theirs = theirs.numpy()
            assert ours.shape == theirs.shape
            difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
            print(f"{type(reference).__name__} {canvas}: {ours.shape}, largest relative difference {difference:.1e}")
            assert difference < 1e-6


@pytest.mark.parametrize("name", VITS)
def test_vit(name, tmp_path):
    make, tokens_of, layer_scale, canvases = VITS[name]
    reference = make()
    model = load_transformer(vit(layer_scale), arrays_of(reference, tmp_path))

    def maps_of(reference, images):
        tokens = tokens_of(reference, images)[0, 1:]  # without the class token
        grid = [side // 16 for side in images.shape[2:]]
        return [tokens.T.reshape(-1, *grid)]

    compared(model, reference, maps_of, canvases)


def torchvision_swin():
    swin = torchvision.models.swin_transformer.SwinTransformer
    return decisive(swin([4, 4], SWIN_WIDTH, list(DEPTHS), list(SWIN_HEADS), [7, 7], num_classes=7))


def timm_swin():
    make = timm.models.swin_transformer.SwinTransformer
    return decisive(make(224, 4, 3, 7, embed_dim=SWIN_WIDTH, depths=DEPTHS, num_heads=SWIN_HEADS, window_size=7))


def hugging_face_swin():
    config = transformers.SwinConfig(
        image_size=224, embed_dim=SWIN_WIDTH, depths=list(DEPTHS), num_heads=list(SWIN_HEADS), window_size=7
    )
    return decisive(transformers.SwinModel(config, add_pooling_layer=False))


def torchvision_swin_maps(model, images):
    x, maps = model.features[0](images), []
    for i, layer in enumerate(model.features[1:]):
        x = layer(x)  # (n, h, w, c)
        maps += [x[0].permute(2, 0, 1)] if i % 2 == 0 else []
    return maps


def timm_swin_maps(model, images):
    x, maps = model.patch_embed(images), []
    for stage in model.layers:
        x = stage(x)  # (n, h, w, c)
        maps.append(x[0].permute(2, 0, 1))
    return maps


def hugging_face_swin_maps(model, images):
    outputs = model.encoder(
        *model.embeddings(images), output_hidden_states=True, output_hidden_states_before_downsampling=True
    )
    return [x[0] for x in outputs.reshaped_hidden_states[1:]]


SWINS = {
    "torchvision": (torchvision_swin, torchvision_swin_maps),
    "timm": (timm_swin, timm_swin_maps),
    "hugging_face": (hugging_face_swin, hugging_face_swin_maps),
}


@pytest.mark.parametrize("name", SWINS)
def test_swin(name, tmp_path):
    """Maps before the norm of each stage, which classifiers lack: ours are normalised by one that changes nothing."""
    make, maps_of = SWINS[name]
    reference = make()
    model = load_transformer(swin(), arrays_of(reference, tmp_path))

    def normalised(reference, images):
        return [
            torch.nn.functional.layer_norm(x.permute(1, 2, 0), x.shape[:1], eps=1e-5).permute(2, 0, 1)
            for x in maps_of(reference, images)
        ]

    # torchvision shifts no window along an axis on which there is only one. timm's takes images of one size.
    canvases = {"torchvision": (*CANVASES, (192, 320)), "timm": CANVASES[-1:]}.get(name, CANVASES)
    compared(model, reference, normalised, canvases)
