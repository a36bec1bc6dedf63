"""Detectron2's own results on tiny detectors, stored by tests/parity/make_detectron2_reference.py.

With Detectron2 installed, `make parity` compares with whole detectors on real images.
"""

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx import Targets, models, zoo
from detectax_eqx.weights import detectron2_shapes, load_detectron2, to_detectron2

from . import detectron2_tiny as tiny


DATA = Path(__file__).parent / "data"
# Faster and Cascade R-CNN are parts of others or have more of the same.
QUICK = ("mask_rcnn", "keypoint_rcnn", "retinanet")
KINDS = pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in QUICK)) for kind in (*tiny.KINDS, *tiny.TRANSFORMERS)],
)


@cache
def stored(kind):
    with np.load(DATA / f"detectron2_{kind}.npz") as arrays:
        return dict(arrays)


@cache
def made(kind):
    """The tiny detector with Detectron2's weights."""
    arrays = tiny.random_arrays(kind)
    arrays |= {k.removeprefix("weights."): x for k, x in stored(kind).items() if k.startswith("weights.")}
    return load_detectron2(tiny.build(kind), arrays)


def close(found, kind, prefix, *, pixels):
    """Checks detections against the stored ones: the same order, boxes within `pixels`, scores within 1e-4."""
    valid = np.asarray(found.valid)
    expected = stored(kind)
    assert valid.sum() == len(expected[f"{prefix}.scores"]) and valid[: valid.sum()].all()
    np.testing.assert_array_equal(np.asarray(found.labels)[valid], expected[f"{prefix}.labels"])
    np.testing.assert_allclose(np.asarray(found.scores)[valid], expected[f"{prefix}.scores"], atol=1e-4)
    np.testing.assert_allclose(np.asarray(found.boxes)[valid], expected[f"{prefix}.boxes"], atol=pixels)


@KINDS
def test_detections(kind):
    """From the image as decoded: resize, rounding, detection, and boxes scaled back."""
    model, detect = made(kind), eqx.filter_jit(models.detect)
    for i, image in enumerate(tiny.images()):
        assert model.preprocessing.resize(image.shape[:2]) == tuple(stored(kind)[f"{i}.resized"])
        found = detect(model, image)  # on the canvas of Detectron2, since padding matters near it
        close(found, kind, f"{i}", pixels=0.01)
        if kind == "keypoint_rcnn":
            points = np.asarray(found.keypoints)[np.asarray(found.valid)]
            expected = stored(kind)[f"{i}.keypoints"][..., :2] - 0.5  # as its evaluation writes them
            np.testing.assert_allclose(points[..., :2], expected, atol=0.05)
            np.testing.assert_allclose(points[..., 2], stored(kind)[f"{i}.keypoints"][..., 2], atol=1e-4)
        if "mask" in kind:
            valid = np.asarray(found.valid)
            masks, boxes = (jnp.asarray(np.asarray(x)[valid]) for x in (found.masks, found.boxes))
            pasted = np.asarray(model.paste(masks, boxes, image_size=image.shape[:2], threshold=0.5))
            expected = np.unpackbits(stored(kind)[f"{i}.masks"], count=pasted.size).reshape(pasted.shape) > 0
            union = (pasted | expected).sum(axis=(1, 2))
            ious = (pasted & expected).sum(axis=(1, 2)) / np.maximum(union, 1)
            # Rounding may move one pixel of a mask, which matters where a mask has few of them.
            assert ious[(pasted ^ expected).sum(axis=(1, 2)) > 1].min(initial=1) > 0.99
            assert (union > 0).mean() > 0.7 and union.sum() > 500  # boxes may be smaller than a pixel


