"""Detectors, images and detections that the tests of exports share."""

from dataclasses import replace

import jax
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx import export, models, nn

from .detectors import PREPROCESSING, SELECTION, SHAPE, with_statistics


@pytest.fixture(scope="module")
def model():
    keys = jr.split(jr.key(0), 5)
    backbone = nn.BackboneWithFPN(nn.resnet18(key=keys[0], width=8), key=keys[1], channels=16)
    sizes = ((8.0,), (16.0,), (32.0,), (64.0,), (96.0,))
    detector = models.mask_rcnn(backbone, 3, key=keys[2], hidden_size=32, anchor_sizes=sizes, hidden_channels=8)
    return with_statistics(replace(detector, preprocessing=PREPROCESSING), keys[4])


@pytest.fixture(scope="module")
def box_detector(model):
    """The same detector without masks."""
    return models.FasterRCNN(model.backbone, model.rpn, model.box_head, preprocessing=PREPROCESSING)


@pytest.fixture(scope="module")
def images():
    """Blocky noise, in images of two sizes."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (6, 8, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    return [blocks, blocks[:40, 10:61].copy()]


@pytest.fixture(scope="module")
def expected(model, images):
    padded, sizes = export.pad_images(images, SHAPE)
    return jax.jit(export.detection_program(model, SHAPE, SELECTION))(padded, sizes)
