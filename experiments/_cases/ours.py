"""This project's worker: cases for operators, detectors, training steps, exports and the data pipeline."""
# pyright: reportMissingImports=false

import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from _benchmark.inputs import IMAGE_SIZE, NUM_CLASSES, STRIDES, totals
from _benchmark.worker import Arrays, Case, Side

from detectax_eqx import Batch, Images, Targets, data, export, models, nn, ops, train, zoo
from detectax_eqx.weights import load_torchvision


Model = TypeVar("Model", bound=eqx.Module)
FIELDS = ("boxes", "scores", "labels", "valid")


def operator(function: Callable[..., Any], arrays: Arrays, **options: Any) -> Case:
    """Returns a case for a function, jitted; its arrays are moved to the device before timing."""
    arrays, run = jax.tree.map(jnp.asarray, arrays), jax.jit(partial(function, **options))
    return Case(lambda: jax.block_until_ready(run(**arrays)), lambda result: jax.tree.map(np.asarray, result))


def box_selection(boxes, scores):
    """Selects detections from `(p, k)` scores and boxes: threshold, suppression per class, highest scores."""
    labels = jnp.tile(jnp.arange(scores.shape[1], dtype=jnp.int32), scores.shape[0])  # (p k)
    boxes, scores = boxes.reshape(-1, 4), scores.reshape(-1)  # (p k, 4), (p k)
    keep, valid = ops.nms_indices(boxes, scores, scores > 0.05, iou_threshold=0.5, max_outputs=100, labels=labels)
    return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep], "valid": valid}


# Pools each box from its level, 7×7 with two samples per bin and axis.
roi_align = partial(ops.multilevel_roi_align, output_size=7, strides=STRIDES, sampling_ratio=2, aligned=False)


def roi_align_gradient(maps, boxes, cotangent):
    """Returns the gradient of pooling with respect to each map."""
    (gradients,) = jax.vjp(lambda maps: roi_align(maps, boxes), maps)[1](cotangent)
    return {f"gradient{i}": gradient for i, gradient in enumerate(gradients)}


OPERATORS: dict[str, Callable[..., Any]] = {
    "nms": lambda boxes, scores, iou_threshold=0.5: {"keep": ops.nms(boxes, scores, iou_threshold=iou_threshold)},
    "box_selection": box_selection,
    "roi_align": lambda maps, boxes: {"pooled": roi_align(maps, boxes)},
    "roi_align_gradient": roi_align_gradient,
    "paste_masks": lambda masks, boxes, **options: {"pasted": ops.paste_masks(masks, boxes, **options)},
    # Input masks are in the frame of their box.
    "mask_targets": lambda masks_in_box, boxes, rois, matched, **_: {
        "targets": ops.crop_masks(masks_in_box[matched], boxes[matched], rois, output_size=28)
    },
    "pairwise_iou": lambda boxes, anchors: {"iou": ops.pairwise_iou(boxes, anchors)},
    "decode_boxes": lambda deltas, anchors: {"boxes": ops.decode_boxes(deltas, anchors)},
    # The matching rule of the RPN.
    "match_boxes": lambda iou: ops.match_boxes(
        iou, low_threshold=0.3, high_threshold=0.7, allow_low_quality=True
    )._asdict(),
    "resize": lambda image, sizes, canvas, **_: {
        "image": ops.resize_image(image, image_size=sizes[0], output_size=sizes[1], canvas=canvas)
    },
}


def redraw_masks(arrays: Arrays, *, image_size: tuple[int, int]) -> Case:
    """Returns a case that pastes masks, reusing the memory of the previous result."""
    masks, boxes = jnp.asarray(arrays["masks"]), jnp.asarray(arrays["boxes"])
    pasted = [jnp.zeros((len(masks), *image_size), masks.dtype)]

    @partial(jax.jit, donate_argnums=0, keep_unused=True)
    def redraw(last, masks, boxes):
        return ops.paste_masks(masks, boxes, image_size=last.shape[1:])

    def run() -> jax.Array:
        pasted.append(redraw(pasted.pop(), masks, boxes))
        return pasted[0].block_until_ready()

    return Case(run, lambda result: {"pasted": np.asarray(result)})


def load(build: Callable[..., Model], weights: str | None) -> Model:
    """Builds a model with `build(key=…)`, and loads torchvision's parameters from a file if `weights` is given."""
    if weights is None:
        return eqx.filter_jit(build)(key=jr.key(0))
    return load_torchvision(eqx.filter_eval_shape(build, key=jr.key(0)), dict(np.load(weights)))


def detector(
    name: str, weights: str | None, size: tuple[int, int], num_classes: int = NUM_CLASSES
) -> models.AbstractDetector:
    """Builds a detector that keeps images of `size` unscaled, with weights from a file or at random.

    One that resizes to a square keeps doing so.
    """
    model = load(partial(zoo.build, name, num_classes), weights)
    if isinstance(model.preprocessing.resize, models.Square):
        return model
    resize = models.ShortestEdge(min(size), max(size))
    return replace(model, preprocessing=replace(model.preprocessing, resize=resize, square_canvas=False))


