"""Trains this project's Faster R-CNN or torchvision's from the same weights, on the same batches, and evaluates it.

    python tests/parity/compare_training.py --side ours --data DIR --output runs/compare
    python tests/parity/compare_training.py --side torchvision --data DIR --output runs/compare

`DIR` holds `train.json`, `test.json` and `images/` (the blood-cell set BCCD in COCO format, for instance).
ResNet-18-FPN with GroupNorm from scratch, small images, AdamW with a cosine, no augmentation. Both sides see batch k of
the same loader; what differs is the random sampling of anchors and proposals. Run in the environment of `make parity`.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import equinox as eqx
import jax.random as jr
import numpy as np
import tyro

from detectax_eqx import Detections, data, evaluate, models, nn, train
from detectax_eqx.weights import to_torchvision


MIN_SIZE, MAX_SIZE, CANVAS = 160, 224, (160, 224)
HIDDEN = 256
ANCHORS = ((16.0,), (32.0,), (64.0,), (96.0,), (128.0,))
SAMPLING = models.Sampling(pre_nms_top_n=200, post_nms_top_n=200, rpn_samples=128, box_samples=64)


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
    """Images a step."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW."""
    seed: int = 0
    """Seed of the initial weights and of the order of images."""


@eqx.filter_jit
def build(key, num_classes):
    """The model whose initial weights both sides take."""
    keys = jr.split(key, 3)
    backbone = nn.ResNetFPN(nn.resnet18(key=keys[0], norm=nn.GroupNorm), key=keys[1])
    return models.FasterRCNN(backbone, num_classes, key=keys[2], hidden_size=HIDDEN, anchor_sizes=ANCHORS)


def train_ours(model, loader, schedule, options):
    """Returns a function from a batch to detections."""

    def loss(model, example, *, key):
        image, size, targets = train.augment(
            example.images,
            example.image_sizes,
            example.targets,
            canvas=CANVAS,
            min_sizes=(MIN_SIZE,),
            max_size=MAX_SIZE,
            flip_probability=0.0,
            key=key,
        )
        return models.faster_rcnn_loss(model, image, size, targets, key=key, sampling=SAMPLING)

    optimizer, trainable = train.adamw(schedule, weight_decay=1e-2), models.trainable(model)
    state = train.init_train_state(model, optimizer, trainable=trainable, key=jr.key(options.seed))
    step = train.make_train_step(loss, optimizer, trainable=trainable)
    for k, batch in loader.iterate(0, options.steps):
        state, metrics = step(state, batch)
        report(k, float(metrics["loss"]))
    return lambda batch: models.detect_batch(state.model, batch, min_size=MIN_SIZE, max_size=MAX_SIZE)


def train_torchvision(model, loader, schedule, options):
    """Returns a function from a batch to detections."""
    import torch
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

    torch.manual_seed(options.seed)
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
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1.0, weight_decay=1e-2)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: float(schedule(k)))
    reference.train()

    def images_of(batch):
        sizes = np.asarray(batch.image_sizes)
        return [
            torch.from_numpy(np.asarray(image[:h, :w])).permute(2, 0, 1).float() / 255
            for image, (h, w) in zip(batch.images, sizes, strict=True)
        ]

    for k, batch in loader.iterate(0, options.steps):
        t = batch.targets
        targets = [
            {"boxes": torch.from_numpy(b[v].copy()), "labels": torch.from_numpy(l[v] + 1).long()}
            for b, l, v in zip(t.boxes, t.labels, t.valid, strict=True)
        ]
        total = sum(reference(images_of(batch), targets).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        rates.step()
        report(k, float(total))
    reference.eval()

    def detect(batch):
        with torch.no_grad():
            found = reference(images_of(batch))
        boxes, scores = np.zeros((len(found), 100, 4), np.float32), np.zeros((len(found), 100), np.float32)
        labels, valid = np.zeros((len(found), 100), np.int32), np.zeros((len(found), 100), bool)
        for i, one in enumerate(found):
            n = len(one["scores"])
            boxes[i, :n], scores[i, :n], labels[i, :n] = one["boxes"], one["scores"], one["labels"] - 1
            valid[i, :n] = True
        return Detections(boxes, scores, labels, valid)

    return detect


def report(k, loss):
    """A line now and then."""
    if k % 20 == 19 or k == 0:
        print(f"step {k + 1}: loss {loss:.3f}", flush=True)


def main(options: Options) -> None:
    """Trains one side and writes its numbers."""
    images = options.data / "images"
    train_set, test_set = (data.load_coco(options.data / f"{name}.json", images) for name in ("train", "test"))
    sizes = {"canvases": [CANVAS], "min_size": MIN_SIZE, "max_size": MAX_SIZE}
    loader = data.Loader(
        train_set,
        batch_size=options.batch_size,
        buckets=data.make_buckets(train_set.sizes, **sizes),
        seed=options.seed,
        max_objects=40,
        mask_size=None,
    )
    model = build(jr.key(options.seed), train_set.num_classes)
    schedule = train.warmup_cosine(options.learning_rate, total_steps=options.steps, warmup_steps=50)
    began = time.perf_counter()
    run = train_ours if options.side == "ours" else train_torchvision
    detect = run(model, loader, schedule, options)
    seconds = time.perf_counter() - began
    results = []
    image_ids = [image.id for image in test_set.images]
    for batch in data.eval_batches(test_set, batch_size=4, buckets=data.make_buckets(test_set.sizes, **sizes)):
        results += evaluate.to_coco_results(
            detect(batch), batch, image_ids=image_ids, category_ids=test_set.category_ids
        )
    metrics = evaluate.evaluate_coco(test_set.annotations_path, results)
    print(evaluate.format_metrics(metrics))
    print(evaluate.format_per_class(metrics))
    options.output.mkdir(parents=True, exist_ok=True)
    summary = {"side": options.side, "steps": options.steps, "seconds": round(seconds, 1)} | metrics.numbers
    (options.output / f"{options.side}.json").write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
