"""The options of train.py, and the ranges that they must be in."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from _shared import ModelName, NormName

from detectax_eqx import data


@dataclass
class Options:
    """Options of a training run."""

    train_annotations: str
    """COCO JSON of the training images: a path, or a URL of http, https, gs or s3."""
    train_images: str
    """Folder that the file names in it refer to, or such a URL."""
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
    """Detector to train: Faster R-CNN finds boxes, Mask R-CNN boxes and masks."""
    norm: NormName = "frozen_batch"
    """Backbone's norm: frozen_batch for imported weights (torchvision's COCO ones: frozen_batch_eps0), else group."""
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
    """Save memory by computing what is within the ResNet's blocks anew in the backward pass, which takes time."""
    accumulate: int = 1
    """Parts that a device takes its images of a step in: less memory, more time, the same update as at once."""
    parameter_shards: int = 1
    """Number of devices that share one copy of parameters and optimiser state (FSDP). 1: a copy on each."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    lr: float = 0.02
    """Learning rate for 16 images a step; for another --batch-size it is scaled in proportion."""
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
    decay_epochs: tuple[int, ...] = (8, 11)
    """Epochs after which the multistep schedule decays."""
    warmup_steps: int = 500
    """Steps in which the learning rate grows linearly, from a thousandth of itself."""
    min_sizes: tuple[int, ...] = (800,)
    """Short sides in pixels that images are resized to; one is drawn for each image each time."""
    max_size: int = 1333
    """Longest side in pixels after resizing; the short side becomes smaller where this would be exceeded."""
    canvases: tuple[tuple[int, int], ...] = ((800, 1344), (1344, 800), (1088, 1088))
    """Heights and widths in pixels of what images are padded to, multiples of 32. Each may compile a program."""
    flip: float = 0.5
    """Probability of a horizontal flip (0..1)."""
    jitter: tuple[float, float] | None = None
    """Large-scale jitter: least and greatest scale relative to the canvas, 0.1 2.0 for instance. Default: none."""
    max_objects: int = 100
    """Objects of an image that are trained on; more are left out, counted and told."""
    seed: int = 0
    """Seed of the initial weights, of the order of images and of augmentation."""
    threads: int = 2
    """Threads that decode images, in each process."""
    cache: Path | None = None
    """Folder to keep decoded training images in, then read about twice as fast. Default: decode each time."""
    max_bad_images: int = 10
    """Images that may turn out unreadable amid training: they are left out, told and counted. One more ends it."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is also written after each epoch."""
    resume: bool = False
    """Go on from the last checkpoint in --output. Give the other options as before."""
    coordinator: str | None = None
    """host:port of process 0, or `auto` if the launcher tells (Slurm, MPI, a TPU pod). Default: one process."""
    num_processes: int | None = None
    """Number of processes, with --coordinator HOST:PORT."""
    process_id: int | None = None
    """This process's number, from 0, with --coordinator HOST:PORT."""


RANGES = {
    "positive": "epochs steps batch_size accumulate parameter_shards lr backbone_lr clip_norm min_sizes max_size "
    "jitter max_objects threads log_every checkpoint_every",
    "at least 0": "weight_decay decay_epochs warmup_steps seed max_bad_images trainable_layers",
    "in 0..1": "momentum flip ema",
    "a positive multiple of 32": "canvases",
}
