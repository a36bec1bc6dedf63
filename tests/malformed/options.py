"""Options of the scripts that are out of range, contradict each other, or name files with the wrong content."""

import json
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from unittest import mock

import jax
import jax.numpy as jnp

from detectax_eqx import data, train, weights, zoo
from detectax_eqx.zoo import _detectors

from .. import tiny_train
from . import Case


RANGES = {
    "train": {
        "epochs": ["0", "-1", "1.5", "x"],
        "patience": ["0", "-1", "1.5"],
        "steps": ["0", "-3"],
        "batch-size": ["0", "-2", "two"],
        "lr": ["0", "-0.1", "nan", "inf", "x"],
        "momentum": ["1.5", "-1", "nan"],
        "weight-decay": ["-1", "nan", "inf"],
        "warmup-steps": ["-1", "1", "500"],
        "decay-epochs": ["-1"],
        "trainable-layers": ["6", "-1"],
        "min-sizes": ["0", "-64"],
        "max-size": ["0", "-1"],
        "canvases": ["0 64", "64 100", "64", "-32 64"],
        "anchor-sizes": ["0 1 2 3 4", "32", "nan 1 2 3 4"],
        "aspect-ratios": ["0", "-1", "inf"],
        "flip": ["1.5", "-0.1", "nan"],
        "jitter": ["0 1", "2 1", "nan 1", "1"],
        "max-objects": ["0", "-1"],
        "seed": ["-1", "x"],
        "threads": ["0", "-1"],
        "log-every": ["0"],
        "checkpoint-every": ["0", "-5"],
        "max-bad-images": ["-1"],
        "accumulate": ["0", "-1", "3"],
        "parameter-shards": ["0", "-2", "3"],
        "tensor-shards": ["0", "-2", "3"],
        "clip-norm": ["0", "-1", "nan"],
        "ema": ["1.5", "-0.1", "nan"],
        "part-lr": ["backbone 0", "backbone -1", "backbone inf", "backbone x", "no_such_part 1"],
        "precision": ["float16"],
        "non-finite": ["ignore"],
        "coordinator": ["127.0.0.1:1"],
        "num-processes": ["two"],
        "process-id": ["x"],
        "model": ["yolo", ""],
        "norm": ["batch", "frozen_batch", "frozen_batch_eps0"],
        "optimizer": ["lion"],
        "schedule": ["step"],
        "train-annotations": ["none.json", "http://127.0.0.1:1/x.json"],
        "train-images": ["none"],
        "val-annotations": ["none.json"],
        "init": ["none.pth", "none.safetensors"],
        "sampling": ["positive_iou 1.5", "no_such_field 1", "positive_iou x"],
        "no-such-option": ["1"],
    },
    "evaluate": {
        "batch-size": ["0"],
        "min-size": ["0", "-1"],
        "max-size": ["0"],
        "score-threshold": ["2", "-1", "nan"],
        "nms-threshold": ["1.5"],
        "max-detections": ["0", "-1"],
        "threads": ["0"],
        "selection": ["nms_threshold 1.5", "max_detections 0.5", "no_such_field 1", "nms_threshold x"],
        "checkpoint": ["none"],
    },
    "predict": {
        "min-size": ["0"],
        "max-pixels": ["0", "-1"],
        "score-threshold": ["7"],
        "nms-threshold": ["-1"],
        "selection": ["nms_threshold 1.5", "max_detections 0.5", "no_such_field 1", "nms_threshold x"],
        "max-detections": ["-1"],
        "checkpoint": ["none"],
    },
    "export": {
        "output": ["none.pt", "none"],
        "images": ["none"],
        "source": ["0 640", "640 -1", "640"],
        "canvas": ["0 64", "64 100", "-32 64"],
        "batch-size": ["0", "-2", "two"],
        "any-batch": ["flag"],
        "min-size": ["0", "-1"],
        "max-size": ["0"],
        "score-threshold": ["1.7", "-0.1", "nan"],
        "nms-threshold": ["1.5", "-1"],
        "max-detections": ["0", "-1"],
        "max-images": ["0", "-1"],
        "selection": ["nms_threshold 1.5", "max_detections 0.5", "no_such_field 1", "nms_threshold x"],
        "unmatched-score": ["1.7", "-1", "nan"],
        "checkpoint": ["none"],
    },
    "inspect_dataset": {
        "min-size": ["0", "-1"],
        "max-size": ["0"],
        "canvases": ["0 64", "64 100", "64"],
        "anchor-sizes": ["0 8 16 32 64", "8 16 32 64 nan", "8"],
        "aspect-ratios": ["0", "-1 1", "inf"],
        "annotations": ["none.json"],
        "images": ["none"],
    },
}


