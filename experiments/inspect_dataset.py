"""Inspects a dataset in COCO format before training on it.

    python experiments/inspect_dataset.py --annotations train.json --images train/ --output runs/dataset

Prints its contents, how well anchors fit its boxes and canvases its images, and which annotations look wrong.
`--output` receives the same as `dataset.html`, a self-contained page with pictures.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from _shared import ANCHOR_SIZES, ASPECT_RATIOS, check_ranges, console, run
from rich.table import Table

from detectax_eqx import data, report


@dataclass
class Options:
    """Options of an inspection."""

    annotations: str
    """COCO JSON of the images: a path or a URL (http, https, gs, s3)."""
    images: str
    """Folder that file names in it refer to: a path or a URL."""
    box_format: data.BoxFormat = "xywh"
    """Format of "bbox" in the annotations. xywh is COCO's; normalized: fractions of the image's sides."""
    output: Path | None = None
    """Folder for dataset.html. Default: print only."""
    min_size: int = 800
    """Short side in pixels to resize images to."""
    max_size: int = 1333
    """Longest side in pixels after resizing; takes precedence over --min-size."""
    canvases: tuple[tuple[int, int], ...] = ((800, 1344), (1344, 800), (1088, 1088))
    """Heights and widths in pixels that images are padded to, as for train.py."""
    anchor_sizes: tuple[float, ...] = ANCHOR_SIZES
    """Side in pixels of the square anchor per level, after resizing."""
    aspect_ratios: tuple[float, ...] = ASPECT_RATIOS
    """Height / width of the anchors."""

    RANGES: ClassVar[dict[str, str]] = {
        "positive": "min_size max_size anchor_sizes aspect_ratios",
        "a positive multiple of 32": "canvases",
    }


# Borders of the size classes, as the square root of a box's area after resizing, in pixels.
SIZE_BORDERS = (0, 16, 32, 64, 128, 256, 512, np.inf)
RATIO_BORDERS = (0, 0.2, 0.33, 0.5, 0.75, 1.33, 2, 3, 5, np.inf)


def main(options: Options) -> None:
    """Measures, prints, and writes the page."""
    check_ranges(options)
    if len(options.anchor_sizes) != len(report.STRIDES):
        raise SystemExit(
            f"--anchor-sizes needs {len(report.STRIDES)} numbers, one per level, got {len(options.anchor_sizes)}."
        )
    dataset = data.load_coco(options.annotations, options.images, box_format=options.box_format)
    tables = [contents(dataset), classes(dataset), *boxes(dataset, options), canvases(dataset, options)]
    suspicions = report.find_suspicions(dataset)
    counts = Counter(suspicion.kind for suspicion in suspicions)
    rows = [[kind, f"{count:,}"] for kind, count in [*counts.most_common(), *dataset.report.counts.items()]]
    tables.append(
        {
            "title": "Suspicious annotations",
            "note": "Possible mistakes, and repairs made while reading." if rows else "None were found.",
            "columns": ["what", "annotations"],
            "rows": rows,
        }
    )
    for table in tables:
        print_table(table)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        report.write_dataset_page(options.output / "dataset.html", dataset, tables, suspicions)
        console.print(f"{options.output / 'dataset.html'} opens in any browser", highlight=False, soft_wrap=True)


def contents(dataset: data.CocoDataset) -> dict[str, Any]:
    """Counts over the whole dataset."""
    objects = [dataset.objects(index) for index in range(len(dataset))]
    counts = np.array([int((~part.crowd).sum()) for part in objects])
    sizes = np.array(dataset.sizes)
    low, high = sizes.min(axis=0), sizes.max(axis=0)
    with_masks = sum(segmentation is not None for part in objects for segmentation in part.segmentations)
    rows = [
        ("images", f"{len(dataset):,}"),
        ("images without an object", f"{int((counts == 0).sum()):,}"),
        ("objects", f"{counts.sum():,}"),
        ("objects per image, mean and maximum", f"{counts.mean():.1f}, {counts.max()}"),
        ("crowds", f"{sum(int(part.crowd.sum()) for part in objects):,}"),
        ("annotations with a segmentation", f"{with_masks:,}"),
        ("height of images, pixels", f"{low[0]}–{high[0]}"),
        ("width of images, pixels", f"{low[1]}–{high[1]}"),
    ]
    return {"title": "Contents", "note": str(dataset.report), "columns": ["", ""], "rows": [[*row] for row in rows]}


def classes(dataset: data.CocoDataset) -> dict[str, Any]:
    """Objects and images of each class, the most frequent first."""
    counts, images = np.zeros(dataset.num_classes, int), np.zeros(dataset.num_classes, int)
    for index in range(len(dataset)):
        objects = dataset.objects(index)
        labels = objects.labels[~objects.crowd]
        counts += np.bincount(labels, minlength=dataset.num_classes)
        images[np.unique(labels)] += 1
    present = counts[counts > 0]
    ratio = (
        f"The most frequent has {present.max() / present.min():.1f} times the objects of the rarest."
        if len(present)
        else ""
    )
    absent = int((counts == 0).sum())
    note = ratio + (f" {absent} have none." if absent else "")
    rows = [
        [dataset.categories[k].name, f"{counts[k]:,}", percent(int(counts[k]), int(counts.sum())), f"{images[k]:,}"]
        for k in np.argsort(-counts, kind="stable")
    ]
    columns = ["class", "objects", "share", "images"]
    return {"title": "Classes", "note": note, "columns": columns, "rows": rows, "bars": 2}


def boxes(dataset: data.CocoDataset, options: Options) -> list[dict[str, Any]]:
    """Sizes and shapes of the boxes after resizing, and how well anchors cover them."""
    resized = report.resized_boxes(dataset, min_size=options.min_size, max_size=options.max_size)
    best = report.best_anchor_iou(
        resized, sizes=[(size,) for size in options.anchor_sizes], aspect_ratios=options.aspect_ratios
    )
    width, height = (resized[:, 2:] - resized[:, :2]).T
    total = max(1, len(resized))
    well, badly = float((best >= 0.7).mean() if len(best) else 0), int((best < 0.5).sum())
    note = (
        f"Images resized to a short side of {options.min_size}, at most {options.max_size} pixels. An anchor matches "
        f"{well:.1%} of the boxes at IoU .7; none does at .5 for {badly:,} ({badly / total:.1%}). "
        "Each box is assigned its best anchor in any case."
    )
    columns = ["boxes", "share", "best anchor ≥ .7", ".5 to .7", "below .5"]
    tables = []
    for title, values, borders, unit in (
        ("Size of boxes against anchors", np.sqrt(width * height), SIZE_BORDERS, "√area, pixels"),
        ("Shape of boxes against anchors", height / np.maximum(width, 1e-9), RATIO_BORDERS, "height / width"),
    ):
        rows = []
        for low, high in itertools.pairwise(borders):
            inside = (values >= low) & (values < high)
            ious = best[inside]
            matched = [(ious >= 0.7).sum(), ((ious >= 0.5) & (ious < 0.7)).sum(), (ious < 0.5).sum()]
            name = f"{low:g}–{high:g}" if np.isfinite(high) else f"{low:g} and more"
            rows.append(
                [name, f"{inside.sum():,}", percent(inside.sum(), total), *(percent(m, len(ious)) for m in matched)]
            )
        tables.append(
            {"title": title, "note": note if not tables else "", "columns": [unit, *columns], "rows": rows, "bars": 2}
        )
    labels = report.labels_of(dataset)
    rows = []
    for k, category in enumerate(dataset.categories):
        ious = best[labels == k]
        if len(ious):
            rows.append(
                [
                    category.name,
                    f"{np.median(ious):.2f}",
                    percent((ious >= 0.7).sum(), len(ious)),
                    percent((ious < 0.5).sum(), len(ious)),
                ]
            )
    rows.sort(key=lambda row: float(row[1]))
    columns = ["class", "median of best IoU", "≥ .7", "below .5"]
    note = "The worst covered first."
    tables.append({"title": "Anchors by class", "note": note, "columns": columns, "rows": rows, "bars": 2})
    return tables


def canvases(dataset: data.CocoDataset, options: Options) -> dict[str, Any]:
    """How images fill the canvases, and proposed canvases with less padding."""
    resize = {"min_size": options.min_size, "max_size": options.max_size}
    given = report.bucket_use(dataset.sizes, canvases=options.canvases, **resize)
    proposed = report.propose_canvases(dataset.sizes, count=len(options.canvases), **resize)
    better = report.bucket_use(dataset.sizes, canvases=proposed, **resize)
    before, after = report.padding_share(given), report.padding_share(better)
    words = " ".join(f"{height} {width}" for height, width in proposed)
    shrunk = sum(use.shrunk for use in given)
    note = f"{before:.1%} of the canvases' area is padding"
    note += f", and {shrunk:,} images are shrunk to fit. " if shrunk else ". "
    if after < before or shrunk:
        note += f"With --canvases {words} it would be {after:.1%}, and no image would be shrunk."
    else:
        note += "No better canvases were found."
    rows = [
        [name, f"{use.canvas[0]}×{use.canvas[1]}", f"{use.images:,}", f"{use.shrunk:,}", f"{use.padding:.1%}"]
        for name, uses in (("given", given), ("proposed", better))
        for use in uses
    ]
    columns = ["canvases", "height × width", "images", "shrunk", "padding"]
    return {"title": "Images against canvases", "note": note, "columns": columns, "rows": rows, "bars": 4}


def percent(part: float, whole: float) -> str:
    """A share in per cent, or a dash if the whole is 0."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def print_table(table: dict[str, Any]) -> None:
    """Prints a table to the terminal, with its note below."""
    view = Table(title=table["title"], title_justify="left", caption=table["note"] or None, caption_justify="left")
    columns: Sequence[str] = table["columns"]
    for position, column in enumerate(columns):
        view.add_column(column, justify="left" if position == 0 else "right")
    for row in table["rows"]:
        view.add_row(*row)
    console.print(view, highlight=False)


if __name__ == "__main__":
    run(main, Options, __doc__)
