"""Trains a detector on a dataset in COCO format.

    python experiments/train.py --model faster_rcnn_resnet50_fpn --init resnet50-0676ba61.pth
        --train-annotations train.json --train-images train/ --val-annotations val.json --val-images val/
        --output runs/mine

Defaults are the field's "1x" recipe: SGD .02 for 16 images a step, 12 epochs, decay at 8 and 11. A folder of `--output`
holds `last/` and `best/` checkpoints, `metrics.jsonl` and the options. Ctrl-C saves; `--resume` goes on from the last
checkpoint to bit-identical parameters.
"""

import json
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any, Literal, TextIO

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from _shared import Detector, ModelName, NormName, build, console, evaluate_on, initialize, progress, run

from detectax_eqx import Batch, data, models, train


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
    """Weights to start from: a torchvision .pth of this detector, of whatever classes, or of an ImageNet ResNet, or
    .safetensors of this detector."""
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
    last, best = options.output / "last", options.output / "best"
    if train.latest_checkpoint(last) and not options.resume:
        raise SystemExit(f"{options.output} holds a run already: pass --resume to go on with it, or another --output.")
    train_set = load(options.train_annotations, options.train_images)
    val_set = None
    if options.val_annotations is not None:
        val_set = load(options.val_annotations, options.val_images or options.train_images)
        if val_set.category_ids != train_set.category_ids:
            raise SystemExit(
                f"{options.val_annotations} has categories {val_set.category_ids}, "
                f"{options.train_annotations} {train_set.category_ids}: they must be the same."
            )
    with_masks = options.model.startswith("mask")

    # Data. Batch k is a pure function of (seed, k).
    loader = data.Loader(
        train_set,
        batch_size=options.batch_size,
        buckets=data.make_buckets(
            train_set.sizes,
            canvases=options.canvases,
            min_size=max(options.min_sizes),
            max_size=options.max_size,
            max_source=2048,
        ),
        seed=options.seed,
        max_objects=options.max_objects,
        mask_size=112 if with_masks else None,
        num_threads=options.threads,
    )
    epoch_steps = loader.steps_per_epoch
    total_steps = options.steps or options.epochs * epoch_steps

    # Model and optimiser.
    model = build(options.model, train_set.num_classes, options.norm, options.seed)
    if options.init is not None:
        model = initialize(model, options.model, options.norm, options.init)
    layers = options.trainable_layers
    trainable = models.trainable(model, trainable_layers=layers if layers is not None else 3 if options.init else 5)
    schedule = make_schedule(options, epoch_steps, total_steps)
    if options.optimizer == "sgd":
        optimizer = train.sgd(schedule, momentum=options.momentum, weight_decay=options.weight_decay)
    else:
        optimizer = train.adamw(schedule, weight_decay=options.weight_decay)
    state = train.init_train_state(model, optimizer, trainable=trainable, key=jr.key(options.seed))

    # What a checkpoint tells besides the state.
    metadata: dict[str, Any] = {
        "model": options.model,
        "norm": options.norm,
        "categories": [asdict(category) for category in train_set.categories],
        "min_size": max(options.min_sizes),
        "max_size": options.max_size,
        "canvases": options.canvases,
        "best": -1.0,
    }
    if options.resume and (path := train.latest_checkpoint(last)):
        state, saved = train.load_checkpoint(path, state)
        if saved["categories"] != metadata["categories"]:
            raise SystemExit(f"{path} knows other categories than {options.train_annotations}.")
        metadata["best"] = saved["best"]
        console.print(f"Going on at step {int(state.step)} from {path}", highlight=False)
    mesh = train.make_mesh()
    state = train.replicate(state, mesh)

    # The loss of one example: augmentation and detector, both inside the compiled step.
    detector_loss = models.mask_rcnn_loss if with_masks else models.faster_rcnn_loss

    def loss(model, example: Batch, *, key):
        augment_key, loss_key = jr.split(key)
        image, image_size, targets = train.augment(
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
        return detector_loss(model, image, image_size, targets, key=loss_key)

    step = train.make_train_step(loss, optimizer, trainable=trainable)
    stop = stop_on_signals()

    def save(folder: Path, keep: int) -> None:
        train.save_checkpoint(folder, state, step=int(state.step), metadata=metadata, keep=keep)

    def evaluate(val_set: data.CocoDataset) -> dict[str, float]:
        detector = Detector(
            state.model, train_set.categories, max(options.min_sizes), options.max_size, options.canvases
        )
        metrics = evaluate_on(detector, val_set, options.output / "evaluation", num_threads=options.threads)
        return {f"{kind}_{name}": value for kind, m in metrics.items() for name, value in m.numbers.items()}

    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "options.json").write_text(json.dumps(asdict(options), default=str, indent=1))
    start = int(state.step)
    log = open_log(options.output / "metrics.jsonl", until=start)
    batches = loader.iterate(start, total_steps)
    clock, images, left_out = time.perf_counter(), 0, 0
    try:
        with log, progress() as bar:
            task = bar.add_task("training", total=total_steps, completed=start, status="compiling")
            for k, batch in batches:
                state, metrics = step(state, train.shard_batch(batch, mesh))
                done, images = k + 1, images + options.batch_size
                left_out += int(np.sum(batch.overflow))
                epoch_ends = done % epoch_steps == 0 or done == total_steps
                if done % options.log_every == 0 or done == start + 1 or epoch_ends:
                    values = {name: round(float(value), 6) for name, value in metrics.items()}
                    rate = images / (time.perf_counter() - clock)
                    write(
                        log,
                        step=done,
                        epoch=done / epoch_steps,
                        rate=float(jnp.asarray(schedule(k))),
                        images_s=rate,
                        left_out=left_out,
                        **values,
                    )
                    terms = [f"{n.removeprefix('loss_')} {v:.2f}" for n, v in values.items() if n.startswith("loss_")]
                    status = f"loss {values['loss']:.3f} ({', '.join(terms)}), {rate:.1f} images/s"
                    if left_out:
                        status += f", {left_out} objects beyond --max-objects left out so far"
                    bar.update(task, completed=done, status=status)
                    clock, images = time.perf_counter(), 0
                if epoch_ends:
                    score = float(done)
                    if val_set is not None:
                        bar.stop()
                        numbers = evaluate(val_set)
                        bar.start()
                        score = numbers["segm_AP" if "segm_AP" in numbers else "bbox_AP"]
                        write(log, step=done, epoch=done / epoch_steps, **numbers)
                        text = ", ".join(
                            f"{name} {numbers[name]:.3f}" for name in numbers if name.endswith(("AP", "AP50"))
                        )
                        console.print(f"epoch {done / epoch_steps:.1f}: {text}", highlight=False)
                    if score > metadata["best"]:
                        metadata["best"] = score
                        save(best, keep=1)
                if epoch_ends or done % options.checkpoint_every == 0:
                    save(last, keep=2)
                    clock, images = time.perf_counter(), 0
                if stop.is_set() and done < total_steps:
                    save(last, keep=2)
                    console.print(f"Stopped and saved at step {done}; --resume goes on from there.")
                    raise SystemExit(130)
    finally:
        batches.close()


