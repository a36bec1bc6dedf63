"""Trains a detector on a dataset in COCO format.

    python experiments/train.py --train-annotations train.json --train-images train/ \
        --val-annotations val.json --val-images val/ --output runs/mine --model faster_rcnn_resnet50_fpn \
        --init resnet50-0676ba61.pth

Defaults are the field's "1x" recipe: SGD .02 for 16 images a step, 12 epochs, decay at 8 and 11. A folder of `--output`
holds `last/` and `best/` checkpoints, `metrics.jsonl` and the options. Ctrl-C saves; `--resume` goes on from the last
checkpoint to bit-identical parameters.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import tyro
from _shared import ModelName, NormName, build, describe, evaluate_on, progress_bar

from detectax_eqx import data, models, train, weights


@dataclass
class Options:
    """Options of a training run."""

    train_annotations: Path
    """COCO JSON of the training images."""
    train_images: Path
    """Folder that its file names refer to."""
    output: Path
    """Folder for checkpoints and metrics."""
    val_annotations: Path | None = None
    """COCO JSON of the validation images; without it nothing is evaluated and the last checkpoint is the best."""
    val_images: Path | None = None
    """Folder of the validation images."""
    model: ModelName = "mask_rcnn_resnet50_fpn"
    """Which detector."""
    norm: NormName = "frozen_batch"
    """Norm of the backbone: frozen_batch for imported weights, group for training from scratch."""
    init: Path | None = None
    """Weights to start from: a torchvision .pth of this detector or of an ImageNet ResNet, or .safetensors."""
    trainable_layers: int | None = None
    """Parts of the backbone that are trained, from the top: 0..5. Default 3 with --init, else 5."""
    epochs: int = 12
    """Passes over the training images."""
    steps: int | None = None
    """Stop after this many steps instead."""
    batch_size: int = 16
    """Images a step, over all devices."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    lr: float = 0.02
    """Learning rate for 16 images a step; it is scaled with --batch-size."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 1e-4
    """Weight decay, on all trained parameters."""
    schedule: Literal["multistep", "cosine"] = "multistep"
    """Learning rate after warmup: a tenth after each of --decay-epochs, or a cosine to 0."""
    decay_epochs: tuple[int, ...] = (8, 11)
    """Epochs after which the multistep schedule decays."""
    warmup_steps: int = 500
    """Steps of linear warmup from a thousandth of the rate."""
    min_sizes: tuple[int, ...] = (800,)
    """Short sides in pixels that images are resized to; one is drawn for each image."""
    max_size: int = 1333
    """Longest side in pixels after resizing."""
    canvases: tuple[tuple[int, int], ...] = ((800, 1344), (1344, 800), (1088, 1088))
    """Height and width of the canvases that images are laid on, multiples of 32; one program is compiled for each."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: tuple[float, float] | None = None
    """Large-scale jitter: range of the scale relative to the canvas, 0.1 2.0 for instance. Default off."""
    max_objects: int = 100
    """Objects an image may have; more are dropped, counted and reported."""
    seed: int = 0
    """Seed of the initial weights, of the order of images and of augmentation."""
    threads: int = 2
    """Threads that decode images."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is also written after each epoch."""
    resume: bool = False
    """Go on from the last checkpoint in --output."""


