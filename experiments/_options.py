"""The options of train.py, and the ranges that they must be in."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from _shared import ModelName, NormName


@dataclass
class Options:
    """Options of a training run."""

    train_annotations: str
    """COCO JSON of the training images. This and the three others: a path, or a URL of http, https, gs or s3."""
    train_images: str
    """Folder that its file names refer to."""
    output: Path
    """Folder for checkpoints and metrics."""
    val_annotations: str | None = None
    """COCO JSON of the validation images; without it nothing is evaluated and the last checkpoint is the best."""
    val_images: str | None = None
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
    precision: Literal["float32", "bfloat16"] = "float32"
    """Dtype of convolutions and matrix products. Parameters, losses and box arithmetic are float32 either way."""
    gradient_checkpointing: bool = False
    """Compute the ResNet's blocks anew in the backward pass, rather than keep what is within them: less memory."""
    accumulate: int = 1
    """Parts that a device takes its images in, to save memory. The update is that of the whole batch, but slower."""
    parameter_shards: int = 1
    """Devices that share one copy of parameters and optimiser state, each keeping a piece (FSDP). 1: a copy on each."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    lr: float = 0.02
    """Learning rate for 16 images a step; it is scaled with --batch-size."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 1e-4
    """Weight decay, on all trained parameters."""
    decay_vectors: bool = True
    """Weight decay on norms and biases too, as torchvision."""
    backbone_lr: float = 1.0
    """Learning rate of the ResNet, relative to that of pyramid and heads."""
    clip_norm: float | None = None
    """Scale gradients down to this norm, taken over all parameters. Default off."""
    ema: float | None = None
    """Keep an average of the model, of this decay a step (.999, say), and evaluate and export it. Default off."""
    non_finite: Literal["stop", "skip"] = "stop"
    """On a loss or gradient that is not finite, stop, or leave out the step and count it in the metrics."""
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
    cache: Path | None = None
    """Folder to keep decoded training images in, which are then read about twice as fast. Default off."""
    max_bad_images: int = 10
    """Images that may turn out unreadable amid training: they are left out, told and counted. One more stops it."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is also written after each epoch."""
    resume: bool = False
    """Go on from the last checkpoint in --output."""
    coordinator: str | None = None
    """host:port of process 0, to train with several processes; `auto` if the launcher tells (Slurm, MPI, a TPU pod)."""
    num_processes: int | None = None
    """Number of processes, with --coordinator."""
    process_id: int | None = None
    """This process's number, from 0, with --coordinator."""


RANGES = {
    "positive": "epochs steps batch_size accumulate parameter_shards lr backbone_lr clip_norm min_sizes max_size "
    "jitter max_objects threads log_every checkpoint_every",
    "at least 0": "weight_decay decay_epochs warmup_steps seed max_bad_images trainable_layers",
    "in 0..1": "momentum flip ema",
    "a positive multiple of 32": "canvases",
}
