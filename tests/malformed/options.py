"""Options of the scripts out of range, contradictory, or naming files that are not what they should be."""

import importlib
import json
import sys
from functools import cache
from pathlib import Path

import tyro

from detectax_eqx import data, train, weights

from . import Case


EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SMALL = "--model faster_rcnn_resnet18_fpn --norm group --batch-size 2 --steps 1 --canvases 64 64 --min-sizes 64"


def script(name):
    """A module of experiments/."""
    if str(EXPERIMENTS) not in sys.path:
        sys.path.insert(0, str(EXPERIMENTS))
    return importlib.import_module(name)


@cache
def wrong_checkpoint(kind):
    """A checkpoint that train.py did not write, in a folder of its own, made once."""
    folder = Path(tempfile.mkdtemp())
    metadata = {
        "nothing": {},
        "no categories": {"model": "faster_rcnn_resnet18_fpn"},
        "unknown model": {
            "model": "yolo", "norm": "group", "categories": [{"id": 1, "name": "a"}], "canvases": [[64, 64]],
            "min_size": 64, "max_size": 64,
        },
        "unknown norm": {
            "model": "faster_rcnn_resnet18_fpn", "norm": "batch", "categories": [{"id": 1, "name": "a"}],
            "canvases": [[64, 64]], "min_size": 64, "max_size": 64,
        },
    }  # fmt: skip
    train.save_checkpoint(folder / "last", {"w": [0]}, step=1, metadata=metadata[kind])
    return folder


def cases():
    return []