def main(options: Options) -> None:
    """Trains until the end or Ctrl-C."""
    if train.latest_checkpoint(options.output / "last") and not options.resume:
        raise SystemExit(f"{options.output} holds a run already: pass --resume to go on with it, or another --output.")
    train_set = data.load_coco(options.train_annotations, options.train_images)
    print(train_set.report)
    val_set = None
    if options.val_annotations is not None:
        val_set = data.load_coco(options.val_annotations, options.val_images or options.train_images)
        print(val_set.report)
    with_masks = options.model.startswith("mask")

    buckets = data.make_buckets(
        [(image.height, image.width) for image in train_set.images],
        canvases=options.canvases,
        min_size=max(options.min_sizes),
        max_size=options.max_size,
        max_source=2048,
    )
    loader = data.Loader(
        train_set,
        batch_size=options.batch_size,
        buckets=buckets,
        seed=options.seed,
        max_objects=options.max_objects,
        mask_size=112 if with_masks else None,
        num_threads=options.threads,
    )
    steps_per_epoch = loader.steps_per_epoch
    total_steps = options.steps or options.epochs * steps_per_epoch

    model = build(options.model, len(train_set.categories), options.norm, options.seed)
    if options.init is not None:
        model = initialize(model, options.init)
    layers = options.trainable_layers
    trainable = models.trainable(model, trainable_layers=layers if layers is not None else 3 if options.init else 5)
    optimizer = make_optimizer(options, steps_per_epoch, total_steps)
    state = train.init_train_state(model, optimizer, trainable=trainable, key=jr.key(options.seed))
    metadata = {
        "model": options.model,
        "norm": options.norm,
        "categories": [{"id": category.id, "name": category.name} for category in train_set.categories],
        "min_size": max(options.min_sizes),
        "max_size": options.max_size,
        "canvases": options.canvases,
    }
    best = -1.0
    if options.resume and (path := train.latest_checkpoint(options.output / "last")):
        state, saved = train.load_checkpoint(path, state)
        if saved["categories"] != metadata["categories"]:
            raise SystemExit(f"{path} was trained on other categories than those of {options.train_annotations}.")
        best = saved["best"]
        print(f"Resuming at step {int(state.step)} from {path}")
    mesh = train.make_mesh()
    state = train.replicate(state, mesh)

    detector_loss = models.mask_rcnn_loss if with_masks else models.faster_rcnn_loss

    def loss(model, example, *, key):
        augment_key, loss_key = jr.split(key)
        image, size, targets = train.augment(
            example.images,
            example.image_sizes,
            example.targets,
            canvas=example.canvas,
            min_sizes=options.min_sizes,
            max_size=options.max_size,
            flip_probability=options.flip,
            scale_range=options.jitter,
            key=augment_key,
        )
        return detector_loss(model, image, size, targets, key=loss_key)

    step = train.make_train_step(loss, optimizer, trainable=trainable)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "options.json").write_text(json.dumps(asdict(options), default=str, indent=2))
    log = MetricsLog(options.output / "metrics.jsonl", until=int(state.step))

    def save(state, best):
        train.save_checkpoint(
            options.output / "last", state, step=int(state.step), metadata=metadata | {"best": best}, keep=2
        )

    start = int(state.step)
    clock, images = time.perf_counter(), 0
    batches = loader.iterate(start, total_steps)
    try:
        with progress_bar() as bar:
            task = bar.add_task("training", total=total_steps, completed=start, status="compiling")
            for k, batch in batches:
                state, metrics = step(state, train.shard_batch(batch, mesh))
                done, images = k + 1, images + options.batch_size
                if done % options.log_every == 0 or done == total_steps:
                    values = {name: float(value) for name, value in metrics.items()}
                    rate = images / (time.perf_counter() - clock)
                    log.write({"step": done, "epoch": done / steps_per_epoch, "images_per_second": rate} | values)
                    status = f"loss {values['loss']:.3f}, {rate:.1f} images/s"
                    if values["overflow"]:
                        status += f", {values['overflow']:.0f} objects over --max-objects"
                    bar.update(task, completed=done, status=status)
                    clock, images = time.perf_counter(), 0
                if done % steps_per_epoch == 0 or done == total_steps:
                    if val_set is not None:
                        bar.update(task, completed=done, status="evaluating")
                        numbers = evaluate_on(val_set, state.model, metadata, folder=options.output / "evaluation")
                        log.write({"step": done, "epoch": done / steps_per_epoch} | numbers)
                        bar.console.print(f"epoch {done / steps_per_epoch:.2f}: {describe(numbers)}")
                    score = next(iter(numbers.values())) if val_set is not None else done
                    if score > best:
                        best = score
                        train.save_checkpoint(
                            options.output / "best", state, step=done, metadata=metadata | {"best": best}, keep=1
                        )
                    save(state, best)
                    clock, images = time.perf_counter(), 0
                elif done % options.checkpoint_every == 0:
                    save(state, best)
    except KeyboardInterrupt:
        save(state, best)
        print(f"Stopped and saved at step {int(state.step)}; --resume goes on from there.", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        batches.close()


def make_optimizer(options: Options, steps_per_epoch: int, total_steps: int):
    """The optimiser with its schedule."""
    rate = train.scale_learning_rate(options.lr, batch_size=options.batch_size)
    if options.schedule == "multistep":
        milestones = [epoch * steps_per_epoch for epoch in options.decay_epochs]
        schedule = train.warmup_multistep(rate, milestones=milestones, warmup_steps=options.warmup_steps)
    else:
        schedule = train.warmup_cosine(rate, total_steps=total_steps, warmup_steps=options.warmup_steps)
    if options.optimizer == "adamw":
        return train.adamw(schedule, weight_decay=options.weight_decay)
    return train.sgd(schedule, momentum=options.momentum, weight_decay=options.weight_decay)


if __name__ == "__main__":
    main(tyro.cli(Options))