@cache
def shapes():
    """Valid annotations and images; their detector is compiled here, while no case is timed."""
    annotations, images = data.write_shapes_dataset(mkdtemp(), num_images=2, image_size=(64, 64))
    tiny_train.build("faster_rcnn_resnet18_fpn", data.load_coco(annotations, images).num_classes, "group")
    return annotations, images


def saved(folder, metadata=None, tree=None):
    """A folder as train.py would leave it, with other content."""
    tree = {"w": jnp.zeros(2)} if tree is None else tree
    train.save_checkpoint(folder / "last", tree, step=1, metadata=metadata or {})
    return folder


def make(script, options, folder):
    """A call of a script in this process, with its usual options, of which `options` replaces some."""
    annotations, images = shapes()
    usual = {
        "train": {"train-annotations": annotations, "train-images": images, "output": folder / "out"},
        "evaluate": {"annotations": annotations, "images": images, "output": folder / "out"},
        "predict": {"output": folder / "out"},
        "export": {"output": folder / "out.onnx", "images": images},
        "inspect_dataset": {"annotations": annotations, "images": images, "output": folder / "out"},
    }[script]
    if script == "train":
        usual |= tiny_train.OPTIONS | {"steps": 1, "warmup-steps": 0, "batch-size": len(jax.devices())}
    elif options.keys() & {"selection", "canvas"}:  # their valid values depend on the detector
        usual |= detector_weights()
    elif script != "inspect_dataset" and "weights" not in options:
        usual["checkpoint"] = folder / "run"
    given = {name: value for name, value in (usual | options).items() if value is not None}
    words = [word for name, value in given.items() for word in (f"--{name}", *str(value).split(" "))]
    words = [word for word in words if word != "flag"] + ([str(images)] if script == "predict" else [])
    module = {"train": tiny_train.script}.get(script) or __import__(script)

    def call():
        small = mock.patch.object(_detectors, "_DETECTORS", tiny_train.SMALL)
        with mock.patch.object(sys, "argv", [f"{script}.py", *words]), small:
            return tiny_train._shared.run(module.main, module.Options, None)

    return call


def cases():
    for script, ranges in RANGES.items():
        for option, values in ranges.items():
            for value in values:
                yield Case(
                    f"option: {script}.py --{option} {value}",
                    lambda folder, s=script, o={option: value}: make(s, o, folder),
                    (option,) if not value.startswith(("none", "http")) else (value,),
                )
    yield from contradictions()


