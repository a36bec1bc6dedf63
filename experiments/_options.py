"""The options of train.py, the ranges that they must be in, and defaults that depend on the run."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from _shared import ModelName

from detectax_eqx import data, models, zoo


@dataclass(kw_only=True)
class Options:
    """Options of a training run."""

    train_annotations: str | None = None
    """COCO JSON of the training images: a path, or a URL of http, https, gs or s3. Required without --resume."""
    train_images: str | None = None
    """Folder that the file names in it refer to, or such a URL. Required without --resume."""
    output: Path
    """Folder for checkpoints and metrics. One that holds a run already needs --resume."""
    val_annotations: str | None = None
    """COCO JSON to evaluate after each epoch, a path or URL. Without it the last checkpoint counts as the best."""
    val_images: str | None = None
    """Folder of the validation images, or a URL. Default: that of --train-images."""
    box_format: data.BoxFormat = "xywh"
    """How "bbox" is written in the annotations: xywh is COCO's; normalized means fractions of the image's sides."""
    allow_renamed: bool = False
    """Accept other names for the same category ids in validation, or with --resume, where the new names then count."""
    model: ModelName = "mask_rcnn_resnet50_fpn"
    """Detector to train. One that learns masks needs a segmentation for every object."""
    norm: zoo.NormName | None = None
    """Backbone's norm: frozen_batch for imported weights (torchvision's COCO ones: frozen_batch_eps0), group otherwise.
    Default: frozen_batch with --init, else group."""
    init: Path | None = None
    """Start from this .pth or .safetensors of the detector, of any classes, or .pth of an ImageNet ResNet."""
    trainable_layers: int | None = None
    """Parts of the backbone that are trained, 0..5, the stem as the last. Default: 3 with --init, else 5."""
    epochs: int = 12
    """Passes over the training images, unless --steps is given."""
    steps: int | None = None
    """Steps to train for, instead of --epochs."""
    batch_size: int = 16
    """Images a step, over all devices: a multiple of their number times --accumulate."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Dtype of convolutions and matrix products. Parameters, losses and box arithmetic are float32 either way."""
    gradient_checkpointing: bool = False
    """Save memory by recomputing the ResNet's blocks in the backward pass, which takes time."""
    accumulate: int = 1
    """Parts that a device takes its images of a step in: less memory, more time, the same update as at once."""
    parameter_shards: int = 1
    """Number of devices that share one copy of parameters and optimiser state (FSDP). 1: a copy on each."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    lr: float | None = None
    """Learning rate for 16 images per step; for another --batch-size it is scaled in proportion.
    Default: .02 for sgd, .0001 for adamw."""
    momentum: float = 0.9
    """Momentum of SGD (0..1); --optimizer adamw does not use it."""
    weight_decay: float = 1e-4
    """Weight decay of trained parameters; see --decay-vectors."""
    decay_vectors: bool = True
    """Whether norms and biases decay too, as in torchvision."""
    backbone_lr: float = 1.0
    """Learning rate of the ResNet, as a multiple of that of pyramid and heads."""
    clip_norm: float | None = None
    """Scale gradients down to this norm, taken over all parameters. Default: as they are."""
    ema: float | None = None
    """Keep an average of the model, with this decay a step (.999, say), to evaluate and export. Default: none."""
    non_finite: Literal["stop", "skip"] = "stop"
    """On a loss or gradient that is not finite, stop, or leave out the step and count it in the metrics."""
    schedule: Literal["multistep", "cosine"] = "multistep"
    """Learning rate after warmup: a tenth after each of --decay-epochs (multistep), or a cosine to 0."""
    decay_epochs: tuple[float, ...] | None = None
    """Epochs after which the multistep schedule decays. Default: 8 and 11 of 12, in proportion for other runs."""
    warmup_steps: int | None = None
    """Steps in which the learning rate grows linearly, from a thousandth of itself.
    Default: a tenth of the run, at most 500."""
    min_sizes: tuple[int, ...] = (800,)
    """Short sides in pixels that images are resized to; one is drawn for each image each time."""
    max_size: int = 1333
    """Longest side in pixels after resizing; the short side becomes smaller where this would be exceeded."""
    canvases: tuple[tuple[int, int], ...] = ((800, 1344), (1344, 800), (1088, 1088))
    """Heights and widths in pixels of what images are padded to, multiples of 32. Each may compile a program."""
    anchor_sizes: tuple[float, ...] | None = None
    """Side in pixels of the square anchor on each level, after resizing; see inspect_dataset.py.
    Default: the detector's own."""
    aspect_ratios: tuple[float, ...] | None = None
    """Height / width of the anchors. Default: the detector's own."""
    flip: float = 0.5
    """Probability of a horizontal flip (0..1)."""
    jitter: tuple[float, float] | None = None
    """Large-scale jitter: least and greatest scale relative to the canvas, 0.1 2.0 for instance. Default: none."""
    max_objects: int = 100
    """Objects of an image that are trained on; more are left out, counted and reported."""
    seed: int = 0
    """Seed of the initial weights, of the order of images and of augmentation."""
    threads: int = 2
    """Threads that decode images, in each process."""
    cache: Path | None = None
    """Folder to keep decoded training images in, then read about twice as fast. Default: decode each time."""
    max_bad_images: int = 10
    """Images that may turn out unreadable during training: left out, reported and counted. One more ends the run."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl, and of the log where there is no terminal."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is also written after each epoch."""
    resume: bool = False
    """Go on from the last checkpoint in --output. Options that are not given are those of before."""
    coordinator: str | None = None
    """host:port of process 0, or `auto` if the launcher tells (Slurm, MPI, a TPU pod). Default: one process."""
    num_processes: int | None = None
    """Number of processes, with --coordinator HOST:PORT."""
    process_id: int | None = None
    """This process's number, from 0, with --coordinator HOST:PORT."""


