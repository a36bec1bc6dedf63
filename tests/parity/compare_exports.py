"""Trains a small Faster R-CNN, exports it as ONNX, also in float16 and INT8, and as TFLite, and evaluates all of them.

    python tests/parity/compare_exports.py --data DIR --output runs/exports

`DIR` holds `train.json`, `test.json` and `images/` (the blood-cell dataset BCCD in COCO format, for instance). The
backbone is a ResNet-18-FPN trained from scratch. Its norms are frozen, with statistics measured once, on the first
batch: like those of imported weights, they fold into the convolutions, which GroupNorm does not. The trained weights
stay in `--output` and are reused by the next call. `--run` takes the detector of a run of train.py instead, such as
that of `real_weights.py`. Prints AP, file size and seconds per image of the detector, also in bfloat16, and of each
export: of ONNX if the extra `onnx` is installed, of TFLite if `edge` is. The two extras need different versions and so
an environment each: call the script in both with the same `--output`, whose `exports.json` then has the rows of both.
"""
# pyright: reportMissingImports=false

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro

from detectax_eqx import Detections, data, evaluate, export, models, nn, train, zoo
from detectax_eqx.export import require
from detectax_eqx.weights import load_safetensors, save_safetensors


MIN_SIZE, MAX_SIZE, CANVAS = 160, 224, (160, 224)
SIZES = {"canvases": [CANVAS], "min_size": MIN_SIZE, "max_size": MAX_SIZE}
ANCHORS = ((16.0,), (32.0,), (64.0,), (96.0,), (128.0,))
SAMPLING = models.TwoStageSampling(pre_nms_top_n=200, post_nms_top_n=200, rpn_samples=128, box_samples=64)
CALIBRATION_IMAGES = 48


@dataclass
class Options:
    """Options of the comparison."""

    data: Path
    """Folder with train.json, test.json and images/."""
    output: Path
    """Folder for the weights, the exports and the result."""
    run: Path | None = None
    """Folder of a run of train.py whose detector is exported. Default: train one."""
    steps: int = 300
    """Training steps."""
    batch_size: int = 4
    """Images per step."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW."""


@eqx.filter_jit
def build(key, num_classes):
    """The detector, with norms that are still the identity."""
    keys = jr.split(key, 3)
    backbone = nn.BackboneWithFPN(nn.resnet18(key=keys[0]), key=keys[1])
    model = models.faster_rcnn(backbone, num_classes, key=keys[2], hidden_size=256, anchor_sizes=ANCHORS)
    preprocessing = models.Preprocessing(models.ShortestEdge(MIN_SIZE, MAX_SIZE))
    return replace(model, preprocessing=preprocessing, sampling=SAMPLING)


@eqx.filter_jit
def with_statistics(body, images):
    """A ResNet of basic blocks whose frozen norms have the statistics of their inputs for `images`."""

    def fitted(norm, x):
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3))
        norm = eqx.tree_at(lambda n: (n.running_mean, n.running_var), norm, (mean, variance))
        return norm, jax.vmap(norm)(x)

    def fitted_block(block, x):
        norm1, y = fitted(block.norm1, jax.vmap(block.conv1)(x))
        norm2, y = fitted(block.norm2, jax.vmap(block.conv2)(nn.relu(y)))
        block = eqx.tree_at(lambda b: (b.norm1, b.norm2), block, (norm1, norm2))
        if block.downsample is not None:
            norm, x = fitted(block.downsample.norm, jax.vmap(block.downsample.conv)(x))
            block = eqx.tree_at(lambda b: b.downsample.norm, block, norm)
        return block, nn.relu(x + y)

    norm1, x = fitted(body.norm1, jax.vmap(body.conv1)(images))
    x = jax.vmap(partial(nn.max_pool2d, kernel_size=3, stride=2, padding=1))(nn.relu(x))
    layers = []
    for blocks in body.layers:
        fitted_blocks = []
        for block in blocks:
            block, x = fitted_block(block, x)
            fitted_blocks.append(block)
        layers.append(tuple(fitted_blocks))
    return eqx.tree_at(lambda b: (b.norm1, b.layers), body, (norm1, tuple(layers)))


