"""Outputs of detectors and operators, for comparing the tricks in `_xla` with plain operations.

DETECTAX_PLAIN=1 python -m tests.plain_results results.npz
"""

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from detectax_eqx import models, nn, ops

from . import tiny_detector
from .tiny_detector import SIDE


def with_gradients(function):
    """Returns a function for the outputs of `function` and the gradients of a smooth loss on them in all arguments."""

    def run(*args):
        results, pull = jax.vjp(function, *args)
        return results, pull(jax.tree.map(jnp.cos, results))

    return run


def boxes_in(draw, n, *, height, width):
    """Boxes that overlap each other and cross the border, some of them empty."""
    corner = draw.uniform(-4, (width, height), (n, 2))
    size = draw.uniform(1, (width / 2, height / 2), (n, 2)) * (draw.uniform(size=(n, 1)) < 0.95)
    return np.concatenate([corner, corner + size], axis=1).astype(np.float32)


def convolutions():
    """1×1, 3×3 and strided kernels, and one with enough channels that Winograd's algorithm is used."""
    draw = np.random.default_rng(1)

    def one(channels, kernel, **options):
        x = draw.normal(size=(2, channels, 12, 9)).astype(np.float32)
        weight = draw.normal(size=(channels, channels, kernel, kernel)).astype(np.float32) / (kernel * channels**0.5)
        bias = draw.normal(size=channels).astype(np.float32)
        conv = jax.vmap(partial(nn.conv2d, **options), in_axes=(0, None, None))
        return with_gradients(conv), (x, weight, bias)

    cases = [one(6, 1), one(6, 3, padding=1), one(6, 3, stride=2, padding=1), one(256, 3, padding=1)]

    def run(arrays):
        return [function(*args) for (function, _), args in zip(cases, arrays, strict=True)]

    return run, [args for _, args in cases]


def attending():
    """Windows with biases, those of all heads and those of each."""
    draw = np.random.default_rng(7)
    shapes = [(2, 3, 6, 4)] * 3 + [(1, 3, 6, 2, 1), (2, 1, 6, 1, 3)]
    q, k, v, *biases = (draw.normal(size=(2, *shape)).astype(np.float32) for shape in shapes)

    def attend(q, k, v, *biases):
        return nn.attention(q, k, v, biases)

    return with_gradients(jax.vmap(attend)), q, k, v, *biases


def depthwise():
    """Kernels of 3×3 and 5×5 pixels, one with a stride."""
    draw = np.random.default_rng(8)
    x = draw.normal(size=(2, 6, 12, 9)).astype(np.float32)
    kernels = [draw.normal(size=(6, 1, side, side)).astype(np.float32) / side for side in (3, 5)]

    def run(x, kernels):
        convolve = partial(nn.conv2d, groups=6)
        convs = [partial(convolve, padding=1), partial(convolve, padding=2, stride=2)]
        return [
            with_gradients(jax.vmap(conv, in_axes=(0, None)))(x, kernel)
            for conv, kernel in zip(convs, kernels, strict=True)
        ]

    return run, x, kernels


def max_pooling():
    draw = np.random.default_rng(2)
    x = draw.integers(0, 4, (3, 11, 14)).astype(np.float32)  # with ties
    return with_gradients(partial(nn.max_pool2d, kernel_size=3, stride=2, padding=1)), x


def pooling():
    draw = np.random.default_rng(3)
    fine, coarse = (draw.normal(size=(2, 5, *shape)).astype(np.float32) for shape in ((16, 24), (8, 12)))
    boxes = np.stack([boxes_in(draw, 30, height=64, width=96) for _ in range(2)])

    def run(fine, coarse, boxes):
        def one(ratio):
            def align(fine, coarse, boxes):
                options = {"output_size": (3, 2), "strides": (4, 8), "sampling_ratio": ratio, "canonical_size": 64}
                return ops.multilevel_roi_align([fine, coarse], boxes, canonical_level=3, **options)

            return jax.vmap(with_gradients(align))(fine, coarse, boxes)

        return [one(ratio) for ratio in (0, 2)]

    return run, fine, coarse, boxes