def backbone(arrays: Arrays, *, name: str, weights: str | None, backward: bool) -> Case:
    """Returns a case for ResNet and pyramid on images `(b, 3, h, w)`, or also for their trainable gradients."""
    model = detector(name, weights, IMAGE_SIZE)
    trained = models.trainable(model).backbone

    def forward(net, images):
        return {f"p{level}": output for level, output in enumerate(jax.vmap(net)(images), 2)}

    def gradient(net, images):
        parameters, frozen = eqx.partition(net, trained)

        def total(parameters):
            return sum(jnp.mean(output**2) for output in forward(eqx.combine(parameters, frozen), images).values())

        return jax.grad(total)(parameters)

    if not backward:
        return operator(forward, {"net": model.backbone, **arrays})
    run = operator(gradient, {"net": model.backbone, **arrays}).run
    return Case(
        run, lambda net: {"stem": np.asarray(net.body.conv1.weight), "top": np.asarray(net.fpn.output[3].weight)}
    )


def inference(
    arrays: Arrays,
    *,
    name: str,
    weights: str | None,
    precision: str,
    num_classes: int = NUM_CLASSES,
    threshold: float | None = None,
) -> Case:
    """Returns a case for detection, from uint8 images on the host to boxes and pasted masks.

    `threshold`: for masks that are true or false, as Detectron2's.
    """
    set_product_precision(precision)
    images = arrays["images"]
    size = images.shape[1:3]
    model = in_precision(detector(name, weights, size, num_classes), precision)

    def detect(model, image):
        found = models.detect(model, image)
        if found.masks is None:
            return found, None
        return found, model.paste(found.masks, found.frames, image_size=size, threshold=threshold)

    options: dict[str, Any] = {"compiler_options": nn.convolution_options()}
    detect_all = eqx.filter_jit(eqx.filter_vmap(detect, in_axes=(None, 0)), **options)
    program, facts = compiled_program(detect_all, model, images)

    def detections(result: Any) -> list[Arrays]:
        found, pasted = result
        arrays = {field: np.asarray(getattr(found, field)) for field in FIELDS}
        if pasted is not None:
            arrays["masks"] = np.stack([np.packbits(np.asarray(masks) > 0.5, axis=-1) for masks in pasted])
        return by_image(arrays)

    return Case(lambda: jax.block_until_ready(program(model, images)), detections, facts)


def by_image(arrays: Arrays) -> list[Arrays]:
    """Splits a batch into the valid detections of each image."""
    return [{name: array[i][valid] for name, array in arrays.items()} for i, valid in enumerate(arrays["valid"])]


def onnx(arrays: Arrays, *, name: str, weights: str | None, precision: str) -> Case:
    """Returns a case for the exported ONNX file in onnxruntime, from uint8 images; masks stay in box frames."""
    import onnxruntime

    images = arrays["images"]
    size = images.shape[1:3]
    shape, names = export.Shape(len(images), size, size), [str(i) for i in range(NUM_CLASSES)]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "detector.onnx"
        export.save_onnx(detector(name, weights, size), file, shape=shape, images=list(images), class_names=names)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    feeds = {"images": images, "image_sizes": np.tile(np.int32(size), (len(images), 1))}
    return Case(
        lambda: session.run(list(FIELDS), feeds), lambda result: by_image(dict(zip(FIELDS, result, strict=True)))
    )


def training(
    arrays: Arrays,
    *,
    name: str,
    weights: str | None,
    precision: str,
    learning_rate: float,
    checkpoint: bool = False,
    num_classes: int = NUM_CLASSES,
) -> Case:
    """Returns a case for a step as in `train.py`: resize, forward, backward, SGD. `facts` describe its program."""
    set_product_precision(precision)

    def loss(model, example: Batch, *, key):
        augment_key, loss_key = jr.split(key)
        images, canvas = example.images, example.images.canvas
        sizes: dict[str, Any] = {"canvas": canvas, "min_sizes": (min(canvas),), "max_size": max(canvas)}
        sizes["square"] = isinstance(model.preprocessing.resize, models.Square)
        image, image_size, targets = train.augment(
            images.pixels, images.sizes, example.targets, **sizes, flip_probability=0.0, key=augment_key
        )
        return in_precision(model, precision).loss(image, image_size, targets, key=loss_key)

    model = load(partial(zoo.build, name, num_classes, checkpoint=checkpoint), weights)
    optimizer, trainable = train.sgd(learning_rate), models.trainable(model)
    states = [train.init_train_state(model, optimizer, trainable=trainable, key=jr.key(0))]
    batch = make_batch(arrays, with_masks="masks" in model.needs)
    del model  # the state holds a copy
    step = train.make_train_step(loss, optimizer, trainable=trainable)
    options: dict[str, Any] = {"compiler_options": train.step_compiler_options(), "donate": "all-except-first"}
    program, facts = compiled_program(
        eqx.filter_jit(lambda batch, state: step(state, batch), **options), batch, states[0]
    )

    def run() -> Any:
        state, metrics = program(batch, states.pop())  # donated by the step
        states.append(state)
        return jax.block_until_ready(metrics)

    def losses(metrics: Any) -> Arrays:
        return {key: np.asarray(value) for key, value in metrics.items() if key not in train.METRICS}

    return Case(run, losses, facts)


