"""Annotation files: every field with every wrong value, and damaged text."""

import copy
import json
import math

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from detectax_eqx.data import Loader, load_coco, make_buckets

from . import Case, damage


SIZE = HEIGHT, WIDTH = 10, 20
MISSING = object()
DEEP = [[[[[[[[[[]]]]]]]]]]
VALUES = {
    "missing": MISSING,
    "null": None,
    "text": "x",
    "empty text": "",
    "true": True,
    "0": 0,
    "-1": -1,
    "1.5": 1.5,
    "1e30": 1e30,
    "10^400": 10**400,
    "NaN": math.nan,
    "infinity": math.inf,
    "empty list": [],
    "nested lists": DEEP,
    "object": {"a": 1},
}
FIELDS = [
    *[("images", 0, field) for field in ("id", "file_name", "width", "height")],
    *[("annotations", 0, field) for field in ("id", "image_id", "category_id", "bbox", "area", "iscrowd")],
    *[("annotations", i, "segmentation") for i in (0, 1, 2)],
    *[("annotations", 0, "bbox", i) for i in range(4)],
    *[("annotations", 0, "segmentation", 0, i) for i in (0, 5)],
    *[("annotations", i, "segmentation", field) for i in (1, 2) for field in ("size", "counts")],
    ("annotations", 2, "segmentation", "size", 0),
    ("annotations", 2, "segmentation", "counts", 1),
    *[("annotations", 0, field) for field in ("keypoints", "num_keypoints")],
    *[("annotations", 0, "keypoints", i) for i in (0, 5)],
    *[("categories", 0, field) for field in ("id", "name", "keypoints", "skeleton")],
    ("categories", 0, "keypoints", 1),
    ("categories", 0, "skeleton", 0, 1),
    *[(part, 0) for part in ("images", "annotations", "categories")],
    *[(part,) for part in ("images", "annotations", "categories")],
]


def content():
    """Three images; objects with a polygon, run lengths or compressed run lengths, a crowd, and one with only a box."""
    mask = np.zeros(SIZE, np.uint8)
    mask[2:5, 3:9] = 1
    counts = coco_mask.encode(np.asfortranarray(mask))["counts"]
    assert isinstance(counts, bytes)
    compressed = {"size": list(SIZE), "counts": counts.decode()}
    runs = {"size": list(SIZE), "counts": [32, 3, 7, 3, 7, 3, 7, 3, 7, 3, 7, 3, 115]}
    polygon = [[2, 1, 8, 1, 8, 5, 2, 5]]
    objects = [
        {"image_id": 7, "category_id": 40, "bbox": [2, 1, 6, 4], "area": 24, "iscrowd": 0, "segmentation": polygon}
        | {"keypoints": [3, 2, 2, 7.5, 4, 1], "num_keypoints": 2},
        {"image_id": 7, "category_id": 2, "bbox": [3, 2, 6, 3], "segmentation": compressed},
        {"image_id": 3, "category_id": 2, "bbox": [3, 2, 6, 3], "segmentation": runs},
        {"image_id": 3, "category_id": 2, "bbox": [0, 0, 20, 10], "iscrowd": 1, "segmentation": runs},
        {"image_id": 5, "category_id": 40, "bbox": [10.5, 0, 9.5, 10]},
    ]
    return {
        "images": [{"id": id, "file_name": f"{id}.png", "width": WIDTH, "height": HEIGHT} for id in (7, 3, 5)],
        "annotations": [{"id": 11 + i, **fields} for i, fields in enumerate(objects)],
        "categories": [
            {"id": 40, "name": "cat", "keypoints": ["nose", "tail"], "skeleton": [[1, 2]]},
            {"id": 2, "name": "dog"},
        ],
    }


def make(text, folder):
    """Writes images and annotations; the returned call loads them, and reads every image with its objects."""
    (folder / "images").mkdir()
    for id in (7, 3, 5):
        Image.new("RGB", (WIDTH, HEIGHT), (id, id, id)).save(folder / "images" / f"{id}.png")
    (folder / "train.json").write_bytes(text)

    def load():
        dataset = load_coco(folder / "train.json", folder / "images")
        buckets = make_buckets(dataset.sizes, canvases=[(32, 32)], min_size=10, max_size=20)
        options = {"mask_size": None, "keypoints": dataset.num_keypoints > 0}
        loader = Loader(dataset, batch_size=3, buckets=buckets, shuffle=False, max_objects=4, **options)
        return dataset, loader.batch(0)

    return load


