"""Trains this project's Faster R-CNN or torchvision's from the same weights, on the same batches, and evaluates it.

    python tests/parity/compare_training.py --side ours --data DIR --output runs/compare
    python tests/parity/compare_training.py --side torchvision --data DIR --output runs/compare

`DIR` holds `train.json`, `test.json` and `images/` (the blood-cell set BCCD in COCO format, for instance).
ResNet-18-FPN with GroupNorm from scratch, small images, AdamW with a cosine schedule, no augmentation. Both sides see
the same batches from the same loader; only the random sampling of anchors and proposals differs. Run it in the
environment of `make parity`.
"""
# pyright: reportMissingImports=false

import json
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import equinox as eqx
import jax.random as jr
import numpy as np
import torch
import tyro
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from detectax_eqx import Detections, data, evaluate, models, nn, train
from detectax_eqx.weights import load_torchvision, save_safetensors, to_torchvision


MIN_SIZE, MAX_SIZE, CANVAS = 160, 224, (160, 224)
SIZES = {"canvases": [CANVAS], "min_size": MIN_SIZE, "max_size": MAX_SIZE}
HIDDEN = 256
ANCHORS = ((16.0,), (32.0,), (64.0,), (96.0,), (128.0,))
SAMPLING = models.TwoStageSampling(pre_nms_top_n=200, post_nms_top_n=200, rpn_samples=128, box_samples=64)


@dataclass
class Options:
    """Options of the comparison."""

    side: Literal["ours", "torchvision"]
    """Which implementation to train."""
    data: Path
    """Folder with train.json, test.json and images/."""
    output: Path
    """Folder for the result."""
    steps: int = 400
    """Training steps."""
    batch_size: int = 4
    """Images per step."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW."""
    seed: int = 0
    """Seed of the initial weights and of the order of images."""


@eqx.filter_jit
def build(key, num_classes):
    """The model whose initial weights both sides start from."""
    keys = jr.split(key, 3)
    backbone = nn.BackboneWithFPN(nn.resnet18(key=keys[0], norm=nn.GroupNorm), key=keys[1])
    model = models.faster_rcnn(backbone, num_classes, key=keys[2], hidden_size=HIDDEN, anchor_sizes=ANCHORS)
    preprocessing = models.Preprocessing(models.ShortestEdge(MIN_SIZE, MAX_SIZE))
    return replace(model, preprocessing=preprocessing, sampling=SAMPLING)


def torchvision_of(model):
    """torchvision's detector with the parameters of our model."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        norm_layer=lambda channels: torch.nn.GroupNorm(32, channels),
        trainable_layers=5,
    )
    reference = FasterRCNN(
        backbone,
        min_size=MIN_SIZE,
        max_size=MAX_SIZE,
        rpn_anchor_generator=AnchorGenerator(ANCHORS, ((0.5, 1.0, 2.0),) * 5),
        box_head=TwoMLPHead(256 * 49, HIDDEN),
        box_predictor=FastRCNNPredictor(HIDDEN, model.num_classes + 1),
        rpn_pre_nms_top_n_train=SAMPLING.pre_nms_top_n,
        rpn_post_nms_top_n_train=SAMPLING.post_nms_top_n,
        rpn_batch_size_per_image=SAMPLING.rpn_samples,
        box_batch_size_per_image=SAMPLING.box_samples,
    )
    reference.load_state_dict({name: torch.from_numpy(array) for name, array in to_torchvision(model).items()})
    return reference


def train_ours(model, loader, schedule, options):
    """Trains our model and returns it."""

    def loss(model, example, *, key):
        image, size, targets = train.augment(
            example.images.pixels,
            example.images.sizes,
            example.targets,
            canvas=CANVAS,
            min_sizes=(MIN_SIZE,),
            max_size=MAX_SIZE,
            flip_probability=0.0,
            key=key,
        )
        return model.loss(image, size, targets, key=key)

    optimizer, trainable = train.adamw(schedule, weight_decay=1e-2), models.trainable(model)
    state = train.init_train_state(model, optimizer, trainable=trainable, key=jr.key(options.seed))
    step = train.make_train_step(loss, optimizer, trainable=trainable)
    for k, batch in loader.iterate(0, options.steps):
        state, metrics = step(state, batch)
        report(k, float(metrics["loss"]))
    return state.model


def train_torchvision(model, loader, schedule, options):
    """Trains torchvision's detector and returns our model with its parameters."""
    torch.manual_seed(options.seed)
    reference = torchvision_of(model).train()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1.0, weight_decay=1e-2)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: float(schedule(k)))
    for k, batch in loader.iterate(0, options.steps):
        t = batch.targets
        targets = [
            {"boxes": torch.from_numpy(b[v].copy()), "labels": torch.from_numpy(l[v] + 1).long()}
            for b, l, v in zip(t.boxes, t.labels, t.valid, strict=True)
        ]
        losses = reference(images_of(batch.images), targets)
        total = sum(losses.values())  # a tensor, though pyright sees the 0 it starts from
        optimizer.zero_grad()
        total.backward()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
        rates.step()
        report(k, float(total))
    return load_torchvision(model, {name: tensor.numpy() for name, tensor in reference.state_dict().items()})