def augmented(example, *, key, flip_probability=0.5):
    """One image of the batch on its canvas, its size and its targets."""
    return train.augment(
        example.images.pixels,
        example.images.sizes,
        example.targets,
        canvas=CANVAS,
        min_sizes=(MIN_SIZE,),
        max_size=MAX_SIZE,
        flip_probability=flip_probability,
        key=key,
    )


def loss(model, example, *, key):
    """The loss of one image."""
    keys = jr.split(key)
    image, size, targets = augmented(example, key=keys[0])
    return model.loss(image, size, targets, key=keys[1])


def trainable(model):
    """Mask of all parameters except the norms' statistics."""

    def mask(leaf):
        if not isinstance(leaf, nn.FrozenBatchNorm):
            return eqx.is_array(leaf)
        every = jax.tree.map(lambda _: True, leaf)
        return eqx.tree_at(lambda n: (n.running_mean, n.running_var), every, (False, False))

    return jax.tree.map(mask, model, is_leaf=lambda leaf: isinstance(leaf, nn.FrozenBatchNorm))


def trained(dataset, options):
    """The detector after training."""
    buckets = data.make_buckets(dataset.sizes, **SIZES)
    loader = data.Loader(dataset, batch_size=options.batch_size, buckets=buckets, max_objects=40, mask_size=None)
    model = build(jr.key(0), dataset.num_classes)
    _, first = next(iter(loader.iterate(0, 1)))

    def prepared(example):
        return model.preprocessing.normalize(*augmented(example, key=jr.key(0), flip_probability=0.0)[:2])

    assert isinstance(model.backbone, nn.BackboneWithFPN)
    body = with_statistics(model.backbone.body, jax.vmap(prepared)(jax.tree.map(jnp.asarray, first)))
    model = eqx.tree_at(lambda m: m.backbone.body, model, body)
    optimizer = train.adamw(
        train.warmup_cosine(options.learning_rate, total_steps=options.steps, warmup_steps=50), weight_decay=1e-2
    )
    state = train.init_train_state(model, optimizer, trainable=trainable(model), key=jr.key(0))
    step = train.make_train_step(loss, optimizer, trainable=trainable(model))
    for k, batch in loader.iterate(0, options.steps):
        state, metrics = step(state, batch)
        if k % 20 == 19 or k == 0:
            print(f"step {k + 1}: loss {float(metrics['loss']):.3f}", flush=True)
    return state.model


@dataclass
class Setup:
    """What every export is built from and evaluated on."""

    output: Path
    test_set: data.CocoDataset
    shape: export.Shape
    names: list[str]
    images: list[np.ndarray]
    """Images to calibrate on."""


def measured(detect: Callable, setup: Setup) -> dict[str, float]:
    """AP and seconds per image of `detect`, which maps an image of the source's size and its size to detections."""
    results, seconds, dataset = [], [], setup.test_set
    image_ids = [image.id for image in dataset.images]
    source = data.Bucket(setup.shape.canvas, setup.shape.source, tuple(range(len(dataset))))
    for images in data.eval_batches(dataset, batch_size=1, buckets=[source]):
        began = time.perf_counter()
        detections = jax.tree.map(np.asarray, detect(images.pixels, images.sizes))
        seconds.append(time.perf_counter() - began)
        results += evaluate.to_coco_results(detections, images, image_ids=image_ids, category_ids=dataset.category_ids)
    numbers = evaluate.evaluate_coco(dataset, results).numbers
    return {"AP": numbers["AP"], "AP50": numbers["AP50"], "seconds": float(np.median(seconds))}


def in_turn(slow, fast, images, shape, *, rounds=3) -> list[float]:
    """How many times as fast `fast` is as `slow`, for each image and each round after the first."""
    ratios = []
    for i in range(rounds):
        for image in images:
            padded, sizes = export.pad_images([image], shape)
            seconds = []
            for session in (slow, fast):
                began = time.perf_counter()
                session.run(None, {"images": padded, "image_sizes": sizes})
                seconds.append(time.perf_counter() - began)
            if i > 0:
                ratios.append(seconds[0] / seconds[1])
    return ratios