def make_batch(arrays: Arrays, *, with_masks: bool, max_objects: int = 100) -> Batch:
    """Makes a batch of images and objects, padded as in `data.Loader`."""
    pixels, labels, mask = arrays["images"], arrays["labels"], arrays["mask_in_box"]
    count, objects = labels.shape

    def padded(array):
        return np.pad(array, [(0, 0), (0, max_objects - objects), *[(0, 0)] * (array.ndim - 2)])

    boxes = padded(arrays["boxes"])
    masks = (padded(np.broadcast_to(mask, (count, objects, *mask.shape))), boxes) if with_masks else ()
    targets = Targets(boxes, padded(labels), padded(np.ones((count, objects), bool)), *masks)
    sizes, indices = np.tile(np.int32(pixels.shape[1:3]), (count, 1)), np.arange(count, dtype=np.int32)
    images = Images(pixels, sizes, sizes, indices, indices >= 0, canvas=pixels.shape[1:3])
    return Batch(images, targets, overflow=np.zeros(count, np.int32))


def compiled_program(function: Any, *args: Any) -> tuple[Any, dict[str, float]]:
    """Compiles a jitted function. Returns the program, and facts: compile seconds and memory analysis."""
    began = time.perf_counter()
    program = function.lower(*args).compile()
    facts = {"compile s": time.perf_counter() - began}
    analysis = program.compiled.memory_analysis()
    if analysis is not None:  # some platforms have none
        arguments, results, shared, temporaries = (
            getattr(analysis, f"{part}_size_in_bytes") / 1e6 for part in ("argument", "output", "alias", "temp")
        )
        facts |= {"arguments MB": arguments, "temp MB": temporaries}
        facts["program MB"] = arguments + results - shared + temporaries
    return program, facts


def in_precision(model: Model, precision: str) -> Model:
    """Casts the model to the precision to compute in."""
    return nn.cast(model, jnp.bfloat16) if precision == "bfloat16" else model


def set_product_precision(precision: str) -> None:
    """Sets the precision of matrix products: full float32, or TF32 where the device supports it."""
    jax.config.update("jax_default_matmul_precision", "highest" if precision == "float32" else "default")


def size(arrays: Arrays, *, name: str) -> Case:
    """Counts the trainable parameters of the named detector."""
    model = eqx.filter_eval_shape(lambda: zoo.build(name, NUM_CLASSES, key=jr.key(0)))
    return Case(lambda: None, facts={"parameters": models.num_parameters(model)})


def feed(arrays: Arrays, *, folder: str, masks: bool, batch_size: int, workers: int) -> Case:
    """Returns a case for one epoch of a COCO folder, loaded as in `train.py`: uint8 canvases, box-frame masks."""
    dataset = data.load_coco(Path(folder) / "annotations.json", Path(folder) / "images")
    buckets, side = data.make_buckets(dataset.sizes), 112 if masks else None
    loader = data.Loader(dataset, batch_size=batch_size, buckets=buckets, mask_size=side, num_threads=workers)
    steps, passes = loader.steps_per_epoch, iter(range(10**6))

    def one_pass():
        first = next(passes) * steps
        return (batch for _, batch in loader.iterate(first, first + steps))

    def described(batch: Batch) -> tuple[Any, ...]:
        targets, boxes, area = batch.targets, np.asarray(batch.targets.boxes), 0.0
        if targets.masks is not None:
            covered = np.asarray(targets.masks).mean(axis=(2, 3)) / 255
            area = (covered * np.prod(boxes[..., 2:] - boxes[..., :2], axis=-1)).sum()
        corners, pixels = boxes.sum(axis=(0, 1), dtype=np.float64), np.asarray(batch.images.pixels)
        return batch.images.valid.sum(), pixels.sum(dtype=np.int64), targets.valid.sum(), corners, area

    return Case(
        lambda: sum(len(batch.images.valid) for batch in one_pass()), lambda _: totals(map(described, one_pass()))
    )


def buckets(arrays: Arrays) -> Case:
    """Counts the programs that images of the given sizes need."""
    sizes = [(int(height), int(width)) for height, width in arrays["sizes"]]
    return Case(lambda: None, facts={"buckets": len(data.make_buckets(sizes))})


def about() -> dict[str, Any]:
    """Returns versions and the device."""
    device, cpus = jax.devices()[0], Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", cpus.read_text()) if cpus.exists() else None
    on_host = device.platform == "cpu"
    return {
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "platform": device.platform,
        "kind": (name[1].strip() if name else platform.processor()) if on_host else device.device_kind,
        "count": os.cpu_count() if on_host else len(jax.devices()),
    }


if __name__ == "__main__":
    set_product_precision("float32")
    cases = {name: partial(operator, function) for name, function in OPERATORS.items()}
    others = (redraw_masks, backbone, inference, onnx, training, size, feed, buckets)
    peak = None if jax.default_backend() == "cpu" else lambda: jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    Side(cases | {case.__name__: case for case in others}, about(), peak).serve()