RANGES = {
    "positive": "epochs steps batch_size accumulate parameter_shards lr backbone_lr clip_norm canvases min_sizes "
    "max_size jitter max_objects anchor_sizes aspect_ratios threads log_every checkpoint_every",
    "at least 0": "weight_decay decay_epochs warmup_steps seed max_bad_images trainable_layers",
    "in 0..1": "momentum flip ema",
}

# The field's "1x" recipe: 12 epochs, decays after 8 and 11, a warm-up of 500 of some 90,000 steps.
RECIPE_EPOCHS, RECIPE_DECAYS = 12, (8, 11)
WARMUP_STEPS, WARMUP_SHARE = 500, 0.1
LEARNING_RATES = {"sgd": 0.02, "adamw": 1e-4}


def architecture(options: "Options") -> zoo.Architecture:
    """What the model is built from."""
    return zoo.Architecture(options.model, options.norm or "group", options.anchor_sizes, options.aspect_ratios)


def total_steps(options: Options, epoch_steps: int) -> int:
    """Steps of the whole run."""
    return options.steps or options.epochs * epoch_steps


def complete(options: Options, epoch_steps: int) -> Options:
    """The options with a value for each that was left to depend on the others."""
    steps = total_steps(options, epoch_steps)
    epochs = options.epochs if options.steps is None else steps / epoch_steps
    defaults = {
        "norm": "frozen_batch" if options.init else "group",
        "trainable_layers": 3 if options.init else 5,
        "lr": LEARNING_RATES[options.optimizer],
        "warmup_steps": min(WARMUP_STEPS, int(WARMUP_SHARE * steps)),
        "decay_epochs": tuple(round(decay * epochs / RECIPE_EPOCHS, 3) for decay in RECIPE_DECAYS),
    }
    return replace(options, **{name: value for name, value in defaults.items() if getattr(options, name) is None})


def check_sense(options: Options) -> None:
    """Refuses options that contradict each other, before anything is read."""
    if options.train_annotations is None or options.train_images is None:
        raise SystemExit(
            "--train-annotations and --train-images are required"
            + (f": {options.output} has no options.json to take them from." if options.resume else ".")
        )
    if options.jitter is not None and options.jitter[0] > options.jitter[1]:
        raise SystemExit(f"--jitter is {options.jitter}: the first must not be larger than the second.")


def check_model(options: Options, model: models.AbstractDetector) -> None:
    """Refuses options that the detector has no place for. Its shapes are enough."""
    levels, divisor = len(model.backbone.strides), model.backbone.divisor
    if options.anchor_sizes is not None and len(options.anchor_sizes) != levels:
        raise SystemExit(f"--anchor-sizes is {options.anchor_sizes}: it must be {levels} numbers, one per level.")
    if any(side % divisor for canvas in options.canvases for side in canvas):
        raise SystemExit(f"--canvases is {options.canvases}: its sides must be multiples of {divisor}.")


def check_promise(options: Options, epoch_steps: int) -> None:
    """Refuses options with which a new run cannot learn."""
    steps = total_steps(options, epoch_steps)
    if options.warmup_steps is not None and options.warmup_steps >= steps:
        raise SystemExit(
            f"--warmup-steps is {options.warmup_steps}, but the run has {steps} steps and would end before its "
            "learning rate is reached. Leave the option out, or train for longer (--epochs, --steps)."
        )
    if options.init is None and options.norm in ("frozen_batch", "frozen_batch_eps0"):
        raise SystemExit(
            f"--norm is {options.norm}, which takes its statistics from imported weights: without --init there are "
            "none. Give --init, or leave the option out to train from scratch with group."
        )