def suppression():
    """Few and many candidates, few and many outputs, for one example and for a batch."""
    draw = np.random.default_rng(4)
    boxes = np.stack([boxes_in(draw, 5000, height=300, width=400) for _ in range(2)])
    scores = draw.uniform(size=(2, 5000)).astype(np.float32)
    labels = draw.integers(0, 3, (2, 5000), dtype=np.int32)
    valid = draw.uniform(size=(2, 5000)) < np.array([[0.1], [0.3]])

    def run(boxes, scores, labels, valid):
        def select(n, outputs, *rows):
            boxes, scores, labels, valid = (x[:n] for x in rows)
            return ops.nms_indices(boxes, scores, valid, iou_threshold=0.5, max_outputs=outputs, labels=labels)

        rows = boxes, scores, labels, valid
        one = jax.tree.map(lambda x: x[0], rows)
        return (
            ops.nms(*(x[:500] for x in (one[0], one[1], one[3])), iou_threshold=0.5),
            ops.class_aware_nms(*(x[:500] for x in one), iou_threshold=0.5),
            jax.vmap(partial(select, 300, 200))(*rows),
            jax.vmap(partial(select, 5000, 40))(*rows),
            ops.match_boxes(
                ops.pairwise_iou(one[0][:9], one[0][:300]),
                low_threshold=0.3,
                high_threshold=0.5,
                allow_low_quality=True,
            ),
        )

    return run, boxes, scores, labels, valid


def pasting():
    draw = np.random.default_rng(5)
    masks = draw.uniform(size=(2, 6, 28, 28)).astype(np.float32)
    boxes = np.stack([boxes_in(draw, 6, height=90, width=120) for _ in range(2)])

    def run(masks, boxes):
        paste = partial(ops.paste_masks, image_size=(90, 120))
        # The threshold is below every nonzero value, so that rounding cannot change the result.
        thresholded = jax.vmap(partial(paste, threshold=1e-4))(masks, boxes)
        return thresholded, jax.vmap(with_gradients(lambda masks, boxes: paste(masks, boxes)))(masks, boxes)

    return run, masks, boxes


def checkpointed():
    def make():
        return nn.ResNet(nn.BasicBlock, (1, 1, 1, 1), key=jr.key(0), width=4, checkpoint=True)

    model = tiny_detector.random_arrays(eqx.filter_eval_shape(make))
    arrays, static = eqx.partition(model, eqx.is_array)
    arrays = jax.tree.map(lambda x: x if x.ndim > 1 else x + 1, arrays)  # the norms' scales and biases
    images = np.random.default_rng(6).normal(size=(2, 3, 64, 96)).astype(np.float32)

    def run(arrays, images):
        return with_gradients(lambda arrays, images: jax.vmap(eqx.combine(arrays, static))(images))(arrays, images)

    return run, arrays, images


def faster_rcnn():
    model = tiny_detector.build()
    options = {"preprocessing": model.preprocessing, "sampling": model.sampling}
    return _detector(models.FasterRCNN(model.backbone, model.rpn, model.box_head, **options))


def mask_rcnn():
    return _detector(tiny_detector.build())


def _detector(model):
    arrays, static = eqx.partition(model, eqx.is_array)
    batch = jax.tree.map(lambda x: x[:2], tiny_detector.make_batch(0))
    selection = replace(model.selection, score_threshold=0.1, max_detections=12, pre_nms_top_n=40, post_nms_top_n=40)

    def run(arrays, images, targets):
        model, size = eqx.combine(arrays, static), jnp.array([SIDE, SIDE])

        def losses(arrays, image, target, key):
            terms = eqx.combine(arrays, static).loss(image, size, target, key=key)
            return {name: term.total / jnp.maximum(term.count, 1) for name, term in terms.items()}

        def total(arrays):
            terms = jax.vmap(losses, in_axes=(None, 0, 0, 0))(arrays, images, targets, jr.split(jr.key(1)))
            return sum(term.sum() for term in terms.values()), terms

        gradients, terms = jax.grad(total, has_aux=True)(arrays)
        return jax.vmap(lambda image: model(image, size, selection=selection))(images), terms, gradients

    return run, arrays, batch.images.pixels, batch.targets


DETECTORS = (faster_rcnn, mask_rcnn)
OPERATORS = (convolutions, depthwise, max_pooling, pooling, suppression, pasting, checkpointed)


def results(case):
    """The arrays that a case computes, as a dictionary of names to arrays."""
    run, *args = case()
    leaves = jax.tree.leaves(jax.jit(run)(*args))
    return {f"{case.__name__}_{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}


if __name__ == "__main__":
    arrays: dict[str, Any] = {name: array for case in OPERATORS + DETECTORS for name, array in results(case).items()}
    np.savez(sys.argv[1], **arrays)