def stop_on_signals() -> Event:
    """An event that Ctrl-C or SIGTERM sets, to be looked at between steps; a second signal stops at once.

    A step consumes the state that it is given: an exception in its midst would leave nothing to save.
    """
    event = Event()

    def handle(number: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        console.print("Stopping after this step (once more to stop at once) …")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return event


def load(annotations: Path, images: Path) -> data.CocoDataset:
    """A dataset, with a word on what was repaired."""
    dataset = data.load_coco(annotations, images)
    console.print(f"{annotations}: {len(dataset)} images, {dataset.report}", highlight=False)
    return dataset


def make_schedule(options: Options, epoch_steps: int, total_steps: int) -> optax.Schedule:
    """The learning rate at each step."""
    rate = train.scale_learning_rate(options.lr, batch_size=options.batch_size)
    if options.schedule == "cosine":
        return train.warmup_cosine(rate, total_steps=total_steps, warmup_steps=options.warmup_steps)
    milestones = [epoch * epoch_steps for epoch in options.decay_epochs]
    return train.warmup_multistep(rate, milestones=milestones, warmup_steps=options.warmup_steps)


def open_log(path: Path, *, until: int) -> TextIO:
    """The metrics file, opened to append, without the lines that came after step `until`."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= until]
    path.write_text("".join(kept))
    return path.open("a")


def write(log: TextIO, **values: float) -> None:
    """Adds a line of metrics."""
    log.write(json.dumps(values) + "\n")
    log.flush()


if __name__ == "__main__":
    run(main, Options, __doc__)
