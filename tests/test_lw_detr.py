"""LW-DETR: Hugging Face's results on a tiny detector, stored by tests/parity/make_lw_detr_reference.py.

The detector is RF-DETR's, whose tests cover its parts. With torch and transformers installed, `make parity` compares
with whole detectors on real images.
"""

import json
from functools import cache
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx import Targets, models, weights, zoo
from detectax_eqx.weights import load_rf_detr, read_rf_detr, to_rf_detr
from detectax_eqx.zoo import _weights

from . import lw_detr_tiny as tiny, rf_detr_tiny
from .set_losses import compare_losses


DATA = Path(__file__).parent / "data"
NAMES = json.loads((DATA / "lw_detr_names.json").read_text(encoding="utf-8"))


@cache
def stored(kind):
    with np.load(DATA / f"{kind}.npz") as arrays:
        return dict(arrays)


@cache
def made(kind):
    """The tiny detector with the parameters of Hugging Face's."""
    return load_rf_detr(tiny.build(kind), tiny.random_arrays(kind))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_detections(kind):
    """From the image as decoded: resize, detection, and boxes scaled back."""
    model, detect, expected = made(kind), eqx.filter_jit(models.detect), stored(kind)
    for i, image in enumerate(rf_detr_tiny.images()):
        found = detect(model, image)
        np.testing.assert_array_equal(found.labels, expected[f"{i}.labels"])
        np.testing.assert_allclose(found.scores, expected[f"{i}.scores"], atol=1e-5)
        np.testing.assert_allclose(found.boxes, expected[f"{i}.boxes"], atol=1e-3)
        assert len(set(found.labels.tolist())) > 2


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_losses(kind):
    """Every loss of a batch with no, one, some, and more objects than queries, and gradients of parts everywhere."""
    with jax.enable_x64(True):
        pixels, boxes, labels, _, valid = (jnp.asarray(x) for x in rf_detr_tiny.targets())
        targets = Targets(boxes.astype(jnp.float64), labels, valid)
        sizes = jnp.full((len(pixels), 2), tiny.SIZE, jnp.int32)
        compare_losses(made(kind), pixels, sizes, targets, stored(kind), lambda grads: read_rf_detr(to_rf_detr(grads)))


@pytest.mark.parametrize(
    "size, millions", [("tiny", 12.1), ("small", 14.6), ("medium", 28.2), ("large", 46.8), ("xlarge", 118.0)]
)
def test_counts(size, millions):
    """Those of the authors' table, of all groups of queries."""
    model = eqx.filter_eval_shape(zoo.build, f"lw_detr_{size}", 91, key=jr.key(0))
    assert models.num_parameters(model) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("size", NAMES)
def test_real_names_and_shapes(size):
    """Hugging Face's files fit, with current or former names of each attention's projections."""
    shapes = eqx.filter_eval_shape(zoo.build, f"lw_detr_{size}", 91, key=jr.key(0))
    for former in (False, True):
        blank = {}
        for name, shape in NAMES[size].items():
            if former and ".backbone.backbone." in name:
                for part, old in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
                    name = name.replace(f".attention.{part}.", f".attention.attention.{old}.")
                name = name.replace(".attention.o_proj.", ".attention.output.")
            blank[name] = np.broadcast_to(np.float32(0), shape)
        found = weights.rf_detr_shapes(shapes)
        assert {name: array.shape for name, array in read_rf_detr(blank).items()} | {
            "query_feat.weight": found["query_feat.weight"],
            "refpoint_embed.weight": found["refpoint_embed.weight"],
        } == found
        load_rf_detr(shapes, blank)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_weights_round_trip(kind, tmp_path):
    """By the names of the authors, whose keys have no bias and whose positions have a class token's."""
    model = made(kind)
    arrays = to_rf_detr(model)
    assert arrays["backbone.0.encoder.pos_embed"].shape == (1, tiny.PRETRAINED**2 + 1, tiny.CHANNELS)
    assert arrays["backbone.0.encoder.blocks.0.attn.qkv.weight"].shape == (3 * tiny.CHANNELS, tiny.CHANNELS)
    assert {name.rpartition(".")[2] for name in arrays if ".blocks.0.attn." in name} == {
        "weight", "bias", "q_bias", "v_bias"
    }  # fmt: skip
    assert eqx.tree_equal(load_rf_detr(tiny.build(kind), arrays), model)
    weights.save_safetensors(arrays, tmp_path / "theirs.safetensors")
    path = tmp_path / "theirs.safetensors"
    assert _weights.source_of(zoo.Architecture("lw_detr_tiny"), path) is _weights._RF_DETR
    assert eqx.tree_equal(load_rf_detr(tiny.build(kind), path), model)
    assert weights.describe(arrays) == "an LW-DETR on a backbone with 5 outputs"
    for missing in ("backbone.0.encoder.blocks.1.attn.q_bias", "backbone.0.encoder.pos_embed"):
        with pytest.raises(weights.WeightsError, match="missing"):
            load_rf_detr(tiny.build(kind), {name: array for name, array in arrays.items() if name != missing})
