"""Resuming a run: which options may change, which may not, and what a killed run leaves behind."""

import json
import re
import subprocess
from typing import Any

import numpy as np
import pytest

from detectax_eqx import data, models, train, zoo

from . import tiny_train
from .tiny_train import grouped, script


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """4 images, so that an epoch is 2 steps."""
    folder = tmp_path_factory.mktemp("shapes")
    for name in ("train", "val"):
        data.write_shapes_dataset(folder / name, num_images=4, seed=0, image_size=(64, 64))
    return folder


def finish(process):
    (output,), (status,) = tiny_train.finish(process)
    return output, status


def start(shapes, output, *options):
    return finish(tiny_train.start(shapes, output, *options, XLA_FLAGS="", COLUMNS="80"))


def resume(output, *options):
    """Resumes with `--resume --output` and the given options only."""
    command = [tiny_train.sys.executable, tiny_train.__file__, "--resume", "--output", str(output), *options]
    environment = tiny_train.os.environ | {"XLA_FLAGS": "", "COLUMNS": "80"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return finish(subprocess.Popen(command, env=environment, **pipe))


@pytest.fixture(scope="module")
def done(shapes, tmp_path_factory):
    """The folder and the output of a finished run of two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "done"
    options = ["--epochs", "2", "--warmup-steps", "1", "--optimizer", "adamw", "--ema", "0.9", "--log-every", "1"]
    options += ["--checkpoint-every", "100"]  # so that `last` still has the step of `best`
    output, status = start(shapes, folder, *options)
    assert status == 0, output
    return folder, output


def test_the_header_and_the_log_without_a_terminal(done):
    """The header has all that is known before the first step; the log has a whole line per logged step."""
    _, output = done
    header, _, log = output.partition("memory of a step at 64×64: ")
    for line in (
        r"images +4\n",
        r"objects +\d+\n",
        r"per class +(\w+ \d+, ){3}\w+ \d+\n",
        r"steps +4, 2 epochs of 2, 2 images per step\n",
        r"rate +0.00625 at most \(adamw\); warm-up 1, decays after epochs 1.333 and 1.833\n",
        r"canvases +64×64 for 4 images; 0% padding\n",
        r"model +retinanet_resnet50_fpn, norm group, 196,096 parameters, 196,096 of them trained\n",
        r"devices +1 \(cpu\)\n",
    ):
        assert re.search(line, header), header
    assert re.match(r"\d+ MiB on each device\n", log)
    lines = re.findall(r"step (\d)/4 \(epoch .*\): [\d.]+ images/s, .*loss [\d.]+ \(.*\), rate [\d.e-]+.*\n", log)
    assert lines == ["1", "2", "3", "4"], log


def test_best_holds_what_inference_needs_once(done, monkeypatch):
    folder, _ = done
    (best,) = (folder / "best").iterdir()
    names = json.loads((best / "index.json").read_text())["content"]["leaves"]
    assert {name.split("/")[0] for name in names} == {"ema"}
    tiny_train.shrink(monkeypatch)
    detector = zoo.Predictor.from_checkpoint(folder)
    state = next(path for path in (folder / "last").iterdir() if path.name == best.name)
    like = {"ema": detector.model}
    expected, _ = train.load_checkpoint(state, like, partial=True)
    assert isinstance(detector.model, models.RetinaNet)
    np.testing.assert_array_equal(detector.model.deltas.weight, expected["ema"].deltas.weight)


def test_other_options_are_refused_or_printed(done):
    folder, _ = done
    before = (folder / "options.json").read_bytes()
    output, status = resume(folder, "--batch-size", "4", "--epochs", "3", "--seed", "1")
    assert status == 1 and "Traceback" not in output
    assert "--batch-size (2 → 4), --seed (0 → 1)" in output and len(output.strip().splitlines()) == 1
    assert (folder / "options.json").read_bytes() == before

    output, status = resume(folder)
    assert status == 0 and "Nothing is left to do: the run has made 4 of 4 steps" in output, output
    assert (folder / "options.json").read_bytes() == before

    output, status = resume(folder, "--epochs", "3", "--threads", "1")
    assert status == 0, output
    assert "Changed since before: --epochs 2 → 3\n" in output and "--threads 2 → 1\n" in output
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 6 and json.loads((folder / "options.json").read_text())["epochs"] == 3


@pytest.mark.slow
def test_a_run_without_progress_stops_early(shapes, tmp_path):
    """At a rate of almost 0, the second epoch is no better than the first; resuming says so again."""
    options = ["--epochs", "5", "--patience", "1", "--lr", "1e-12", "--warmup-steps", "0"]
    output, status = start(shapes, tmp_path / "run", *options)
    words = r"Stopped after step 4: the best AP, 0\.\d{3}, is 1 epochs old \(--patience 1\)"
    assert status == 0 and re.search(words, output), output
    output, status = resume(tmp_path / "run")
    assert status == 0 and re.search(words, output), output
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 4


OPTIONS: dict[str, Any] = {"train_annotations": "a.json", "train_images": "images"}
OTHERS = {
    "batch_size": 8, "seed": 1, "canvases": ((64, 64),), "model": "faster_rcnn_resnet18_fpn", "norm": "frozen_batch",
    "optimizer": "adamw", "lr": 0.1, "accumulate": 2, "anchor_sizes": (8.0, 16.0, 32.0, 64.0, 128.0),
    "aspect_ratios": (1.0,), "min_sizes": (640,), "max_size": 640, "flip": 0.0, "jitter": (0.5, 2.0), "max_objects": 9,
    "precision": "bfloat16", "ema": 0.9, "momentum": 0.0, "weight_decay": 0.0, "decay_vectors": False,
    "part_lr": {"backbone": 0.1}, "layer_decay": 0.9, "clip_norm": 1.0, "schedule": "cosine", "warmup_steps": 7,
    "decay_epochs": (1.0,), "trainable_layers": 2, "sampling": {"box_samples": 8.0},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_changes_batches_or_model_is_refused_naming_both_values(name, tmp_path):
    from _options import complete, flat
    from _resume import check_options, saved_options

    saved = complete(grouped(output=tmp_path, **OPTIONS), 10)
    tiny_train._shared.write_json(tmp_path / "options.json", flat(saved))
    assert saved_options(tmp_path) == saved
    given = grouped(output=tmp_path, resume=True, **OPTIONS, **{name: OTHERS[name]})
    show = lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else str(value)  # noqa: E731
    words = f"--{name.replace('_', '-')} ({show(flat(saved)[name])} → {show(OTHERS[name])})"
    if isinstance(OTHERS[name], dict):
        ((key, value),) = OTHERS[name].items()
        words = f"--{name.replace('_', '-')} (none → {key} {value})"
    with pytest.raises(SystemExit, match=re.escape(words)):
        check_options(given, saved, going_on=True)
    check_options(given, saved, going_on=False)


@pytest.mark.parametrize("content", ["x", "[]", '{"batch_size": "two"}', '{"canvases": [64]}', '{"output": 3}'])
def test_options_that_are_not_a_runs(content, tmp_path):
    from _resume import saved_options

    (tmp_path / "options.json").write_text(content)
    with pytest.raises(SystemExit, match=r"options.json is not what train.py writes .* Delete it"):
        saved_options(tmp_path)


def test_data_that_changed_are_refused(shapes, tmp_path):
    from _resume import check_data, describe_data

    annotations, images = shapes / "train/annotations.json", shapes / "train/images"
    before = describe_data(data.load_coco(annotations, images))
    check_data(data.load_coco(annotations, images), {"data": before}, "a.json")
    check_data(data.load_coco(annotations, images), {}, "a.json")  # an old checkpoint has no description
    content = json.loads(annotations.read_text())
    content["annotations"][0]["bbox"][0] += 1
    (tmp_path / "moved.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=r"but a\.json differs"):
        check_data(data.load_coco(tmp_path / "moved.json", images), {"data": before}, "a.json")


def test_what_a_killed_run_left_is_removed_unless_another_runs(tmp_path):
    from _run import remove_strays

    for step in (3, 6):
        train.save_checkpoint(tmp_path / "last", {"w": np.full(2, step)}, step=step, metadata={})
    (tmp_path / "last/00000003").rename(tmp_path / "last/00000003.replaced")
    train.save_checkpoint(tmp_path / "best", {"w": np.zeros(2)}, step=3, metadata={})
    strays = [".options.json.tmp", ".metrics.jsonl.tmp", "evaluation/.detections.json.77.tmp"]
    strays += ["last/00000009.tmp/arrays/d", "best/00000003.replaced/index.json", "best/00000006.tmp/index.json"]
    for name in strays:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("half")
    options = grouped(train_annotations="a.json", train_images="images", output=tmp_path)
    with train.lock_folder(tmp_path), pytest.raises(BlockingIOError):
        script.main(options)
    assert all((tmp_path / name).exists() for name in strays)
    with train.lock_folder(tmp_path):
        remove_strays(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.name[0] != ".")
    assert [name for name in left if name.count("/") < 2] == [
        "best", "best/00000003", "evaluation", "last", "last/00000003", "last/00000006",
    ]  # fmt: skip
    assert train.load_checkpoint(tmp_path / "last/00000003", {"w": np.zeros(2, int)})[0]["w"].tolist() == [3, 3]
