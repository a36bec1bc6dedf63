"""Errors of wrong calls take a few lines and end with the remedy; which detectors and images are accepted."""

import dataclasses
import warnings
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from PIL import Image

from detectax_eqx import Detections, models, nn, ops
from detectax_eqx.models import _detect

from .misuse_cases import OPS, OTHERS, TREES, tiny_model
from .test_misuse import _wrong_calls


PICTURE = np.zeros((64, 48, 3), np.uint8)
IMAGES = [
    (PICTURE.astype(np.float32), "astype(np.uint8)"),
    (PICTURE.astype(np.uint16), "257"),
    (Image.fromarray(PICTURE), "convert('RGB')"),
    ("picture.jpg", "read_image"),
    (PICTURE[..., 0], "np.repeat"),
    (PICTURE[None], "detect_batch"),
    (PICTURE.tolist(), "np.asarray"),
    (PICTURE.transpose(2, 0, 1), "transpose(1, 2, 0)"),
    (np.zeros((64, 48, 4), np.uint8), "image[..., :3]"),
    (np.zeros((64, 48, 1), np.uint8), "np.repeat"),
]


@pytest.mark.parametrize("image, remedy", IMAGES, ids=[remedy for _, remedy in IMAGES])
def test_image_that_detect_does_not_take(image, remedy):
    with pytest.raises((TypeError, ValueError), match="image") as caught:
        eqx.filter_eval_shape(lambda: models.detect(tiny_model(), image))
    lines = str(caught.value).splitlines()
    assert len(lines) <= 12 and max(map(len, lines)) < 250
    assert remedy in lines[-1]


@pytest.mark.parametrize("function, named, name, axis", list(_wrong_calls(OPS + TREES + OTHERS)))
def test_wrong_arrays_in_a_few_lines(function, named, name, axis):
    with pytest.raises(TypeError) as caught:
        function(**named)
    lines = str(caught.value).splitlines()
    assert len(lines) <= 12 and max(map(len, lines)) < 250
    assert any(
        word in lines[-1] for word in ("Cast", "shape", "jax.vmap", "jnp.asarray", "Pass", "np.", "Pixels", "batch")
    )


def test_batch_given_to_an_op():
    with pytest.raises(TypeError, match=r"jax\.vmap\.$"):
        ops.box_area(jnp.zeros((2, 3, 4)))


def test_remedies_for_arrays_of_numpy_and_keys():
    with pytest.raises(TypeError, match=r"jnp\.asarray\(boxes\)\.$"):
        ops.box_area(np.zeros((3, 4), np.float32))  # pyright: ignore[reportArgumentType]
    flags = jnp.ones(3, bool)
    with pytest.raises(TypeError, match=r"jax\.random\.key\(0\)\.$"):
        ops.sample_balanced(flags, flags, num_samples=2, positive_fraction=0.5, key=0)  # pyright: ignore[reportArgumentType]


SMALL = models.Preprocessing(models.ShortestEdge(32, 64))


class Middle(models.AbstractDetector):
    """A user's own detector: one box in the middle of the image."""

    weight: jax.Array
    preprocessing: models.Preprocessing = eqx.field(static=True, default=SMALL)
    selection: models.DenseSelection = eqx.field(static=True, default=models.DenseSelection())
    # Class attributes work as well as fields, which pyright does not know.
    backbone = SimpleNamespace(divisor=1, stages=())  # pyright: ignore[reportAssignmentType]
    num_classes = 1  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]
    needs = frozenset({"boxes"})

    def loss(self, image, canvas_size, targets, *, key):
        return {}

    def __call__(self, image, canvas_size, *, selection: Any):  # pyright: ignore[reportIncompatibleMethodOverride]
        height, width = canvas_size[0].astype(jnp.float32), canvas_size[1].astype(jnp.float32)
        box = jnp.stack([width / 4, height / 4, width * 0.75, height * 0.75])
        boxes = jnp.zeros((selection.max_detections, 4)).at[0].set(box)
        first = jnp.arange(selection.max_detections) == 0
        labels = jnp.zeros(selection.max_detections, jnp.int32)
        return Detections(boxes, jnp.where(first, image.mean() * self.weight, 0.0), labels, first)


def test_own_detector_on_images_of_other_channels():
    model = Middle(jnp.ones(()))  # pyright: ignore[reportCallIssue]
    for channels in (1, 3, 4):
        detections = eqx.filter_jit(models.detect)(model, np.ones((64, 48, channels), np.uint8))
        np.testing.assert_allclose(detections.boxes[0], [12, 16, 36, 48], atol=1)
    assert models.trainable(model).weight is True
    with pytest.raises(ValueError, match=r"trainable_layers must be in 0..0"):
        models.trainable(model, trainable_layers=3)
    with pytest.raises(TypeError, match="parameter 'model'"):
        models.detect(3, PICTURE)  # pyright: ignore[reportArgumentType]


def test_stem_of_other_channels():
    def build():
        body = nn.resnet18(key=jr.key(0), width=8, in_channels=4)
        backbone = nn.BackboneWithFPN(body, key=jr.key(1), channels=16)
        preprocessing = models.Preprocessing(models.ShortestEdge(64, 64), mean=(100.0,) * 4, std=(100.0,) * 4)
        model = models.faster_rcnn(backbone, 3, key=jr.key(2), hidden_size=32)
        return dataclasses.replace(model, preprocessing=preprocessing)

    image = np.zeros((64, 64, 4), np.uint8)
    shapes = eqx.filter_eval_shape(lambda: models.detect(build(), image))
    assert shapes.boxes.shape == (100, 4)
    with pytest.raises(ValueError, match="mean and std must be equally long"):
        models.Preprocessing(mean=(1.0,))


def test_detect_without_jit_warns_once():
    model = Middle(jnp.ones(()))  # pyright: ignore[reportCallIssue]
    _detect._advise_jit.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        eqx.filter_jit(models.detect)(model, PICTURE)
        jax.vmap(lambda x: models.detect(model, x))(jnp.asarray(PICTURE)[None])
        eqx.filter_grad(lambda m: models.detect(m, PICTURE).scores.sum())(model)
        assert not caught
        for _ in range(2):
            models.detect(model, PICTURE)
    assert len(caught) == 1 and "eqx.filter_jit" in str(caught[0].message)
