"""Published weights, by the name of their detector."""

from dataclasses import dataclass

from ..data import Category
from ..models import AbstractDetector
from ..weights import load_torchvision
from ._architecture import Architecture, NormName
from ._coco import COCO_IDS, KEYPOINTS, SKELETON
from ._download import download


@dataclass(frozen=True)
class Published:
    """A weights file that a library published, with the published figures.

    - `name`: the name of the detector in `zoo.names()`. `source`: the library that published the weights. `licence`:
      its licence. `url`: the URL of the file.
    - `sha256`: the beginning of the file's checksum, as given in its name. `megabytes`: its size.
    - `box_ap`, `mask_ap`, `keypoint_ap`: AP@[.5:.95] on COCO val2017 as published, the last of persons over OKS; `None`
      for detectors without masks or keypoints.
    - `architecture`, `categories`: those of the training. Ids that are not classes in COCO are named `N/A`.
    """

    name: str
    source: str
    licence: str
    url: str
    sha256: str
    megabytes: float
    box_ap: float
    mask_ap: float | None
    architecture: Architecture
    categories: tuple[Category, ...]
    keypoint_ap: float | None = None

    @property
    def file(self) -> str:
        """The file's name."""
        return self.url.rpartition("/")[2]


def published_names() -> tuple[str, ...]:
    """The detectors with published weights.

    >>> published_names()[:2]
    ('faster_rcnn_resnet50_fpn', 'mask_rcnn_resnet50_fpn')
    """
    return tuple(_PUBLISHED)


def published(name: str) -> Published:
    """The published weights of a detector.

    Raises a `ValueError` that lists the detectors with published weights if this one has none.

    >>> weights = published("mask_rcnn_resnet50_fpn")
    >>> weights.file, weights.box_ap, weights.mask_ap
    ('maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth', 37.9, 34.6)
    """
    if name not in _PUBLISHED:
        raise ValueError(f"There are no published weights for {name!r}; choose one of {', '.join(_PUBLISHED)}.")
    return _PUBLISHED[name]


def pretrained(name: str) -> AbstractDetector:
    """Builds the detector with its published weights, which are downloaded to a cache folder once and verified.

    The folder is `weights` in `DETECTAX_HOME`, by default `~/.cache/detectax_eqx`. `DETECTAX_MIRRORS` lists URLs of
    folders, separated by spaces, that are tried first.

    Raises a `ValueError` for a detector without published weights. If the download fails, raises a `ConnectionError`
    that names the file and the path at which to put it.
    """
    weights = published(name)
    path = download(weights.url, sha256=weights.sha256)
    return load_torchvision(weights.architecture.shapes(len(weights.categories)), path)


def _torchvision(
    name: str,
    file: str,
    megabytes: float,
    box_ap: float,
    mask_ap: float | None = None,
    *,
    norm: NormName = "frozen_batch",
    background: bool = True,
    keypoint_ap: float | None = None,
) -> Published:
    """Published weights, with the metadata of torchvision 0.27.1. `background`: if label 0 is category id 1, not 0."""
    first = 1 if background else 0  # torchvision's dense detectors have an unused output for the background
    categories = tuple(Category(id, COCO_IDS.get(id, "N/A")) for id in range(first, 91))
    if keypoint_ap is not None:  # a detector of persons alone
        categories = (Category(1, COCO_IDS[1], KEYPOINTS, SKELETON),)
    return Published(
        name=name,
        source="torchvision",
        licence="BSD-3-Clause",
        url=f"https://download.pytorch.org/models/{file}.pth",
        sha256=file.rpartition("-")[2],
        megabytes=megabytes,
        box_ap=box_ap,
        mask_ap=mask_ap,
        architecture=Architecture(name, norm),
        categories=categories,
        keypoint_ap=keypoint_ap,
    )


_PUBLISHED: dict[str, Published] = {
    weights.name: weights
    for weights in (
        _torchvision(
            "faster_rcnn_resnet50_fpn",
            "fasterrcnn_resnet50_fpn_coco-258fb6c6",
            159.743,
            37.0,
            norm="frozen_batch_eps0",
        ),
        _torchvision(
            "mask_rcnn_resnet50_fpn",
            "maskrcnn_resnet50_fpn_coco-bf2d0c1e",
            169.84,
            37.9,
            34.6,
            norm="frozen_batch_eps0",
        ),
        _torchvision("faster_rcnn_resnet50_fpn_v2", "fasterrcnn_resnet50_fpn_v2_coco-dd69338a", 167.104, 46.7),
        _torchvision("faster_rcnn_mobilenet_v3_large_fpn", "fasterrcnn_mobilenet_v3_large_fpn-fb6a3cc7", 74.239, 32.8),
        _torchvision(
            "faster_rcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn-907ea3f9", 74.239, 22.8
        ),
        _torchvision("mask_rcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn_v2_coco-73cbd019", 177.219, 47.4, 41.8),
        _torchvision(
            "keypoint_rcnn_resnet50_fpn",
            "keypointrcnn_resnet50_fpn_coco-fc266e95",
            226.054,
            54.6,
            norm="frozen_batch_eps0",
            keypoint_ap=65.0,
        ),
        _torchvision(
            "retinanet_resnet50_fpn",
            "retinanet_resnet50_fpn_coco-eeacb38b",
            130.267,
            36.4,
            norm="frozen_batch_eps0",
            background=False,
        ),
        _torchvision(
            "retinanet_resnet50_fpn_v2", "retinanet_resnet50_fpn_v2_coco-5905b1c5", 146.037, 41.5, background=False
        ),
        _torchvision("fcos_resnet50_fpn", "fcos_resnet50_fpn_coco-99b0c9b7", 123.608, 39.2, background=False),
        _torchvision("ssd300_vgg16", "ssd300_vgg16_coco-b556d3b4", 135.988, 25.1),
        _torchvision("ssdlite320_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large_coco-a79551df", 13.418, 21.3),
    )
}