def contradictions():
    """Options that contradict each other, or the content of files."""

    def case(what, script, files, words):
        def prepare(folder):
            options = files(folder)
            if options.keys() & {"init", "resume"}:
                start_once()
            return make(script, options, folder)

        return Case(f"option: {what}", prepare, words)

    def annotations(folder, **changes):
        content = json.loads(shapes()[0].read_text())
        (folder / "other.json").write_text(json.dumps(content | changes))
        return folder / "other.json"

    def written(path, content=b"x"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def unnamed(folder):
        weights.save_safetensors({"w": jnp.zeros(2)}, folder / "w.safetensors")
        return {"init": folder / "w.safetensors"}

    fewer = [{"id": 1, "name": "circle"}, {"id": 3, "name": "a"}, {"id": 4, "name": "b"}, {"id": 7, "name": "c"}]
    plain = {"categories": [{"id": 1, "name": "a"}], "canvases": [[64, 64]]}
    plain["preprocessing"] = {"resize": {"min_size": 64, "max_size": 64}, "mean": [0, 0, 0], "std": [1, 1, 1]}
    named = plain | {"model": "faster_rcnn_resnet18_fpn", "norm": "group"}
    yield case("warmup longer than a cosine", "train", lambda _: {"schedule": "cosine", "warmup-steps": 9}, ("warmup",))
    yield case(
        "val categories that differ", "train",
        lambda folder: {"val-annotations": annotations(folder, categories=[*fewer, {"id": 9, "name": "d"}])},
        ("other.json", "categories"),
    )  # fmt: skip
    yield case(
        "masks of boxes", "train",
        lambda folder: {
            "model": "mask_rcnn_resnet18_fpn",
            "train-annotations": annotations(
                folder,
                annotations=[{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}],
            ),
        },
        ("other.json", "segmentation", "--model faster_rcnn_resnet18_fpn"),
    )  # fmt: skip
    yield case(
        "an output folder that holds a run", "train", lambda folder: {"output": saved(folder / "run")}, ("--resume",)
    )
    yield case(
        "an output folder that is a file", "train", lambda folder: {"output": written(folder / "file")}, ("file",)
    )
    yield case(
        "resuming another model's run", "train",
        lambda folder: {"output": saved(folder / "run"), "resume": "flag"}, ("00000001", "does not fit"),
    )  # fmt: skip
    yield case(
        "resuming damaged checkpoints", "train",
        lambda folder: {
            "output": written(saved(folder / "run") / "last/00000001/index.json").parents[2],
            "resume": "flag",
        },
        ("00000001", "damaged"),
    )  # fmt: skip
    yield case("initial weights of nothing", "train", unnamed, ("w.safetensors",))
    yield case("initial weights of text", "train", lambda folder: {"init": written(folder / "w.pth")}, ("w.pth",))
    yield case("a cache that is a file", "train", lambda folder: {"cache": written(folder / "cache")}, ("cache",))
    for what, metadata in {
        "no metadata": {},
        "an unknown model": plain | {"model": "yolo", "norm": "group"},
        "an unknown norm": plain | {"model": "faster_rcnn_resnet18_fpn", "norm": "batch"},
        "a model by a name from elsewhere": plain | {"model": "__loader__", "norm": "group"},
        "categories that are text": named | {"categories": "abc"},
        "no canvas": named | {"canvases": None},
        "a preprocessing of text": named | {"preprocessing": "x"},
        "a resize that is unknown": named | {"preprocessing": plain["preprocessing"] | {"resize": {"longest": 64}}},
        "a resize to nothing": named | {"preprocessing": plain["preprocessing"] | {"resize": {"size": 0}}},
        "a deviation of 0": named | {"preprocessing": plain["preprocessing"] | {"std": [0, 1, 1]}},
        "sizes of before, and another model's arrays": {k: v for k, v in named.items() if k != "preprocessing"}
        | {"min_size": 64, "max_size": 64},
        "another model's arrays": named,
    }.items():
        for script in ("evaluate", "predict"):
            yield case(
                f"{script}.py on a checkpoint with {what}", script,
                lambda folder, m=metadata: {"checkpoint": saved(folder / "run", m)}, ("run",),
            )  # fmt: skip
    for name, content in {"w.pth": b"x", "w.safetensors": b"x", "w.zip": b"PK\x03\x04"}.items():
        yield case(
            f"evaluate.py --weights {name}", "evaluate",
            lambda folder, n=name, c=content: {
                "weights": written(folder / n, c),
                "model": "faster_rcnn_resnet18_fpn",
            },
            (name,),
        )  # fmt: skip
    yield case(
        "weights without a model", "evaluate", lambda folder: {"weights": written(folder / "w.pth")}, ("--model",)
    )
    yield case("neither weights nor checkpoint", "evaluate", lambda _: {"checkpoint": None}, ("--checkpoint",))
    for script, option in (("evaluate", "annotations"), ("evaluate", "images"), ("predict", "annotations")):
        yield case(
            f"{script}.py --{option} that are not there", script,
            lambda folder, o=option: {o: folder / "none"} | detector_weights(), ("none",),
        )  # fmt: skip
    for what, content in {
        "a list": b"[]",
        "text": b"x",
        "no categories": b"{}",
        "categories of text": b'{"categories": "ab"}',
    }.items():
        yield case(
            f"predict.py --annotations of {what}", "predict",
            lambda folder, c=content: {"annotations": written(folder / "a.json", c)} | detector_weights(),
            ("a.json",),
        )  # fmt: skip


@cache
def start_once():
    """Begins a run, so that programs for the initial state are compiled before a case is timed."""
    with suppress(SystemExit, train.CheckpointError):
        make("train", {"output": saved(Path(mkdtemp())), "resume": "flag"}, Path())()


@cache
def detector_weights():
    """Valid weights of a detector, built once."""
    path = Path(mkdtemp()) / "detector.safetensors"
    zoo.Predictor(tiny_train.build("faster_rcnn_resnet18_fpn", 4, "group")).save_weights(path)
    return {"weights": path, "model": "faster_rcnn_resnet18_fpn", "norm": "group"}