@KINDS
def test_losses(kind):
    """Every loss of a batch with all candidates sampled, and gradients of two layers."""
    model, expected, everything = made(kind), stored(kind), 1_000_000
    if kind != "retinanet":
        sampling = replace(
            model.sampling,
            pre_nms_top_n=200,
            post_nms_top_n=60,
            rpn_samples=everything,
            box_samples=everything,
            box_positive_fraction=0.5,
            rpn_normalizer=float(everything),
        )
        model = replace(model, sampling=sampling)
    pixels, boxes, labels, masks, points = (jnp.asarray(x) for x in tiny.targets())
    count, height, width = boxes.shape[1], *pixels.shape[1:3]
    frame = jnp.tile(jnp.array([0, 0, width, height], jnp.float32), (2, count, 1))
    canvas = models.smallest_canvas(model.preprocessing.canvas((height, width)), divisor=model.backbone.divisor)
    pixels = jnp.pad(pixels, ((0, 0), (0, canvas[0] - height), (0, canvas[1] - width), (0, 0)))
    targets = Targets(boxes, labels, jnp.ones((2, count), bool), masks, frame, points)

    @eqx.filter_jit
    @eqx.filter_grad(has_aux=True)
    def total(model):
        size = jnp.array([height, width], jnp.int32)
        terms = jax.vmap(lambda image, targets: model.loss(image, size, targets, key=jr.key(0)))(pixels, targets)
        sums = {term: jax.tree.map(lambda x: x.sum(), values) for term, values in terms.items()}
        losses = {term: values.mean() for term, values in sums.items()}
        return sum(losses.values()), (losses, sums)

    grads, (losses, sums) = total(model)
    scale = 1.0
    if kind == "retinanet":  # Detectron2 divides by a moving average of the number of positives
        positives = sums["classification"].count
        assert float(positives) > 5
        scale = float(positives) / float(expected["loss_normalizer"])
    ours = {THEIR_LOSSES[term]: float(loss) * scale for term, loss in losses.items()}
    theirs = {key.removeprefix("loss."): float(x) for key, x in expected.items() if key.startswith("loss.")}
    assert ours.keys() == theirs.keys()
    for term, loss in theirs.items():
        np.testing.assert_allclose(ours[term], loss, rtol=1e-5, atol=1e-7, err_msg=term)
    grads = to_detectron2(grads)
    for name in (key.removeprefix("grad.") for key in expected if key.startswith("grad.")):
        difference = np.linalg.norm(grads[name] * scale - expected[f"grad.{name}"])
        assert difference < 1e-3 * np.linalg.norm(expected[f"grad.{name}"]), name


# Detectron2's names of the losses.
THEIR_LOSSES = {
    "loss_objectness": "loss_rpn_cls",
    "loss_rpn_box_reg": "loss_rpn_loc",
    "loss_classifier": "loss_cls",
    "loss_box_reg": "loss_box_reg",
    "loss_mask": "loss_mask",
    "loss_keypoint": "loss_keypoint",
    **{f"loss_classifier_stage{i}": f"loss_cls_stage{i}" for i in range(3)},
    **{f"loss_box_reg_stage{i}": f"loss_box_reg_stage{i}" for i in range(3)},
    "classification": "loss_cls",
    "bbox_regression": "loss_box_reg",
}
NAMES = json.loads((DATA / "detectron2_names.json").read_text(encoding="utf-8"))


def num_classes(name):
    """Those of the published weights: all of COCO, or persons alone."""
    return 1 if "keypoint" in name else 80


def flat(tree, prefix=""):
    result = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = tuple(int(side) for side in value.split("x"))
    return result


@pytest.mark.parametrize("name", NAMES)
def test_real_names_and_shapes(name):
    model = eqx.filter_eval_shape(zoo.build, name, num_classes(name), key=jr.key(0))
    assert detectron2_shapes(model) == flat(NAMES[name])


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("mask_rcnn_resnet50_fpn_detectron2", 44_343_216),
        ("retinanet_resnet50_fpn_detectron2", 37_915_572),
        ("keypoint_rcnn_resnet50_fpn_detectron2", 59_133_158),
        ("cascade_mask_rcnn_resnet50_fpn_detectron2", 71_984_926),
    ],
)
def test_parameter_counts(name, parameters):
    """Those of Detectron2, which has no outputs for the boxes and masks of the background. Frozen norms are buffers."""
    shapes = detectron2_shapes(eqx.filter_eval_shape(zoo.build, name, num_classes(name), key=jr.key(0)))
    assert sum(math.prod(shape) for key, shape in shapes.items() if ".norm." not in key) == parameters