def images_of(images):
    """A batch of images in the form that torchvision takes."""
    return [
        torch.from_numpy(image[:height, :width]).permute(2, 0, 1).float() / 255
        for image, (height, width) in zip(images.pixels, images.sizes, strict=True)
    ]


def detect_with_torchvision(reference, images):
    """torchvision's detections, padded as ours are."""
    with torch.no_grad():
        outputs = reference(images_of(images))
    n = len(outputs)
    boxes, scores = np.zeros((n, 100, 4), np.float32), np.zeros((n, 100), np.float32)
    labels, valid = np.zeros((n, 100), np.int32), np.zeros((n, 100), bool)
    for i, one in enumerate(outputs):
        rows = slice(0, len(one["scores"]))
        boxes[i, rows], scores[i, rows], labels[i, rows] = one["boxes"], one["scores"], one["labels"] - 1
        valid[i, rows] = True
    return Detections(boxes, scores, labels, valid)


def evaluate_with(detect, dataset):
    """COCO's numbers for a function from images to detections."""
    results, image_ids = [], [image.id for image in dataset.images]
    buckets = data.make_buckets(dataset.sizes, **SIZES)
    for images in data.eval_batches(dataset, batch_size=4, buckets=buckets):
        results += evaluate.to_coco_results(
            detect(images), images, image_ids=image_ids, category_ids=dataset.category_ids
        )
    return evaluate.evaluate_coco(dataset, results)


def report(k, loss):
    """Prints the loss of the first step and of every 20th."""
    if k % 20 == 19 or k == 0:
        print(f"step {k + 1}: loss {loss:.3f}", flush=True)


def main(options: Options) -> None:
    """Trains one side, and evaluates its weights with both implementations."""
    images = options.data / "images"
    train_set, test_set = (data.load_coco(options.data / f"{name}.json", images) for name in ("train", "test"))
    loader = data.Loader(
        train_set,
        batch_size=options.batch_size,
        buckets=data.make_buckets(train_set.sizes, **SIZES),
        seed=options.seed,
        max_objects=40,
        mask_size=None,
    )
    model = build(jr.key(options.seed), train_set.num_classes)
    schedule = train.warmup_cosine(options.learning_rate, total_steps=options.steps, warmup_steps=50)
    began = time.perf_counter()
    model = (train_ours if options.side == "ours" else train_torchvision)(model, loader, schedule, options)
    seconds = time.perf_counter() - began
    ours = evaluate_with(partial(models.detect_batch, model), test_set)
    theirs = evaluate_with(partial(detect_with_torchvision, torchvision_of(model).eval()), test_set)
    print(evaluate.format_metrics(ours))
    print(evaluate.format_per_class(ours))
    differences = {name: abs(ours.numbers[name] - theirs.numbers[name]) for name in ours.numbers}
    print(
        f"torchvision's detections at these weights: AP {theirs.numbers['AP']:.4f}, AP50 {theirs.numbers['AP50']:.4f}"
    )
    print(f"largest difference of the twelve numbers: {max(differences.values()):.5f}")
    options.output.mkdir(parents=True, exist_ok=True)
    save_safetensors(model, options.output / f"{options.side}.safetensors")
    summary = {"side": options.side, "steps": options.steps, "seconds": round(seconds, 1)} | ours.numbers
    (options.output / f"{options.side}.json").write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