def check(result, untouched=()):
    """Checks that ids, labels, sizes and boxes are valid, and that untouched objects are unchanged."""
    dataset, batch = result
    known = {annotation["id"]: annotation for annotation in content()["annotations"]}
    ids = []
    for index, image in enumerate(dataset.images):
        objects = dataset.objects(index)
        assert (image.height, image.width) == SIZE and len(objects.boxes) == len(objects.labels)
        ids += objects.annotation_ids
        boxes = objects.boxes
        assert np.isfinite(boxes).all() and (boxes >= 0).all() and (boxes <= [WIDTH, HEIGHT] * 2).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert ((objects.labels >= 0) & (objects.labels < dataset.num_classes)).all()
        for id, box, label in zip(objects.annotation_ids, boxes, objects.labels, strict=True):
            if id in untouched:
                x, y, width, height = known[id]["bbox"]
                assert box.tolist() == [x, y, x + width, y + height] and image.id == known[id]["image_id"]
                assert dataset.category_ids[label] == known[id]["category_id"]
    assert len(ids) == len(set(ids)) and set(untouched) <= set(ids)
    assert batch.images.valid.all() and np.isfinite(batch.targets.boxes).all()
    keypoints = batch.targets.keypoints
    assert keypoints is None or (np.isfinite(keypoints).all() and np.isin(keypoints[..., 2], (0, 1, 2)).all())
    return "repaired" if dataset.report.counts else "harmless"


def cases():
    for path in FIELDS:
        for what, value in VALUES.items():
            changed = content()
            put(changed, path, value)
            touched = {11 + path[1]} if path[0] == "annotations" and len(path) > 1 else set()
            untouched = set() if path in (("annotations",),) else {11, 12, 13, 14, 15} - touched
            name = ".".join(map(str, path))
            yield Case(
                f"annotations: {name} is {what}",
                lambda folder, changed=changed: make(json.dumps(changed).encode(), folder),
                ("train.json", place(path)),
                lambda result, untouched=untouched: check(result, untouched),
            )
    for part in ("images", "annotations", "categories"):
        changed = content()
        changed[part].append(copy.deepcopy(changed[part][0]))
        yield Case(
            f"annotations: {part} has one twice",
            lambda folder, changed=changed: make(json.dumps(changed).encode(), folder),
            ("train.json", "duplicate"),
        )
    yield from texts()


def place(path):
    """How a message has to name the place of an error: by id, unless the id itself is wrong."""
    if len(path) < 3:
        return "train.json"
    if path[2] == "id":
        return "id"
    return {"images": "image 7", "annotations": f"annotation {11 + path[1]}", "categories": "categories[0]"}[path[0]]


def texts():
    """Damaged versions of the file's text."""
    text = json.dumps(content()).encode()
    rng = np.random.default_rng(0)
    damaged = dict(damage(text, rng, flips=40, cuts=8))
    damaged |= {
        "UTF-16": text.decode().encode("utf-16"),
        "a byte order mark": b"\xef\xbb\xbf" + text,
        "Latin-1": text.replace(b"cat", b"c\xe4t"),
        "a zero byte": text[:40] + b"\0" + text[40:],
        "null": b"null",
        "a list": b"[" + text + b"]",
        "a text": b'"annotations"',
        "deep nesting": b"[" * 100_000,
        "deep nesting, closed": b'{"images": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "a number of 100,000 digits": text.replace(b'"area": 24', b'"area": ' + b"9" * 100_000),
        "two documents": text + text,
        "a page of HTML": b"<html>404</html>",
    }
    for what, changed in damaged.items():
        yield Case(
            f"annotations: {what}", lambda folder, changed=changed: make(changed, folder), ("train.json",), check
        )


def put(tree, path, value):
    for key in path[:-1]:
        tree = tree[key]
    if value is not MISSING:
        tree[path[-1]] = copy.deepcopy(value)
    else:
        del tree[path[-1]]
