"""The page of a dataset: its contents, the fit of anchors and canvases, and suspicious annotations."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import data, draw
from ._inspection import Suspicion
from ._masks import mask_size, shrink_mask
from ._page import file_name, thumbnail, write_page


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
        "classes": [
            {"name": category.name, "color": "#{:02x}{:02x}{:02x}".format(*draw.class_color(k))}
            for k, category in enumerate(dataset.categories)
        ],
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
        image, objects = dataset.images[suspicion.image], dataset.objects(suspicion.image)
        source = image.height, image.width
        uri, shown = thumbnail(data.read_image(image.path, size=source))
        small, scale = mask_size(shown), np.array([shown[1] / source[1], shown[0] / source[0]] * 2)
        entries.append(
            {
                "kind": suspicion.kind,
                "what": suspicion.what,
                "name": file_name(image.path),
                "id": image.id,
                "annotation": objects.annotation_ids[suspicion.row],
                "src": uri,
                "width": shown[1],
                "height": shown[0],
                "mask_width": small[1],
                "mask_height": small[0],
                "objects": [
                    {
                        "k": int(objects.labels[row]),
                        "box": (objects.boxes[row] * scale).round(1).tolist(),
                        "crowd": bool(objects.crowd[row]),
                        "suspicious": row == suspicion.row,
                        "mask": shrink_mask(objects.segmentations[row], source, small)
                        if row == suspicion.row
                        else None,
                    }
                    for row in range(len(objects.boxes))
                ],
            }
        )
        size += len(uri)
    return entries
