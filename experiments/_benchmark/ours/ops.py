"""Operators of this project, as programs on one example."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from detectax_eqx import nn, ops
from detectax_eqx.weights import load_torchvision

from ..inputs import STRIDES
from ..worker import Case


Arrays = dict[str, np.ndarray]
Model = TypeVar("Model", bound=eqx.Module)


def compiled(function: Callable, *args: Any, names: str | tuple[str, ...] = "") -> Case:
    """A case of a function jitted over its arguments, which lie on the device before the clock starts."""
    args = jax.tree.map(jnp.asarray, args)
    run = jax.jit(function)
    named = (names,) if isinstance(names, str) else names

    def arrays(result: Any) -> Arrays:
        return dict(zip(named, map(np.asarray, (result,) if isinstance(names, str) else result), strict=True))

    return Case(lambda: jax.block_until_ready(run(*args)), arrays)


def load(build: Callable[[jax.Array], Model], weights: str | None) -> Model:
    """What `build` makes of a key, with torchvision's parameters of a file, or its own random ones."""
    if weights is None:
        return eqx.filter_jit(build)(jr.key(0))
    return load_torchvision(eqx.filter_eval_shape(build, jr.key(0)), dict(np.load(weights)))


def nms(arrays: Arrays, *, iou_threshold: float) -> Case:
    """Plain suppression."""
    return compiled(partial(ops.nms, iou_threshold=iou_threshold), arrays["boxes"], arrays["scores"], names="keep")


def box_selection(arrays: Arrays, *, score_threshold: float, iou_threshold: float, max_detections: int) -> Case:
    """What a box head does with `(p, k)` scores and boxes: threshold, suppression within each class, the best."""

    def select(boxes, scores):
        labels = jnp.tile(jnp.arange(scores.shape[1], dtype=jnp.int32), scores.shape[0])
        boxes, scores = boxes.reshape(-1, 4), scores.reshape(-1)
        keep, valid = ops.nms_indices(
            boxes,
            scores,
            scores > score_threshold,
            iou_threshold=iou_threshold,
            max_outputs=max_detections,
            labels=labels,
        )
        return boxes[keep], scores[keep], labels[keep], valid

    case = compiled(select, arrays["boxes"], arrays["scores"], names=("boxes", "scores", "labels", "valid"))

    def kept(result: Any) -> Arrays:
        found = dict(case.arrays(result))
        valid = found.pop("valid")
        return {name: array[valid] for name, array in found.items()}

    return Case(case.run, kept)


def roi_align(arrays: Arrays, *, levels: int, backward: bool) -> Case:
    """Pooling from the level of each box, 7×7 with two samples a bin and axis; or that and its gradient."""
    maps = [arrays[f"map{i}"] for i in range(levels)]
    align = partial(ops.multilevel_roi_align, output_size=7, strides=STRIDES[:levels], sampling_ratio=2, aligned=False)
    if not backward:
        return compiled(align, maps, arrays["boxes"], names="pooled")

    def gradient(maps, boxes, cotangent):
        return jax.vjp(lambda maps: align(maps, boxes), maps)[1](cotangent)[0]

    names = tuple(f"gradient{i}" for i in range(levels))
    return compiled(gradient, maps, arrays["boxes"], arrays["cotangent"], names=names)


def paste_masks(arrays: Arrays, *, image_size: tuple[int, int], threshold: float | None = None) -> Case:
    """Masks onto an image, or where they are above a threshold."""
    paste = partial(ops.paste_masks, image_size=(image_size[0], image_size[1]), threshold=threshold)
    return compiled(paste, arrays["masks"], arrays["boxes"], names="pasted")


