"""Damaged datasets and results are either rejected at the start in one message, or usable to the end.

Each case is a valid file with one or two random changes: fields removed, emptied, retyped, scaled or renamed; entries
duplicated, dropped or moved. It goes through training, evaluation, the report and the inspection, as in the scripts,
with a tiny detector. Real annotations are changed as well if a folder of them exists beside the repository.
"""

import copy
import json
import signal
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

from detectax_eqx import data, train
from detectax_eqx.zoo import _detectors

from . import tiny_train


sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import _options
import _shared
import evaluate as evaluate_script
import inspect_dataset as inspect_script
import train as train_script


REAL = Path(__file__).parents[2] / "shared" / "data"
SECONDS = 600  # per case, which may compile; a case that takes longer hangs
LINES = 24  # per message
CANVAS = (64, 64)
PARTS = ("images", "annotations", "annotations", "annotations", "annotations", "categories")
OTHER_TYPES = (None, "7", 7, -1, 0.5, True, [], [1, 2], {}, {"a": 1}, "", float("nan"), 1e400, 2**63, [[1, 2, 3]])
FACTORS = (0, -1, 0.001, 0.01, 0.5, 3, 1000, 1e9)


def shapes(folder):
    """A valid dataset of drawn shapes: its content, and the folder of its images."""
    annotations, images = data.write_shapes_dataset(folder, num_images=6, seed=0, image_size=CANVAS)
    return json.loads(Path(annotations).read_text()), Path(images)


def real(name, annotations, images):
    """The first images of a real dataset, with all of their objects and the categories of those objects."""
    content = json.loads((REAL / name / annotations).read_text())
    first_images = content["images"][:6]
    ids = {image["id"] for image in first_images}
    objects = [one for one in content["annotations"] if one["image_id"] in ids]
    used = {one["category_id"] for one in objects}
    categories = [category for category in content["categories"] if category["id"] in used][:90]
    return {"images": first_images, "annotations": objects, "categories": categories}, REAL / name / images


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Valid datasets to change."""
    datasets = [shapes(tmp_path_factory.mktemp("shapes"))]
    if REAL.is_dir():
        datasets.append(real("bccd", "val.json", "images"))
        datasets.append(real("coco-mini", "annotations/instances_val2017.json", "val2017"))
    return datasets


def mutate(content, rng, parts):
    """A copy with one or two changes, and their descriptions.

    `parts` names the lists to change, or is `None` if `content` is itself a list.
    """
    content, changes = copy.deepcopy(content), []
    for _ in range(rng.integers(1, 3)):
        part = content if parts is None else content.get(parts[rng.integers(len(parts))])
        if not isinstance(part, list) or not part:
            continue
        changes.append(_change(part, rng))
    return content, changes


def _change(entries, rng):
    """Changes a list of entries in place, and returns a description of the change."""
    kind = ("remove", "retype", "scale", "scale all", "rename", "double", "drop", "move", "deepen")[rng.integers(9)]
    at = int(rng.integers(len(entries)))
    entry = entries[at]
    if kind == "double":
        entries.append(copy.deepcopy(entry))
    elif kind == "drop":
        del entries[at]
    elif kind == "move":
        entries.insert(0, entries.pop(at))
    elif isinstance(entry, dict) and entry:
        field = sorted(entry)[rng.integers(len(entry))]
        if kind == "remove":
            del entry[field]
        elif kind == "rename":
            entry[field + "s"] = entry.pop(field)
        elif kind == "retype":
            entry[field] = copy.deepcopy(OTHER_TYPES[rng.integers(len(OTHER_TYPES))])
        elif kind == "deepen" and isinstance(entry[field], list) and entry[field]:
            entry[field][rng.integers(len(entry[field]))] = OTHER_TYPES[rng.integers(len(OTHER_TYPES))]
        else:
            factor = FACTORS[rng.integers(len(FACTORS))]
            for one in entries if kind == "scale all" else [entry]:
                if isinstance(one, dict) and field in one:
                    one[field] = _scaled(one[field], factor)
        return f"{kind} {field} of {at}"
    else:
        entries[at] = copy.deepcopy(OTHER_TYPES[rng.integers(len(OTHER_TYPES))])
    return f"{kind} {at}"


def _scaled(value, factor):
    if isinstance(value, list):
        return [_scaled(part, factor) for part in value]
    return value * factor if isinstance(value, int | float) and not isinstance(value, bool) else value


class SharedStep:
    """A compiled step shared by all runs whose models have the same shapes; counts the steps made.

    At most `most` steps are compiled; other runs get steps that only count.
    """

    steps: dict = {}  # noqa: RUF012
    made, most = 0, 1

    def __init__(self, *arguments, **options):
        self.make = lambda: train.make_train_step(*arguments, **options)

    def __call__(self, state, batch):
        SharedStep.made += 1
        key = state.model.num_classes
        if key not in SharedStep.steps and len(SharedStep.steps) < SharedStep.most:
            SharedStep.steps[key] = self.make()
        return SharedStep.steps.get(key, tiny_train.CountingStep())(state, batch)

    def memory(self, state, batch):
        return None


@contextmanager
def tiny(most):
    """Within the `with` block, scripts use a tiny detector and the steps of earlier runs, at most `most` compiled."""
    SharedStep.most = most
    fake = mock.Mock(wraps=train, make_train_step=SharedStep, METRICS=train.METRICS)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(train_script, "train", fake))
        stack.enter_context(mock.patch.object(train_script, "Stop", _Stop))
        stack.enter_context(mock.patch.object(_detectors, "_DETECTORS", tiny_train.SMALL))
        yield


class _Stop(train_script.Stop):
    """Installs no signal handlers, so that those of the tests stay."""

    def __init__(self):
        with mock.patch.object(signal, "signal"):
            super().__init__()


@contextmanager
def limited():
    """Raises `TimeoutError` if the `with` block takes more than `SECONDS`."""

    def stop(number, frame):
        raise TimeoutError(f"more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refusal(call):
    """The message with which a script's `main` rejects its input, or `None` if it finishes. Other errors are raised."""
    try:
        with limited():
            call()
    except SystemExit as error:
        message = error.code
    except (ValueError, OSError) as error:
        if not (isinstance(error, OSError) or _shared.is_ours(error)) or isinstance(error, TimeoutError):
            raise
        message = str(error)
    else:
        return None
    assert isinstance(message, str) and message.strip(), f"refused without a word: {message!r}"
    assert len(message.splitlines()) <= LINES, message
    return message


