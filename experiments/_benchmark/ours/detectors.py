"""This project's detectors: whole detection, and whole training steps."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from detectax_eqx import Batch, Images, Targets, models, nn, ops, train, zoo

from ..inputs import NUM_CLASSES
from ..worker import Case
from .ops import Arrays, Model, load


def detector(
    name: str, weights: str | None, *, size: tuple[int, int] | None = None, **options: Any
) -> models.AbstractDetector:
    """The named detector with torchvision's parameters of a file, or random ones.

    - `size`: of the images that it is to look at as they are.
    """
    model = load(lambda key: zoo.build(name, NUM_CLASSES, key=key, **options), weights)
    if size is None:
        return model
    resize = models.ShortestEdge(min(size), max(size))
    return replace(model, preprocessing=replace(model.preprocessing, resize=resize))


def inference(arrays: Arrays, *, name: str, weights: str | None, precision: str) -> Case:
    """From uint8 images on the host to detections, masks pasted onto their image."""
    set_product_precision(precision)
    images = arrays["images"]
    size = images.shape[1:3]
    model = in_precision(detector(name, weights, size=size), precision)

    def detect(model, image):
        found = models.detect(model, image)
        pasted = None if found.masks is None else ops.paste_masks(found.masks, found.boxes, image_size=size)
        return found, pasted

    detect_all = eqx.filter_vmap(detect, in_axes=(None, 0))
    options = {"compiler_options": nn.convolution_options()}
    program, facts = compiled_program(eqx.filter_jit(detect_all, **options), model, images)  # pyright: ignore

    def detections(result: Any) -> Arrays:
        found, pasted = result
        named = {f: np.asarray(getattr(found, f)) for f in ("boxes", "scores", "labels", "valid")}
        if pasted is not None:
            named["masks"] = np.stack([np.packbits(np.asarray(masks) > 0.5, axis=-1) for masks in pasted])
        return named

    return Case(lambda: jax.block_until_ready(program(model, images)), detections, facts)


def training(
    arrays: Arrays,
    *,
    name: str,
    weights: str | None,
    precision: str,
    learning_rate: float,
    checkpoint: bool = False,
) -> Case:
    """A step as `train.py` makes it: resize, forward, backward, SGD; `facts` describe the compiled program."""
    set_product_precision(precision)
    model = detector(name, weights, checkpoint=checkpoint)
    step, state, batch = make_step(arrays, model, precision=precision, learning_rate=learning_rate)
    del model  # the state is a copy
    options = {"compiler_options": train.step_compiler_options()}
    update = eqx.filter_jit(lambda batch, state: step(state, batch), donate="all-except-first", **options)  # pyright: ignore[reportCallIssue]
    program, facts = compiled_program(update, batch, state)
    holder = [state]
    del state  # a step consumes it

    def run():
        state, metrics = program(batch, holder.pop())
        holder.append(state)
        return jax.block_until_ready(metrics)

    def losses(metrics: Any) -> Arrays:
        return {key: np.asarray(value) for key, value in metrics.items() if key not in train.METRICS}

    return Case(run, losses, facts)


def make_step(
    arrays: Arrays, model: models.AbstractDetector, *, precision: str, learning_rate: float
) -> tuple[Callable, train.TrainState, Batch]:
    """A training step, its state and its batch."""
    batch = make_batch(arrays, with_masks="masks" in model.needs)

    def loss(model, example: Batch, *, key):
        augment_key, loss_key = jr.split(key)
        image, image_size, targets = train.augment(
            example.images.pixels,
            example.images.sizes,
            example.targets,
            canvas=example.images.canvas,
            min_sizes=(min(example.images.canvas),),
            max_size=max(example.images.canvas),
            flip_probability=0.0,
            key=augment_key,
        )
        return in_precision(model, precision).loss(image, image_size, targets, key=loss_key)

    optimizer, trainable = train.sgd(learning_rate), models.trainable(model)
    state = train.init_train_state(model, optimizer, trainable=trainable, key=jr.key(0))
    return train.make_train_step(loss, optimizer, trainable=trainable), state, batch


def make_batch(arrays: Arrays, *, with_masks: bool, max_objects: int = 100, mask_size: int = 112) -> Batch:
    """Images and their objects, padded as `data.Loader` pads them."""
    pixels, boxes, labels = arrays["images"], arrays["boxes"], arrays["labels"]
    count, objects = labels.shape
    size = np.tile(np.array(pixels.shape[1:3], np.int32), (count, 1))

    def padded(array):
        return np.pad(array, [(0, 0), (0, max_objects - objects), *[(0, 0)] * (array.ndim - 2)])

    masks = np.broadcast_to(arrays["mask_in_box"], (count, objects, mask_size, mask_size)) if with_masks else None
    targets = Targets(
        padded(boxes),
        padded(labels),
        padded(np.ones((count, objects), bool)),
        None if masks is None else padded(masks),
        None if masks is None else padded(boxes),
    )
    indices = np.arange(count, dtype=np.int32)
    images = Images(pixels, size, size, indices, np.ones(count, bool), canvas=pixels.shape[1:3])
    return Batch(images, targets, overflow=np.zeros(count, np.int32))


def compiled_program(function: Any, *args: Any) -> tuple[Any, dict[str, float]]:
    """A jitted function compiled for some arguments, the seconds that took, and what it says of its memory."""
    began = time.perf_counter()
    lowered = function.lower(*args)
    traced = time.perf_counter()
    program = lowered.compile()
    facts = {"trace s": traced - began, "compile s": time.perf_counter() - traced}
    analysis = program.compiled.memory_analysis()
    if analysis is not None:  # not every platform tells
        parts = {
            part: getattr(analysis, f"{part}_size_in_bytes") / 1e6 for part in ("argument", "output", "alias", "temp")
        }
        facts |= {"arguments MB": parts["argument"], "temp MB": parts["temp"]}
        facts["program MB"] = parts["argument"] + parts["output"] - parts["alias"] + parts["temp"]
    return program, facts


def in_precision(model: Model, precision: str) -> Model:
    """The model to compute with."""
    return nn.cast(model, jnp.bfloat16) if precision == "bfloat16" else model


def set_product_precision(precision: str) -> None:
    """Full float32, or with products in TF32, where the device has it."""
    jax.config.update("jax_default_matmul_precision", "highest" if precision == "float32" else "default")


def size(arrays: Arrays, *, name: str) -> Case:
    """Trainable numbers of the named detector."""
    model = eqx.filter_eval_shape(lambda key: zoo.build(name, NUM_CLASSES, key=key), jr.key(0))
    return Case(lambda: None, facts={"parameters": models.num_parameters(model)})


CASES = {case.__name__: case for case in (inference, training, size)}
