"""Defaults that scale with a run, and runs that cannot learn."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from detectax_eqx import data, models, zoo

from . import tiny_train
from .tiny_train import grouped, script
from .zoo_names import LARGER, SMALLEST


_shared = tiny_train._shared


def completed(epoch_steps, **options):
    from _options import complete

    return complete(grouped(output=Path(), **options), epoch_steps)


def test_the_recipe_is_the_fields_at_its_own_length():
    options = completed(7330, init="weights.pth")
    rate = options.optimization
    assert (rate.lr, rate.warmup_steps, rate.decay_epochs) == (0.02, 500, (8, 11))
    assert (options.architecture.norm, options.architecture.trainable_layers) == ("frozen_batch", 3)


def test_defaults_scale_with_the_run():
    options = completed(13, epochs=12)
    assert options.optimization.warmup_steps == 15 and options.optimization.decay_epochs == (8, 11)  # of 156 steps
    assert (options.architecture.norm, options.architecture.trainable_layers) == ("group", 5)
    assert completed(10, epochs=6).optimization.decay_epochs == (4, 5.5)
    options = completed(10, steps=30)
    assert options.optimization.warmup_steps == 3 and options.optimization.decay_epochs == (2, 2.75)
    assert completed(10, optimizer="adamw").optimization.lr == 1e-4
    for steps in range(1, 40):
        options = completed(10, steps=steps)
        schedule = script.make_schedule(options, 10)
        assert max(float(np.asarray(schedule(k))) for k in range(steps)) == pytest.approx(0.02)


def write(folder, change):
    """Annotations and images, the annotations changed."""
    annotations, images = data.write_shapes_dataset(folder, num_images=2, image_size=(64, 64))
    content = json.loads(annotations.read_text())
    change(content)
    annotations.write_text(json.dumps(content))
    return {"train_annotations": str(annotations), "train_images": str(images)}


def bare(content):
    for annotation in content["annotations"]:
        del annotation["segmentation"]


@pytest.mark.parametrize(
    "change, options, words",
    [
        (lambda c: c.update(annotations=[]), {}, "has no object to train on: it has none"),
        (lambda c: [a.update(iscrowd=1) for a in c["annotations"]], {}, "are crowds"),
        (bare, {}, "mask_rcnn_resnet50_fpn learns masks. For boxes alone use --model faster_rcnn_resnet50_fpn"),
        (lambda c: None, {"warmup_steps": 500, "steps": 156}, "--warmup-steps is 500, but the run has 156 steps"),
        (lambda c: None, {"norm": "frozen_batch"}, "Give --init, or leave the option out"),
        (lambda c: None, {"anchor_sizes": (8.0, 16.0)}, "it must be 5 numbers, one per level"),
        (lambda c: None, {"train_images": None}, "--train-annotations and --train-images are required"),
    ],
)
def test_runs_that_cannot_learn_are_refused(change, options, words, tmp_path):
    given = {"batch_size": 8, "output": tmp_path / "run"} | write(tmp_path / "data", change) | options
    with pytest.raises(SystemExit) as error:
        script.main(grouped(**given))
    assert words in str(error.value) and "mask_size" not in str(error.value)
    assert not (tmp_path / "run/options.json").exists()


@pytest.mark.parametrize("names", [SMALLEST, pytest.param(LARGER, marks=pytest.mark.slow)], ids=["smallest", "larger"])
def test_anchors_reach_every_detector(names):
    options = {"anchor_sizes": (8, 16, 32, 64, 128), "aspect_ratios": (0.25, 1.0, 2.0, 4.0)}

    def shapes(name, **options) -> Any:
        return zoo.Architecture(name, "group", **options).shapes(3)

    assert len(names) > 15
    for name in names:
        # The default boxes of SSD are part of it, and detection transformers have no anchors.
        if name.startswith(("ssd", "rf_detr", "lw_detr", "detr", "deformable_detr")):
            with pytest.raises(ValueError, match=f"{name} does not take anchor_sizes. Omit it."):
                shapes(name, **options)
            continue
        if name.startswith("fcos"):  # its points have a size and no aspect
            with pytest.raises(ValueError, match=f"{name} does not take aspect_ratios. Omit it."):
                shapes(name, **options)
            assert shapes(name, anchor_sizes=(8, 16, 32, 64, 128)).anchor_sizes == ((8,), (16,), (32,), (64,), (128,))
            continue
        model = shapes(name, **options)
        head = getattr(model, "rpn", model)
        assert head.anchor_sizes == ((8,), (16,), (32,), (64,), (128,))
        assert head.aspect_ratios == (0.25, 1.0, 2.0, 4.0) and head.deltas.weight.shape[0] == 4 * 4
        assert getattr(shapes(name), "rpn", model).aspect_ratios == (0.5, 1.0, 2.0) or not hasattr(model, "rpn")


def test_sampling_reaches_every_detector():
    """Two-stage detectors sample anchors and proposals, dense ones match every anchor."""
    for name in (
        "mask_rcnn_resnet18_fpn",
        "retinanet_resnet50_fpn",
        "fcos_resnet50_fpn",
        "ssd300_vgg16",
        "rf_detr_nano",
        "detr_resnet50",
    ):
        model: Any = zoo.Architecture(name, "group").shapes(3)
        part = "sampling" if hasattr(model, "sampling") else "matching"
        for field, value in vars(getattr(model, part)).items():
            if isinstance(value, float):
                changed: Any = _shared.with_sampling(model, {field: 0.25})
                assert getattr(changed, part) == replace(getattr(model, part), **{field: 0.25})
    model = _shared.with_sampling(zoo.Architecture("faster_rcnn_resnet18_fpn").shapes(3), {"box_samples": 128.0})
    assert model.sampling.box_samples == 128 and isinstance(model.sampling.box_samples, int)
    for fields, words in (
        ({"box_samples": 0.5}, "--sampling box_samples is 0.5: it must be a positive whole number"),
        ({"box_positive_iou": 2.0}, "--sampling box_positive_iou is 2.0: it must be in 0..1"),
        ({"samples": 3.0}, "--sampling: TwoStageSampling has no samples; its fields are pre_nms_top_n, "),
    ):
        with pytest.raises(SystemExit, match=words):
            _shared.with_sampling(model, fields)


def test_names_are_the_zoos():
    assert get_args(_shared.ModelName) == zoo.names()


PREPROCESSING = {"resize": {"min_size": 64, "max_size": 96}, "mean": [1.0, 2.0, 3.0], "std": [4.0, 5.0, 6.0]}


def test_anchors_travel_with_the_checkpoint(tmp_path, monkeypatch):
    """And a checkpoint from before there was a choice has the usual ones."""
    from detectax_eqx import train

    tiny_train.shrink(monkeypatch)
    anchors = {"anchor_sizes": (6.0, 12.0, 24.0, 40.0, 60.0), "aspect_ratios": (0.5, 1.0)}
    metadata = {"model": "faster_rcnn_resnet18_fpn", "norm": "group", "categories": [{"id": 1, "name": "a"}]}
    metadata |= {"preprocessing": PREPROCESSING, "canvases": [[64, 64]], "ema": False}
    for name, own in (("new", anchors), ("old", {})):
        model = tiny_train.build("", 1, "", **own)
        train.save_checkpoint(tmp_path / name / "last", {"model": model}, step=1, metadata=metadata | own)
        loaded = zoo.Predictor.from_checkpoint(tmp_path / name).model
        assert loaded.preprocessing.resize((640, 640)) == (64, 64) and loaded.preprocessing.std == (4.0, 5.0, 6.0)
        assert isinstance(loaded, models.FasterRCNN)
        assert loaded.rpn.anchor_sizes == model.rpn.anchor_sizes and loaded.rpn.aspect_ratios == model.rpn.aspect_ratios


@pytest.mark.parametrize("name", ["faster_rcnn_resnet18_fpn", "mask_rcnn_resnet18_fpn"])
def test_checkpoints_of_before_preprocessing_still_load(name, tmp_path, monkeypatch):
    """Their mask head stood beside a `faster_rcnn`, and the RPN had one `conv`. Training cannot go on with them."""
    from dataclasses import replace

    import equinox as eqx
    from _resume import check_version

    from detectax_eqx import train, weights

    tiny_train.shrink(monkeypatch)
    model = tiny_train.build(name, 1, "group")
    inside = "faster_rcnn/" if name.startswith("mask") else ""
    arrays = {
        path.replace(".", "/").replace("rpn/convs/0/", "rpn/conv/"): leaf
        for path, leaf in weights.named_leaves(model).items()
    }
    arrays = {path if path.startswith("mask_head/") else inside + path: leaf for path, leaf in arrays.items()}
    metadata = {"model": name, "norm": "group", "categories": [{"id": 1, "name": "a"}], "ema": False}
    metadata |= {"min_size": 64, "max_size": 96, "canvases": [[64, 64]]}
    train.save_checkpoint(tmp_path / "last", {"model": arrays}, step=1, metadata=metadata)
    loaded = zoo.Predictor.from_checkpoint(tmp_path).model
    assert loaded.preprocessing.resize((640, 640)) == (64, 64)
    assert eqx.tree_equal(replace(loaded, preprocessing=model.preprocessing), model)
    with pytest.raises(SystemExit, match=r"--resume cannot go on with .*: write it with export\.py"):
        check_version(tmp_path / "last")


def test_the_compilers_alarm_is_left_out_and_nothing_else():
    code = """