def use(annotations, images, folder):
    """Trains two steps with the file as training and validation data, then evaluates, reports and inspects.

    Returns whether the file was rejected; only the first script may reject it, before its first step.
    """
    size = {"min_sizes": (64,), "max_size": 64, "canvases": (CANVAS,), "anchor_sizes": (8, 16, 32, 48, 64)}
    paths: dict[str, Any] = {
        "train_annotations": str(annotations),
        "train_images": str(images),
        "val_annotations": str(annotations),
    }
    options = _options.grouped(
        **paths, **size, output=folder / "run", model="faster_rcnn_resnet18_fpn", norm="group",
        batch_size=jax.device_count(), steps=2, warmup_steps=0, max_objects=20, threads=1,
    )  # fmt: skip
    before = SharedStep.made
    if refusal(lambda: train_script.main(options)) is not None:
        assert SharedStep.made == before, "refused after the first step"
        return True
    paths = {"annotations": str(annotations), "images": str(images)}
    detector = _shared.DetectorOptions(checkpoint=folder / "run")
    evaluation = evaluate_script.Options(**paths, output=folder / "test", report=True, detector=detector)
    inspection = inspect_script.Options(
        annotations=annotations, images=images, output=folder / "data", min_size=64, max_size=64, canvases=(CANVAS,)
    )
    for call in (lambda: evaluate_script.main(evaluation), lambda: inspect_script.main(inspection)):
        refused = refusal(call)
        assert refused is None, f"trained on, and then refused: {refused}"
    assert (folder / "test" / "report.html").stat().st_size > 1000
    return False


def cases(count):
    """The short form, and the long form of `count` cases."""
    return [
        pytest.param(30, id="some", marks=[pytest.mark.slow]),
        pytest.param(count, id="all", marks=[pytest.mark.long]),
    ]


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("count", cases(500))
def test_datasets_are_refused_at_the_start_or_used_to_the_end(sources, tmp_path, count, tally):
    outcomes = Counter()
    with tiny(most=1 if count < 100 else count):
        for seed in range(count):
            content, images = sources[seed % len(sources)]
            changed, changes = mutate(content, np.random.default_rng(seed), PARTS)
            folder = tmp_path / str(seed)
            folder.mkdir()
            (folder / "annotations.json").write_text(json.dumps(changed))
            try:
                outcomes[use(folder / "annotations.json", images, folder)] += 1
            except BaseException as error:
                error.add_note(f"seed {seed}: {'; '.join(changes)}")
                raise
    assert outcomes[True] > count / 10 and outcomes[False] > count / 10, outcomes
    tally(
        "generated datasets: train, evaluate, report, inspect", count, count, f"{outcomes[True]} refused at the start"
    )


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("count", cases(500))
def test_results_are_refused_in_one_message_or_scored(sources, tmp_path, count, tally):
    outcomes = Counter()
    for seed in range(count):
        content, images = sources[seed % len(sources)]
        rng = np.random.default_rng(seed)
        results = [
            {key: one[key] for key in ("image_id", "category_id", "bbox", "segmentation") if one.get(key)}
            | {"score": float(rng.random())}
            for one in content["annotations"]
            if not one.get("iscrowd")
        ]
        changed, changes = mutate(results, rng, None)
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "annotations.json").write_text(json.dumps(content))
        (folder / "results.json").write_text(json.dumps(changed))
        options = evaluate_script.Options(
            annotations=str(folder / "annotations.json"), images=str(images), output=folder / "out", report=True,
            detections=folder / "results.json",
        )  # fmt: skip
        try:
            message = refusal(lambda options=options: evaluate_script.main(options))
            assert message is None or "results.json" in message, message
        except BaseException as error:
            error.add_note(f"seed {seed}: {'; '.join(changes)}")
            raise
        outcomes[message is not None] += 1
    assert outcomes[True] > count / 10 and outcomes[False] > count / 10, outcomes
    tally("generated results: evaluate and report", count, count, f"{outcomes[True]} refused in one message")