def onnx_rows(model, setup: Setup) -> dict[str, dict[str, float]]:
    """Rows of the ONNX files in float32, float16 and INT8, and how many times as fast the last is as the first."""
    import onnxruntime

    rows, sessions = {}, {}
    files = {"onnx": "detector.onnx", "onnx float16": "detector.half.onnx", "onnx int8": "detector.int8.onnx"}
    files = {name: setup.output / file for name, file in files.items()}
    about = {"shape": setup.shape, "images": setup.images[:8], "class_names": setup.names}
    export.save_onnx(model, files["onnx"], **about)
    export.save_onnx(model, files["onnx float16"], half=True, **about)
    export.quantize_onnx(files["onnx"], files["onnx int8"], images=setup.images)
    for name, file in files.items():
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        sessions[name] = session

        def run(images, sizes, session=session):
            return Detections(*session.run(None, {"images": images, "image_sizes": sizes}))

        rows[name] = measured(run, setup) | {"MB": file.stat().st_size / 1e6}
    ratios = in_turn(sessions["onnx"], sessions["onnx int8"], setup.images[:12], setup.shape)
    print(
        f"int8 is {np.median(ratios):.2f}× as fast as float, {min(ratios):.2f}–{max(ratios):.2f}, {len(ratios)} pairs"
    )
    rows["onnx int8"]["times as fast as float"] = float(np.median(ratios))
    return rows


def tflite_rows(model, setup: Setup) -> dict[str, dict[str, float]]:
    """The row of the TFLite files; prints the operators that they use."""
    folder = setup.output / "edge"
    export.save_tflite(model, folder, shape=setup.shape, images=setup.images, class_names=setup.names)
    detector = export.TFLiteDetector(model, folder)

    def run(images, sizes):
        detections = detector(images[0, : sizes[0, 0], : sizes[0, 1]])
        return jax.tree.map(lambda x: x[None], detections)

    size = sum(file.stat().st_size for file in folder.glob("*.tflite")) / 1e6
    row = measured(run, setup) | {"MB": size}
    operators = detector.operators()
    print("operators:", ", ".join(sorted(operators)))
    print("of them not the Edge TPU's:", ", ".join(sorted(operators - export.EDGE_TPU_OPERATORS)) or "none")
    return {"tflite int8": row}


def main(options: Options) -> None:
    """Trains, exports and evaluates."""
    images = options.data / "images"
    train_set, test_set = (data.load_coco(options.data / f"{name}.json", images) for name in ("train", "test"))
    options.output.mkdir(parents=True, exist_ok=True)
    weights, result = options.output / "model.safetensors", options.output / "exports.json"
    if options.run is not None:
        model = zoo.Predictor.from_checkpoint(options.run).model
    else:
        if not weights.exists():
            result.unlink(missing_ok=True)
            save_safetensors(trained(train_set, options), weights)
        model = load_safetensors(build(jr.key(0), train_set.num_classes), weights)

    heights, widths = zip(*(model.preprocessing.resize(size) for size in test_set.sizes), strict=True)
    canvas = models.smallest_canvas((max(heights), max(widths)), divisor=model.backbone.divisor)
    limits = model.preprocessing.limits
    (bucket,) = data.make_buckets([*train_set.sizes, *test_set.sizes], canvases=[canvas], **limits)
    setup = Setup(
        options.output,
        test_set,
        export.Shape(1, bucket.source, canvas),
        [category.name for category in test_set.categories],
        [data.read_image(image.path) for image in train_set.images[:CALIBRATION_IMAGES]],
    )
    rows = json.loads(result.read_text()) if result.exists() else {}  # those of the other environment
    for name, detector in (("jax", model), ("jax bfloat16", nn.cast(model, jnp.bfloat16))):
        rows[name] = measured(jax.jit(export.detection_program(detector, setup.shape)), setup)
    for extra, measure in (("onnx", onnx_rows), ("edge", tflite_rows)):
        try:
            require(extra)
        except ImportError as error:
            print(error)
        else:
            rows |= measure(model, setup)
    print(json.dumps(rows, indent=1))
    result.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
