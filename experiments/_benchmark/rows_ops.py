"""The rows of single operators."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from . import inputs
from .agreement import Disagreement, require_close
from .bench import Bench, Rows
from .inputs import IMAGE_SIZE, NUM_CLASSES, clustered_boxes, photograph, pyramid, random_boxes, scored
from .worker import Arrays


def ops(bench: Bench) -> Rows:
    """Returns the rows of operators on an 800×1216 image, or on smaller inputs in a quick run."""
    rows: Rows = {}

    def row(name: str, case: str, draw: Callable[[Any], Arrays], agree=require_close, /, **options: Any) -> None:
        rows[(name,)] = partial(_measure, bench, case, draw, agree, options)

    quick, size = bench.quick, IMAGE_SIZE
    for n in (1000,) if quick else (1000, 10_000):
        row(f"nms, {n:,} boxes, spread", "nms", lambda rng, n=n: scored(rng, random_boxes(rng, n)), _same_kept)
        row(
            f"nms, {n:,} boxes, in clusters", "nms",
            lambda rng, n=n: scored(rng, clustered_boxes(rng, n, objects=n // 5)), _same_kept,
        )  # fmt: skip
    channels, proposals, sampled = (64, 200, 64) if quick else (256, 1000, 512)
    row(
        f"class-aware nms, {proposals:,} proposals × {NUM_CLASSES} classes", "box_selection",
        lambda rng: inputs.class_boxes(rng, proposals), _same_selection,
    )  # fmt: skip
    row(
        f"multi-level RoIAlign, {proposals:,}×{channels}×7×7", "roi_align",
        lambda rng: {"maps": pyramid(rng, channels), "boxes": random_boxes(rng, proposals)},
    )  # fmt: skip
    row(
        f"multi-level RoIAlign, {sampled}×{channels}×7×7, forward + backward", "roi_align_gradient",
        lambda rng: {
            "cotangent": rng.standard_normal((sampled, channels, 7, 7), np.float32),
            "maps": pyramid(rng, channels),
            "boxes": random_boxes(rng, sampled),
        },
    )  # fmt: skip
    pasted = 20 if quick else 100
    name = f"mask paste, {pasted} onto {size[0]}×{size[1]}"

    def masks(rng: np.random.Generator) -> Arrays:
        return {"masks": rng.random((pasted, 28, 28), np.float32), "boxes": random_boxes(rng, pasted)}

    row(name, "paste_masks", masks, image_size=size)
    row(f"{name}, ours in the memory of its last result", "redraw_masks", masks, image_size=size)
    row(f"{name}, whether above .5", "paste_masks", masks, _same_pixels, image_size=size, threshold=0.5)
    row("mask targets of 128 proposals, 28×28", "mask_targets", inputs.mask_targets, _similar_targets)
    anchors = 25_000 if quick else 250_000
    row(f"pairwise IoU, 100 × {anchors:,}", "pairwise_iou", partial(inputs.objects_and_anchors, anchors=anchors))
    row(
        f"decode {anchors:,} boxes", "decode_boxes",
        lambda rng: {
            "deltas": rng.normal(0, 0.5, (anchors, 4)).astype(np.float32), "anchors": random_boxes(rng, anchors)
        },
    )  # fmt: skip
    row(
        f"match {anchors:,} anchors with 100 objects", "match_boxes",
        lambda rng: {"iou": inputs.overlaps(**inputs.objects_and_anchors(rng, anchors=anchors))}, _same_matches,
    )  # fmt: skip

    def picture(rng: np.random.Generator) -> Arrays:
        image = photograph(rng, (480, 640)).astype(np.float32)
        planes, sizes = (
            np.ascontiguousarray(np.moveaxis(image, -1, 0)[None]),
            np.array([(480, 640), (800, 1066)], np.int32),
        )
        return {"image": image, "planes": planes, "sizes": sizes}

    row(
        "resize, 480×640 to 800×1066", "resize", picture,
        lambda ours, theirs: require_close(ours, {"image": np.moveaxis(theirs["image"][0], 0, -1)}),
        canvas=(800, 1066),
    )  # fmt: skip
    body, (height, width) = ("resnet18", (320, 480)) if quick else ("resnet50", size)
    model = f"faster_rcnn_{body}_fpn"
    net = {"name": model, "weights": bench.weights(model)}
    row(
        f"backbone + FPN, {body}, {height}×{width}", "backbone",
        lambda rng: {"images": rng.standard_normal((1, 3, height, width), np.float32)}, **net, backward=False,
    )  # fmt: skip
    if not quick:  # it takes long to compile
        row(
            f"backbone + FPN, {body}, 2 × 320×480, forward + backward", "backbone",
            lambda rng: {"images": rng.standard_normal((2, 3, 320, 480), np.float32)},
            partial(require_close, atol=5e-3, in_norm=True), **net, backward=True,
        )  # fmt: skip
    return rows


def _measure(bench: Bench, case: str, draw: Callable[..., Arrays], agree: Any, options: dict[str, Any]) -> tuple:
    with bench.pair(fresh=False) as pair:
        bench.prepare(pair, case, draw(np.random.default_rng(0)), options, agree)
        compared = bench.compare(pair)
    return compared.ours * 1e3, compared.theirs and compared.theirs * 1e3, *compared.cells


def _same_kept(ours: Arrays, theirs: Arrays) -> None:
    require_close({"keep": np.flatnonzero(ours["keep"])}, {"keep": np.sort(theirs["keep"])})


def _same_selection(ours: Arrays, theirs: Arrays) -> None:
    require_close({name: ours[name][ours["valid"]] for name in theirs}, theirs)


def _same_matches(ours: Arrays, theirs: Arrays) -> None:
    """In torchvision, -1 is background and -2 marks anchors that are neither positive nor negative."""
    unmatched = np.where(ours["negative"], -1, -2)
    require_close({"matches": np.where(ours["positive"], ours["indices"], unmatched)}, theirs)


def _similar_targets(ours: Arrays, theirs: Arrays) -> None:
    """Our targets are cropped from 112×112 masks in box frames, torchvision's from masks of the whole image."""
    difference = float(np.abs(ours["targets"] - theirs["targets"]).mean())
    if not difference < 0.02:
        raise Disagreement(f"targets differ from torchvision's by {difference:.3f} on average")


def _same_pixels(ours: Arrays, theirs: Arrays) -> None:
    differing = int((ours["pasted"] != theirs["pasted"]).sum())
    if differing > 1e-6 * theirs["pasted"].size:
        raise Disagreement(f"{differing} pixels differ from torchvision's, more than one in a million")