import os, sys
from _quiet import without_alarms
with without_alarms():
    os.write(2, b"E1128 14:49:47.4 17449 slow_operation_alarm.cc:73] \\n" + b"*" * 32 + b"\\n")
    os.write(2, b"[Compiling module jit_f] Very slow compile? If you want\\n" + b"*" * 32)
    os.write(2, b"\\nE1128 real.cc:1] real\\n")
    print("warning", file=sys.stderr)
    if "abort" in sys.argv:
        os.abort()
print("after", file=sys.stderr)
"""
    folder = _shared.__file__.rpartition("/")[0]
    for words, expected in (([], ["E1128 real.cc:1] real", "warning", "after"]), (["abort"], None)):
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=folder, capture_output=True, text=True)
        lines = done.stderr.splitlines()
        assert lines == expected or (words and lines[:2] == ["E1128 real.cc:1] real", "warning"]), done.stderr


def test_a_narrow_terminal_shows_count_and_speed(monkeypatch):
    """On 80 columns the end of the status gives way."""
    import io

    from _record import describe_step
    from rich.console import Console

    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True)
    monkeypatch.setattr(_shared, "console", console)
    values = {"loss": 1.234} | {f"loss_{name}": 0.5 for name in ("classifier", "box_reg", "objectness", "rpn_box_reg")}
    with _shared.progress() as bar:
        task = bar.add_task("training", total=90_000, status="compiling")
        status = describe_step(values, 0.02, 123.4, 17, "1 day, 3:04:05")
        bar.update(task, completed=12_345, status=status)
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", file.getvalue()).splitlines()
    (last,) = [line for line in shown if "images/s" in line][-1:]
    assert "12345/90000 123.4 images/s, 1 day, 3:04:05 left" in last and len(last) <= 80, shown
