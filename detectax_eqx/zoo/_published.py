"""Published weights, by the name of their detector."""

from rich.console import Console

from ..models import AbstractDetector
from ._download import download
from ._published_rows import PUBLISHED, Published


# Licences that extend to what is made from the weights, and where to read them.
_SHARE_ALIKE = {"CC-BY-SA-3.0": "https://creativecommons.org/licenses/by-sa/3.0/"}


def published_names() -> tuple[str, ...]:
    """The names of published weights, which are those of their detectors. One detector may have several.

    >>> published_names()[:2]
    ('faster_rcnn_resnet50_fpn', 'mask_rcnn_resnet50_fpn')
    """
    return tuple(PUBLISHED)


def published(name: str) -> Published:
    """The published weights of a detector.

    Raises a `ValueError` that lists the detectors with published weights if this one has none.

    >>> weights = published("mask_rcnn_resnet50_fpn")
    >>> weights.file, weights.box_ap, weights.mask_ap
    ('maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth', 37.9, 34.6)
    """
    if name not in PUBLISHED:
        raise ValueError(f"There are no published weights for {name!r}; choose one of {', '.join(PUBLISHED)}.")
    return PUBLISHED[name]


def pretrained(name: str) -> AbstractDetector:
    """Builds the detector with its published weights, which are downloaded to a cache folder once and verified.

    The folder is `weights` in `DETECTAX_HOME`, by default `~/.cache/detectax_eqx`. `DETECTAX_MIRRORS` lists URLs of
    folders, separated by spaces, that are tried first.

    Raises a `ValueError` for a detector without published weights. If the download fails, raises a `ConnectionError`
    that names the file and the path at which to put it.
    """
    weights = published(name)
    path = download(weights.url, file=weights.file, sha256=weights.sha256, md5=weights.md5)
    model = weights.load(weights.architecture.shapes(len(weights.categories)), path)
    announce(weights)
    return model


def announce(weights: Published) -> None:
    """Prints the licence of weights if it extends to what is made from them."""
    if weights.licence in _SHARE_ALIKE:
        Console(stderr=True).print(
            f"{weights.file} of {weights.source} is licensed under {weights.licence}. Weights that are converted or "
            f"fine-tuned from it have the same licence: {_SHARE_ALIKE[weights.licence]}",
            highlight=False,
        )


def published_file(name: str, file: str) -> Published | None:
    """The published weights of a detector in a file of this name, if there are any."""
    rows = (row for row in PUBLISHED.values() if row.architecture.name == name and row.file == file)
    return next(rows, None)
