"""Runs that are killed and resumed give the same result as an uninterrupted run.

Two runs are compared in everything except timings: every array of the last and the best checkpoint, the contents of
their indexes, and the bytes of the metrics and detections.
"""

import json
import random
import signal
import time
from collections import Counter

import pytest
import tensorstore as ts

from detectax_eqx import data, train, zoo

from . import tiny_train


KILLS = 30
SAME = "resumed to the bits of the uninterrupted run"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """16 training images, one of them damaged, so that three epochs are 24 steps, and 6 images for evaluation."""
    folder = tmp_path_factory.mktemp("shapes")
    for name, count in (("train", 16), ("val", 6)):
        data.write_shapes_dataset(folder / name, num_images=count, seed=count, image_size=(64, 64))
    # Loading the dataset checks only the end of the file, which stays intact.
    damaged = folder / "train/images/000005.png"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:3000] + bytes(20) + content[3020:])
    return folder


@pytest.fixture(scope="module")
def whole(shapes, tmp_path_factory):
    """The contents of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    output, status = finish(start(shapes, folder))
    assert status == 0 and "000005.png: cannot be read as an image" in output, output
    assert [line["step"] for line in metrics(folder) if "loss" in line] == [1, *range(2, 25, 2)]
    assert [line["step"] for line in metrics(folder) if "bbox_AP" in line] == [8, 16, 24]
    assert metrics(folder)[-2]["left_out"] > 0 and metrics(folder)[-2]["bad_images"] == 3
    return contents(folder)


def start(shapes, folder, *options):
    # One device. Compilation dominates such short runs, so every program is cached for the next one.
    environment = {"XLA_FLAGS": "", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return tiny_train.start(shapes, folder, "--optimizer", "adamw", "--ema", "0.9", *options, **environment)


def finish(process):
    (output,), (status,) = tiny_train.finish(process)
    return output, status


def finish_both(shapes, folder, *options, signals=((), ())):
    """Outputs and exit statuses of a run of two processes, each with its own signal options."""
    members = tiny_train.members()
    processes = [start(shapes, folder, *options, *member, *own) for member, own in zip(members, signals, strict=True)]
    return tiny_train.finish(*processes)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def contents(folder):
    """Everything that two runs must have in common, as a dictionary of names to bytes."""
    files = {name: (folder / name).read_bytes() for name in ("metrics.jsonl", "evaluation/detections.json")}
    for kind in ("last", "best"):
        for path in sorted((folder / kind).iterdir()):
            store = ts.KvStore.open(f"file://{path}/arrays/|ocdbt:").result()
            arrays = {f"{kind}/{path.name}/{key}": bytes(store[key]) for key in store.list().result()}
            files |= arrays | {f"{kind}/{path.name}": (path / "index.json").read_bytes()}
    assert {name.split("/")[0] for name in files} == {"metrics.jsonl", "evaluation", "last", "best"}
    return files


def assert_readable(folder, monkeypatch):
    """Checks that existing files are usable: a predictor loads the checkpoint, and the logs are valid JSON."""
    tiny_train.shrink(monkeypatch)
    if any(train.latest_checkpoint(folder / kind) for kind in ("last", "best")):
        detector = zoo.Predictor.from_checkpoint(folder)
        assert detector.categories is not None
        assert [category.name for category in detector.categories] == ["circle", "square", "triangle", "star"]
    for path in (*folder.glob("*.json"), *folder.glob("evaluation/*.json")):
        json.loads(path.read_text())
    for path in folder.glob("*.jsonl"):
        assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_and_terminated(shapes, whole, tmp_path, monkeypatch, tally):
    """A run is killed twice during a save, and stopped twice while training and once during an evaluation."""
    folder = tmp_path / "run"
    output, status = finish(start(shapes, folder, "--die-after", "arrays:2"))
    assert status == -signal.SIGKILL and not (folder / "last/00000006").exists(), output
    assert_readable(folder, monkeypatch)
    output, status = finish(start(shapes, folder, "--resume", "--stop-after", "stepping:2"))
    assert status == 128 + signal.SIGTERM and "Going on at step 3" in output, output
    assert "Stopped and saved at step 5" in output
    output, status = finish(start(shapes, folder))
    assert status == 1 and "pass --resume" in output, output
    output, status = finish(start(shapes, folder, "--resume", "--interrupt-after", "stepping:1"))
    assert status == 128 + signal.SIGINT and "Going on at step 5" in output, output
    assert "Stopped and saved at step 6" in output
    output, status = finish(start(shapes, folder, "--resume", "--die-after", "replacing:1"))
    assert status == -signal.SIGKILL and (folder / "last/00000008.replaced").exists(), output
    assert_readable(folder, monkeypatch)
    output, status = finish(start(shapes, folder, "--resume", "--stop-after", "evaluating:9"))
    assert status == 128 + signal.SIGTERM and "Going on at step 8" in output, output
    assert "Stopped and saved at evaluation after step 16" in output
    output, status = finish(start(shapes, folder, "--resume"))
    assert status == 0 and "Going on at step 16" in output, output
    same = contents(folder) == whole
    tally("kill -9 at chosen places of a save", 2, 2 * same, SAME)
    tally("SIGTERM", 2, 2 * same, f"saves and exits; {SAME}")
    tally("Ctrl-C", 1, same, f"saves and exits; {SAME}")
    assert same


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_two_processes_stop_together(shapes, tmp_path, tally):
    """A signal to either process stops both: neither can take or save a step on its own."""
    outputs, statuses = finish_both(shapes, tmp_path / "whole")
    assert statuses == [0, 0], outputs
    folder, done, resume = tmp_path / "run", 0, ()
    sigterm, sigint = (("--stop-after", "stepping:1"), ("--interrupt-after", "stepping:1"))
    for signals in (((), sigterm), (sigterm, ()), (sigterm, sigterm), ((), sigint)):
        outputs, statuses = finish_both(shapes, folder, *resume, signals=signals)
        assert statuses == [128 + signal.SIGTERM] * 2, outputs
        latest = train.latest_checkpoint(folder / "last")
        assert latest is not None
        before, done = done, int(latest.name)
        assert before < done < 24 and f"Stopped and saved at step {done};" in outputs[0], outputs
        assert not resume or f"Going on at step {before}" in outputs[0], outputs
        resume = ("--resume",)
    outputs, statuses = finish_both(shapes, folder, *resume)
    assert statuses == [0, 0], outputs
    same = contents(folder) == contents(tmp_path / "whole")
    tally("SIGTERM to one of two processes, or both", 3, 3 * same, f"both save one step and exit; {SAME}")
    tally("Ctrl-C in one of two processes", 1, same, f"both save one step and exit; {SAME}")
    assert same


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_killed_at_random(shapes, whole, tmp_path, monkeypatch, tally):
    """Kills runs at random moments of the whole run, of training, or of writing a checkpoint."""
    rng, kills, survived, runs = random.Random(0), Counter(), Counter(), 0
    while kills.total() < KILLS:
        folder, options, here = tmp_path / str(runs), [], Counter()
        while True:
            before = progress(folder)
            process = start(shapes, folder, *options)
            if kills.total() + here.total() < KILLS:
                wait_to_kill(process, folder, rng.choice(("any", "training", "saving")), rng)
                process.kill()
            output, status = finish(process)
            if status == 0:
                break
            assert status == -signal.SIGKILL, output
            idle = "while starting" if progress(folder) == before else "while training"
            here["amid a save" if saving(folder) else idle] += 1
            assert_readable(folder, monkeypatch)
            options = ["--resume"]
        runs += 1
        kills += here
        if contents(folder) == whole:
            survived += here
    for moment, count in kills.items():
        tally(f"kill -9 at random, {moment}", count, survived[moment], SAME)
    assert survived == kills


def progress(folder):
    """The files that a run has written so far, with their modification times."""
    try:
        return sorted((path.name, path.stat().st_mtime) for path in folder.glob("*/*"))
    except FileNotFoundError:  # a file was renamed in the meantime
        return progress(folder)


def saving(folder):
    """Whether a checkpoint is being written, or was when its writer was killed."""
    return any(any(folder.glob(f"{kind}/*.tmp")) for kind in ("last", "best"))


def wait_to_kill(process, folder, moment, rng):
    """Returns at a random moment, or when the process has ended."""
    before, saves, was_saving = progress(folder), rng.randrange(1, 5), saving(folder)
    deadline = time.monotonic() + (rng.uniform(0, 8) if moment == "any" else 60)
    while time.monotonic() < deadline and process.poll() is None:
        if moment == "training" and progress(folder) != before:
            moment, deadline = "any", time.monotonic() + rng.uniform(0, 3)
        is_saving = saving(folder)
        saves -= is_saving and not was_saving
        was_saving = is_saving
        if moment == "saving" and not saves:
            time.sleep(rng.uniform(0, 0.02))
            return
        time.sleep(0.001)
