"""A tiny LW-DETR, for comparison with Hugging Face's results. Uses neither torch nor transformers."""

from dataclasses import replace

import equinox as eqx
import jax.random as jr
import numpy as np

from detectax_eqx import models, nn
from detectax_eqx.weights import rf_detr_shapes

from . import rf_detr_tiny


CLASSES, CHANNELS, HEADS, WIDTH, LAYERS, QUERIES, GROUPS, HIDDEN = 5, 32, 2, 32, 2, 20, 3, 64
# The transformer: sides in patches of its positions and of its images, blocks with maps, and those of all windows.
PATCH, PRETRAINED, SIDE, TAPS, GLOBAL = 8, 6, 8, (2, 3, 4), (1, 2)
SIZE = PATCH * SIDE
# By the names of the files with results: how often the sides of the transformer's maps are doubled for each level.
KINDS = {"lw_detr": (0,), "lw_detr_levels": (1, -1)}


def build(kind="lw_detr"):
    """A detector on a transformer of four blocks, as shapes only."""

    def make():
        keys = jr.split(jr.key(0), 3)
        options = {"class_token": False, "norm": False, "antialias": False, "global_blocks": GLOBAL}
        body = nn.WindowedViT(
            CHANNELS, HEADS, key=keys[0], patch_size=PATCH, side=PRETRAINED, windows=4, taps=TAPS, **options
        )
        levels = {"doublings": KINDS[kind], "norm": nn.FrozenBatchNorm}
        backbone = nn.ProjectedViT(body, key=keys[1], channels=WIDTH, **levels)
        sizes = {"layers": LAYERS, "queries": QUERIES, "groups": GROUPS, "hidden_size": HIDDEN}
        model = models.rf_detr(backbone, CLASSES, key=keys[2], self_heads=4, cross_heads=4, points=2, **sizes)
        return replace(model, preprocessing=models.Preprocessing(models.Square(SIZE), pillow=True))

    return eqx.filter_eval_shape(make)


def random_arrays(kind="lw_detr"):
    """Random parameters, decisive ones, as `read_rf_detr` returns them. Each depends on its name and shape alone."""
    return {name: random_array(name, shape) for name, shape in rf_detr_shapes(build(kind)).items()}


def random_array(name, shape):
    """A random parameter that leaves predictions different from each other. Keys have no bias, as in LW-DETR."""
    array = rf_detr_tiny.random_array(name, shape)
    if name.endswith("running_var"):
        return np.exp(array)
    if name.endswith("attention.attention.qkv.bias"):
        array[1] = 0
    return array
