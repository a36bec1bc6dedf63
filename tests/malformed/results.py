"""Files of results: every field with every wrong value, and damaged text, in each way of reading results."""

import json
import math
import sys
from unittest import mock

import numpy as np
from PIL import Image

from detectax_eqx import evaluate
from detectax_eqx.data import load_coco

from .. import tiny_train
from . import Case, annotations, damage
from .annotations import HEIGHT, VALUES, WIDTH, put


FIELDS = [
    *[(i, field) for i in range(4) for field in ("image_id", "category_id", "bbox", "score", "segmentation")],
    *[(0, "bbox", i) for i in range(4)],
    *[(0, "segmentation", 0), (0, "segmentation", 0, 0), (0, "segmentation", 0, 5)],
    *[(i, "segmentation", field) for i in (1, 2) for field in ("size", "counts")],
    (2, "segmentation", "size", 0),
    (2, "segmentation", "counts", 1),
    (0,),
]


def content():
    """A result per object: masks as a polygon, as compressed run lengths, as a list, and one that fills its image."""
    objects = annotations.content()["annotations"]
    keys = ("image_id", "category_id", "bbox", "segmentation")
    results = [{key: each[key] for key in keys} | {"score": 0.9 - i / 10} for i, each in enumerate(objects[:3])]
    whole = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}
    last = {"image_id": 5, "category_id": 40, "bbox": [10.5, 0, 9.5, 10], "score": 0.5, "segmentation": whole}
    return [*results, last]


def make(text, folder):
    """Writes annotations and results; the returned call reads, evaluates and analyses them, and runs evaluate.py."""
    (folder / "images").mkdir()
    for id in (7, 3, 5):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / f"{id}.png")
    truth = annotations.content()
    truth["annotations"][-1]["segmentation"] = [[10.5, 0, 20, 0, 20, 10, 10.5, 10]]
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "detections.json").write_bytes(text)
    return lambda: call(folder, text)


def call(folder, text):
    dataset = load_coco(folder / "truth.json", folder / "images")
    try:
        results = json.loads(text)
    except (ValueError, RecursionError):
        results = None
    refusals = []
    if isinstance(results, list):
        functions = (evaluate.evaluate_coco, evaluate.analyze_errors)
        refusals = [
            refusal(function, dataset, results, iou_type=kind) for function in functions for kind in ("bbox", "segm")
        ]
    read_error = refusal(evaluate.read_results, folder / "detections.json")
    assert read_error is None or "detections.json" in read_error
    try:
        run_script(folder)
    except SystemExit as error:
        message = str(error)
        assert "\n" not in message and (read_error is None or read_error in message)
        # The script rejects what either kind of evaluation rejects, unless it leaves that kind out.
        assert read_error is not None or set(refusals) & {line for line in refusals if line and line in message}
        raise
    assert read_error is None and not any(refusals[::2]), refusals
    return json.loads((folder / "out" / "metrics.json").read_text())


def refusal(function, *arguments, **options):
    """The one-line message with which a function rejects its arguments, or `None`."""
    try:
        function(*arguments, **options)
    except ValueError as error:
        message = str(error)
        assert message and "\n" not in message, message
        return message
    return None


def run_script(folder):
    import evaluate as script

    words = ["--annotations", folder / "truth.json", "--images", folder / "images", "--output", folder / "out"]
    words += ["--detections", folder / "detections.json", "--report"]
    with mock.patch.object(sys, "argv", ["evaluate.py", *map(str, words)]):
        tiny_train._shared.run(script.main, script.Options, None)


def check(metrics):
    for kind in metrics.values():
        assert all(number == -1 or 0 <= number <= 1 for number in kind["numbers"].values())
        assert all(math.isfinite(entry["ap"]) for entry in kind["per_class"])
    return "harmless"


def cases():
    for path in FIELDS:
        for what, value in VALUES.items():
            if path == (0,) and what == "missing":
                continue
            changed = content()
            put(changed, path, value)
            image = {0: 7, 1: 7, 2: 3, 3: 5}[path[0]]
            place = f"results[{path[0]}]" + (f" on image {image}" if len(path) > 1 and path[1] != "image_id" else "")
            yield Case(
                f"results: {'.'.join(map(str, path))} is {what}",
                lambda folder, changed=changed: make(json.dumps(changed).encode(), folder),
                ("detections.json", place if len(path) > 1 else "detections.json"),
                check,
            )
    yield from wrong_masks()
    text = json.dumps(content()).encode()
    damaged = dict(damage(text, np.random.default_rng(0), flips=30, cuts=6))
    damaged |= {
        "UTF-16": text.decode().encode("utf-16"),
        "null": b"null",
        "an object": b'{"annotations": ' + text + b"}",
        "a list of lists": b"[" + text + b"]",
        "deep nesting": b"[" * 100_000,
        "deep nesting, closed": b"[" * 100_000 + b"]" * 100_000,
        "two documents": text + text,
    }
    for what, changed in damaged.items():
        yield Case(
            f"results: {what}", lambda folder, changed=changed: make(changed, folder), ("detections.json",), check
        )


def wrong_masks():
    """Run lengths with a wrong sum, and other masks that C code would misread."""
    size = [HEIGHT, WIDTH]
    masks = {
        "one pixel too many": {"size": size, "counts": [10, HEIGHT * WIDTH - 9]},
        "one pixel too few": {"size": size, "counts": [10, HEIGHT * WIDTH - 11]},
        "a negative run": {"size": size, "counts": [HEIGHT * WIDTH + 10, -10]},
        "garbage": {"size": size, "counts": "garbage!"},
        "a cut text": {"size": size, "counts": "P"},
        "a text that is too short": {"size": size, "counts": "52203"},
        "half a surrogate": {"size": size, "counts": "\ud800"},
        "another image's size": {"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]},
        "a polygon of odd length": [[5, 6, 8, 6, 8, 9, 5]],
        "a polygon of two points": [[5, 6, 8, 6]],
        "a flat polygon": [5, 6, 8, 6, 8, 9],
        "a polygon to the moon": [[0, 0, 9e8, 0, 9e8, 9e8]],
    }
    for what, mask in masks.items():
        for row in (0, 2):
            changed = content()
            changed[row]["segmentation"] = mask
            yield Case(
                f"results: a mask with {what}",
                lambda folder, changed=changed: make(json.dumps(changed).encode(), folder),
                ("detections.json", f"results[{row}] on image {changed[row]['image_id']}"),
            )
