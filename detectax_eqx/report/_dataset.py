"""The page of a dataset: its contents, the fit of anchors and canvases, and suspicious annotations."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import data
from ._inspection import Suspicion
from ._page import file_name, write_page
from ._picture import Picture, class_entries


# Suspicious annotations that are shown: the maximum number per kind, and the maximum size of all images in bytes.
PICTURES_OF_KIND, IMAGE_BYTES = 24, 14 * 2**20


def write_dataset_page(
    path: Path,
    dataset: data.CocoDataset,
    tables: Sequence[Mapping[str, Any]],
    suspicions: Sequence[Suspicion],
) -> None:
    """Writes the page, with the given tables and with pictures of the suspicious annotations.

    - `tables`: each has `title`, `note`, `columns` and `rows` of text. `bars` is the index of the column (if any) whose
      percentages are drawn as bars.
    """
    content = {
        "title": f"Dataset: {file_name(dataset.annotations_path)}",
        "subtitle": f"{len(dataset):,} images, {dataset.num_classes} classes; {dataset.report}",
        "tables": tables,
        "classes": class_entries(dataset),
        "counts": dict(Counter(suspicion.kind for suspicion in suspicions)),
        "suspicions": pictures(dataset, suspicions),
    }
    write_page(path, title=content["title"], body="dataset.html", scripts=("charts.js", "dataset.js"), data=content)


def pictures(dataset: data.CocoDataset, suspicions: Sequence[Suspicion]) -> list[dict[str, Any]]:
    """The first suspicious annotations of each kind, with thumbnails of their images."""
    entries, size, taken = [], 0, Counter()
    for suspicion in suspicions:
        taken[suspicion.kind] += 1
        if taken[suspicion.kind] > PICTURES_OF_KIND or size > IMAGE_BYTES:
            continue
        picture, objects = Picture(dataset.images[suspicion.image]), dataset.objects(suspicion.image)
        entries.append(
            {
                **picture.entry,
                "kind": suspicion.kind,
                "what": suspicion.what,
                "annotation": objects.annotation_ids[suspicion.row],
                "objects": [
                    {
                        "k": int(objects.labels[row]),
                        "box": picture.box(objects.boxes[row]),
                        "crowd": bool(objects.crowd[row]),
                        "suspicious": row == suspicion.row,
                        "mask": picture.mask(objects.segmentations[row]) if row == suspicion.row else None,
                    }
                    for row in range(len(objects.boxes))
                ],
            }
        )
        size += len(picture.entry["src"])
    return entries
