"""Runs experiments/train.py with a detector so small that a step takes milliseconds; test_kill.py runs it.

    python tests/tiny_train.py [train.py's options] [--die-after | --stop-after | --interrupt-after PLACE:N]

Only the size of the detector differs from the script. The last option makes the process send itself SIGKILL (as
`kill -9` does), SIGTERM, or SIGINT (as Ctrl-C does) the N-th time that it reaches PLACE. The four places are: `arrays`,
after the arrays of a checkpoint are written and before its index is; `replacing`, after a checkpoint is moved away and
before the new one of the same step takes its place; `stepping`, before a step; and `evaluating`, during an evaluation.
"""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock


sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
if __name__ == "__main__":
    os.environ.setdefault("DETECTAX_TYPECHECK", "0")  # checks, a third of a start's time, are made in other tests

import _shared
import equinox as eqx
import jax
import jax.random as jr
import train as script
from _options import grouped as grouped

from detectax_eqx import models, nn, train, zoo
from detectax_eqx.evaluate import _detect
from detectax_eqx.train import _checkpoint
from detectax_eqx.zoo import _detectors


# XLA compiles in half the time. The programs run for milliseconds.
COMPILE_FAST = "--xla_backend_optimization_level=0"
OPTIONS = {
    "model": "retinanet_resnet50_fpn",  # starts in half the time of a two-stage detector
    "norm": "group",
    "batch-size": 2,
    "epochs": 3,
    "lr": 0.05,
    "warmup-steps": 4,
    "min-sizes": 64,
    "max-size": 64,
    "canvases": "64 64",
    "anchor-sizes": "8 16 32 48 64",
    "max-objects": 2,
    "checkpoint-every": 3,
    "log-every": 2,
}


def build(
    name,
    num_classes,
    norm,
    seed=0,
    *,
    checkpoint=False,
    anchor_sizes=None,
    aspect_ratios=None,
    num_keypoints=None,
):
    """The kind of detector that `name` begins with, on a ResNet-18 of one eighth of the usual width."""
    anchor_sizes = tuple((size,) for size in anchor_sizes or (8.0, 16.0, 32.0, 48.0, 64.0))
    ratios, key = aspect_ratios or (0.5, 1.0, 2.0), jr.key(seed)
    return _build(_kind(name), num_classes, key, checkpoint, anchor_sizes, ratios, num_keypoints)


def _in_zoo(
    name, num_classes, *, key, norm=None, checkpoint=False, anchor_sizes=None, aspect_ratios=None, num_keypoints=None
):
    sizes, ratios = anchor_sizes or ((8.0,), (16.0,), (32.0,), (48.0,), (64.0,)), aspect_ratios or (0.5, 1.0, 2.0)
    return _build(_kind(name), num_classes, key, checkpoint, sizes, ratios, num_keypoints)


def _kind(name):
    """The function of `models` that builds this kind: a Faster R-CNN unless `name` says otherwise."""
    kinds = ("mask_rcnn", "keypoint_rcnn", "retinanet")
    return next((kind for kind in kinds if name.startswith(kind)), "faster_rcnn")


# Tiny detectors that replace the zoo's detectors of the same names.
SMALL = {name: partial(_in_zoo, name) for name in zoo.names()}


def shrink(monkeypatch):
    """Makes the zoo build tiny detectors."""
    monkeypatch.setattr(_detectors, "_DETECTORS", SMALL)


@eqx.filter_jit
def _build(kind, num_classes, key, checkpoint, anchor_sizes, aspect_ratios, num_keypoints):
    keys = jr.split(key, 3)
    body = nn.resnet18(key=keys[0], norm=nn.GroupNorm, width=8, checkpoint=checkpoint)
    backbone = nn.BackboneWithFPN(body, key=keys[1], channels=16)
    parts = {
        "faster_rcnn": {"hidden_size": 32},
        "mask_rcnn": {"hidden_size": 32, "hidden_channels": 16},
        "keypoint_rcnn": {"hidden_size": 32, "hidden_channels": 16, "depth": 1, "num_keypoints": num_keypoints or 17},
        "retinanet": {"depth": 1},
    }[kind]
    return getattr(models, kind)(
        backbone, num_classes, key=keys[2], anchor_sizes=anchor_sizes, aspect_ratios=aspect_ratios, **parts
    )


def command(shapes, output, *options):
    """The command line of a run on datasets from `write_shapes_dataset` in `shapes/train` and `shapes/val`."""
    paths = {"output": output, "cache": output / "cache"}
    for kind in ("train", "val"):
        paths |= {f"{kind}-annotations": shapes / kind / "annotations.json", f"{kind}-images": shapes / kind / "images"}
    pairs = [(f"--{name}", *str(value).split(" ")) for name, value in (OPTIONS | paths).items()]
    return [sys.executable, __file__, *itertools.chain(*pairs), *options]


class CountingStep:
    """A training step that only increments the step counter, and therefore needs no compilation."""

    def __call__(self, state, batch):
        metrics = dict.fromkeys(("loss", "overflow", "invalid", "skipped"), 0.0)
        return eqx.tree_at(lambda state: state.step, state, state.step + 1), metrics

    def memory(self, state, batch):
        return None


@contextmanager
def no_training():
    """A context in which the script trains with a `CountingStep`."""
    with mock.patch.object(train, "make_train_step", lambda *arguments, **options: CountingStep()):
        yield


def members():
    """The options for each of two processes that take part in one run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    return [["--coordinator", address, "--num-processes", "2", "--process-id", str(i)] for i in range(2)]


def start(shapes, output, *options, **environment):
    """Starts `command` with these environment variables set."""
    environment = os.environ | environment
    arguments = command(shapes, output, *options)
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(*processes):
    """Waits for the processes. Returns their outputs and their exit statuses."""
    try:
        outputs = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()  # a process may still be waiting for one that failed
            process.wait()
    return outputs, [process.returncode for process in processes]


def saved_arrays(output):
    """The arrays of a run's last checkpoint, as a dictionary of names to arrays."""
    path = train.latest_checkpoint(output / "last")
    assert path is not None
    leaves = json.loads((path / "index.json").read_text())["content"]["leaves"]
    forms = {name: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"]) for name, leaf in leaves.items() if name != "key"}
    return _checkpoint.read_arrays(path / "arrays", forms)


# (owner, function, suffix): the signal follows a call of the function whose last argument ends with the suffix.
PLACES = {
    "arrays": (_checkpoint, "write_arrays", ""),
    "replacing": (Path, "rename", ".replaced"),
    "stepping": (train, "shard_batch", ""),
    "evaluating": (_detect, "to_coco_results", ""),
}


SIGNALS = {"--die-after": signal.SIGKILL, "--stop-after": signal.SIGTERM, "--interrupt-after": signal.SIGINT}


def signal_after(place, number, kind):
    """Makes the process send itself the signal `kind` when it reaches `place` for the `number`-th time."""
    owner, name, suffix = PLACES[place]
    original, calls = getattr(owner, name), itertools.count(1)

    def wrapped(*arguments, **options):
        result = original(*arguments, **options)
        if str(arguments[-1]).endswith(suffix) and next(calls) == number:
            os.kill(os.getpid(), kind)
        return result

    setattr(owner, name, wrapped)


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {COMPILE_FAST}"  # read at JAX's first use
    if sys.argv[-2] in SIGNALS:
        place, number = sys.argv[-1].split(":")
        signal_after(place, int(number), SIGNALS[sys.argv[-2]])
        del sys.argv[-2:]
    _detectors._DETECTORS = SMALL
    _shared.run(script.main, script.Options, script.__doc__, defaults=script.given_before)