def redraw_masks(arrays: Arrays, *, image_size: tuple[int, int]) -> Case:
    """Masks onto an image, each time in the memory of the last result."""
    masks, boxes = jnp.asarray(arrays["masks"]), jnp.asarray(arrays["boxes"])

    @partial(jax.jit, donate_argnums=0, keep_unused=True)
    def redraw(last, masks, boxes):
        return ops.paste_masks(masks, boxes, image_size=last.shape[1:])

    pasted = jnp.zeros((len(masks), *image_size), masks.dtype)

    def run() -> jax.Array:
        nonlocal pasted
        pasted = redraw(pasted, masks, boxes)
        return pasted.block_until_ready()

    return Case(run, lambda result: {"pasted": np.asarray(result)})


def mask_targets(arrays: Arrays) -> Case:
    """Targets of a mask head, 28×28, from masks in the frame of their box."""

    def crop(masks, boxes, rois, matched):
        return ops.crop_masks(masks[matched], boxes[matched], rois, output_size=28)

    inputs = (arrays["masks_in_box"], arrays["boxes"], arrays["rois"], arrays["matched"])
    return compiled(crop, *inputs, names="targets")


def pairwise_iou(arrays: Arrays) -> Case:
    """IoU of objects and anchors."""
    return compiled(ops.pairwise_iou, arrays["boxes"], arrays["anchors"], names="iou")


def decode_boxes(arrays: Arrays) -> Case:
    """Anchors moved by their deltas."""
    return compiled(ops.decode_boxes, arrays["deltas"], arrays["anchors"], names="boxes")


def match_boxes(arrays: Arrays) -> Case:
    """Anchors matched with objects by the RPN's rule: -1 is background, -2 neither."""
    match = partial(ops.match_boxes, low_threshold=0.3, high_threshold=0.7, allow_low_quality=True)
    case = compiled(match, arrays["iou"], names=("indices", "positive", "negative"))

    def matches(result: Any) -> Arrays:
        found = case.arrays(result)
        return {"matches": np.where(found["positive"], found["indices"], np.where(found["negative"], -1, -2))}

    return Case(case.run, matches)


def resize(arrays: Arrays, *, output_size: tuple[int, int]) -> Case:
    """An image to another size, bilinear."""
    image = arrays["image"].astype(np.float32)
    size = jnp.array(image.shape[:2], jnp.int32), jnp.array(output_size, jnp.int32)

    def resized(image, image_size, output_size_):
        return ops.resize_image(
            image, image_size=image_size, output_size=output_size_, canvas=(output_size[0], output_size[1])
        )

    return compiled(resized, image, *size, names="image")


def backbone(arrays: Arrays, *, body: str, weights: str | None, backward: bool) -> Case:
    """ResNet and pyramid on images `(b, 3, h, w)`; or that and the gradient of all trained parameters."""

    def build(key):
        keys = jr.split(key)
        return nn.ResNetFPN(getattr(nn, body)(key=keys[0]), key=keys[1])

    model = load(build, weights)
    if not backward:
        names = tuple(f"p{level}" for level in range(2, 7))
        return compiled(lambda model, images: jax.vmap(model)(images), model, arrays["images"], names=names)
    trainable = _trained(model)

    def gradient(model, images):
        parameters, rest = eqx.partition(model, trainable)

        def total(parameters):
            outputs = jax.vmap(eqx.combine(parameters, rest))(images)
            return sum(jnp.mean(output**2) for output in outputs)

        return jax.grad(total)(parameters)

    case = compiled(gradient, model, arrays["images"])
    return Case(
        case.run, lambda g: {"stem": np.asarray(g.body.conv1.weight), "top": np.asarray(g.fpn.output[3].weight)}
    )


def _trained(model: nn.ResNetFPN) -> Any:
    """All but the frozen norms."""

    def is_frozen(node: Any) -> bool:
        return isinstance(node, nn.FrozenBatchNorm)

    return jax.tree.map(
        lambda node: jax.tree.map(lambda _: False, node) if is_frozen(node) else eqx.is_array(node),
        model,
        is_leaf=is_frozen,
    )


CASES = {
    case.__name__: case
    for case in (
        nms, box_selection, roi_align, paste_masks, redraw_masks, mask_targets, pairwise_iou, decode_boxes, match_boxes,
        resize, backbone,
    )
}  # fmt: skip
