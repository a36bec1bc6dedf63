"""The table of published weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..data import Category
from ..models import AbstractDetector
from ..weights import load_detectron2, load_detr, load_rf_detr, load_torchvision
from ._architecture import Architecture, NormName
from ._coco import COCO_IDS, KEYPOINTS, SKELETON


@dataclass(frozen=True)
class Published:
    """A weights file that a library published, with the published figures.

    - `name`: the name of the detector in `zoo.names()`, with the training schedule appended if it is not the longest.
    - `source`: the library that published the weights. `licence`: its licence. `url`: the URL of the file.
    - `sha256`: the beginning of the file's checksum, as given in its name. `md5`: another checksum. Both are empty if
      none was published.
    - `file`: the file's name in the cache. `megabytes`: its size; `None` if it was not published.
    - `box_ap`, `mask_ap`, `keypoint_ap`: AP@[.5:.95] on COCO val2017 as published, the last of persons over OKS; `None`
      for detectors without masks or keypoints, or if it was not published.
    - `architecture`, `categories`: those of the training. Ids that are not classes in COCO are named `N/A`.
    - `load`: the function of `weights` that loads the file into a detector.
    """

    name: str
    source: str
    licence: str
    url: str
    file: str
    sha256: str
    megabytes: float | None
    box_ap: float | None
    mask_ap: float | None
    architecture: Architecture
    categories: tuple[Category, ...]
    load: Callable[[AbstractDetector, Path], AbstractDetector] = load_torchvision
    keypoint_ap: float | None = None
    md5: str = ""


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
    if keypoint_ap is not None:
        categories = _PERSONS
    return Published(
        name=name,
        source="torchvision",
        licence="BSD-3-Clause",
        url=f"https://download.pytorch.org/models/{file}.pth",
        file=f"{file}.pth",
        sha256=file.rpartition("-")[2],
        megabytes=megabytes,
        box_ap=box_ap,
        mask_ap=mask_ap,
        architecture=Architecture(name, norm),
        categories=categories,
        keypoint_ap=keypoint_ap,
    )


def _detectron2(
    name: str,
    path: str,
    megabytes: float,
    box_ap: float,
    mask_ap: float | None = None,
    *,
    keypoint_ap: float | None = None,
    schedule: str = "",
    suffix: str = "_detectron2",
) -> Published:
    """Published weights of `name` with Detectron2's rules, with the figures of its `MODEL_ZOO.md`."""
    name = f"{name}{suffix}"
    return Published(
        name=f"{name}{schedule}",
        source="Detectron2",
        licence="CC-BY-SA-3.0",
        url=f"https://dl.fbaipublicfiles.com/detectron2/{path}.pkl",
        file=f"{path.rpartition('/')[2]}.pkl",
        sha256="",
        megabytes=megabytes,
        box_ap=box_ap,
        mask_ap=mask_ap,
        architecture=Architecture(name),
        categories=_COCO if keypoint_ap is None else _PERSONS,
        load=load_detectron2,
        keypoint_ap=keypoint_ap,
    )


def _vitdet(name: str, path: str, megabytes: float, box_ap: float, mask_ap: float) -> Published:
    """Published weights of Detectron2's project ViTDet, with the figures of its `README.md`."""
    return _detectron2(name, f"ViTDet/COCO/{path}", megabytes, box_ap, mask_ap, suffix="")


def _rf_detr(size: str, path: str, md5: str, ap: float) -> Published:
    """Published weights of RF-DETR, with the figures of rfdetr 1.11.2. Its labels are category ids."""
    masks = size.startswith("seg_")
    return Published(
        name=f"rf_detr_{size}",
        source="RF-DETR",
        licence="Apache-2.0",
        url=f"https://storage.googleapis.com/rfdetr/{path}",
        file=f"rf-detr-{size.replace('_', '-')}.pth",
        sha256="",
        megabytes=None,
        box_ap=None if masks else ap,
        mask_ap=ap if masks else None,
        architecture=Architecture(f"rf_detr_{size}"),
        categories=_BY_ID,
        load=load_rf_detr,
        md5=md5,
    )


def _detr(body: str, file: str, megabytes: float, box_ap: float) -> Published:
    """Published weights of DETR, with the figures of its `README.md`. Its labels are category ids."""
    return Published(
        name=f"detr_{body}",
        source="DETR",
        licence="Apache-2.0",
        url=f"https://dl.fbaipublicfiles.com/detr/{file}.pth",
        file=f"{file}.pth",
        sha256=file.rpartition("-")[2],
        megabytes=megabytes,
        box_ap=box_ap,
        mask_ap=None,
        architecture=Architecture(f"detr_{body}"),
        categories=_BY_ID,
        load=load_detr,
    )


# COCO's categories; those of ids from 0 on, unused ones included; and that of detectors of persons alone.
_BY_ID = tuple(Category(id, COCO_IDS.get(id, "N/A")) for id in range(91))
_COCO = tuple(Category(*category) for category in COCO_IDS.items())
_PERSONS = (Category(1, COCO_IDS[1], KEYPOINTS, SKELETON),)
# Folders of Detectron2's model zoo.
_BOXES, _MASKS, _KEYPOINTS = "COCO-Detection/", "COCO-InstanceSegmentation/", "COCO-Keypoints/"
_CASCADE = "Misc/cascade_mask_rcnn_"
_LSJ = "new_baselines/mask_rcnn_"
PUBLISHED: dict[str, Published] = {
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
        _detectron2(
            "faster_rcnn_resnet50_fpn", _BOXES + "faster_rcnn_R_50_FPN_3x/137849458/model_final_280758", 159.5, 40.2
        ),
        _detectron2(
            "faster_rcnn_resnet50_fpn",
            _BOXES + "faster_rcnn_R_50_FPN_1x/137257794/model_final_b275ba",
            159.5,
            37.9,
            schedule="_1x",
        ),
        _detectron2(
            "faster_rcnn_resnet101_fpn", _BOXES + "faster_rcnn_R_101_FPN_3x/137851257/model_final_f6e8b1", 232.1, 42.0
        ),
        _detectron2(
            "faster_rcnn_resnext101_32x8d_fpn",
            _BOXES + "faster_rcnn_X_101_32x8d_FPN_3x/139173657/model_final_68b088",
            401.3,
            43.0,
        ),
        _detectron2(
            "mask_rcnn_resnet50_fpn", _MASKS + "mask_rcnn_R_50_FPN_3x/137849600/model_final_f10217", 169.6, 41.0, 37.2
        ),
        _detectron2(
            "mask_rcnn_resnet50_fpn",
            _MASKS + "mask_rcnn_R_50_FPN_1x/137260431/model_final_a54504",
            169.6,
            38.6,
            35.2,
            schedule="_1x",
        ),
        _detectron2(
            "mask_rcnn_resnet101_fpn", _MASKS + "mask_rcnn_R_101_FPN_3x/138205316/model_final_a3ec72", 242.2, 42.9, 38.6
        ),
        _detectron2(
            "mask_rcnn_resnext101_32x8d_fpn",
            _MASKS + "mask_rcnn_X_101_32x8d_FPN_3x/139653917/model_final_2d9806",
            411.4,
            44.3,
            39.5,
        ),
        _detectron2(
            "retinanet_resnet50_fpn", _BOXES + "retinanet_R_50_FPN_3x/190397829/model_final_5bd44e", 145.0, 38.7
        ),
        _detectron2(
            "retinanet_resnet50_fpn",
            _BOXES + "retinanet_R_50_FPN_1x/190397773/model_final_bfca0b",
            145.0,
            37.4,
            schedule="_1x",
        ),
        _detectron2(
            "retinanet_resnet101_fpn", _BOXES + "retinanet_R_101_FPN_3x/190397697/model_final_971ab9", 217.7, 40.4
        ),
        _detectron2(
            "keypoint_rcnn_resnet50_fpn",
            _KEYPOINTS + "keypoint_rcnn_R_50_FPN_3x/137849621/model_final_a6e10b",
            226.0,
            55.4,
            keypoint_ap=65.5,
        ),
        _detectron2(
            "keypoint_rcnn_resnet50_fpn",
            _KEYPOINTS + "keypoint_rcnn_R_50_FPN_1x/137261548/model_final_04e291",
            226.0,
            53.6,
            keypoint_ap=64.0,
            schedule="_1x",
        ),
        _detectron2(
            "keypoint_rcnn_resnet101_fpn",
            _KEYPOINTS + "keypoint_rcnn_R_101_FPN_3x/138363331/model_final_997cc7",
            298.6,
            56.4,
            keypoint_ap=66.1,
        ),
        _detectron2(
            "keypoint_rcnn_resnext101_32x8d_fpn",
            _KEYPOINTS + "keypoint_rcnn_X_101_32x8d_FPN_3x/139686956/model_final_5ad38f",
            467.8,
            57.3,
            keypoint_ap=66.0,
        ),
        _detectron2(
            "cascade_mask_rcnn_resnet50_fpn", _CASCADE + "R_50_FPN_3x/144998488/model_final_480dd8", 275.0, 44.3, 38.5
        ),
        _detectron2(
            "cascade_mask_rcnn_resnet50_fpn",
            _CASCADE + "R_50_FPN_1x/138602847/model_final_e9d89b",
            275.0,
            42.1,
            36.4,
            schedule="_1x",
        ),
        _detectron2(
            "mask_rcnn_resnet50_fpn_lsj", _LSJ + "R_50_FPN_400ep_LSJ/42019571/model_final_14d201", 176.9, 47.4, 42.5
        ),
        _detectron2(
            "mask_rcnn_resnet50_fpn_lsj",
            _LSJ + "R_50_FPN_200ep_LSJ/42047638/model_final_89a8d3",
            176.9,
            46.3,
            41.7,
            schedule="_200ep",
        ),
        _detectron2(
            "mask_rcnn_resnet50_fpn_lsj",
            _LSJ + "R_50_FPN_100ep_LSJ/42047764/model_final_bb69de",
            176.9,
            44.6,
            40.3,
            schedule="_100ep",
        ),
        _detectron2(
            "mask_rcnn_resnet101_fpn_lsj", _LSJ + "R_101_FPN_400ep_LSJ/42073830/model_final_f96b26", 249.5, 48.9, 43.7
        ),
        _detectron2(
            "mask_rcnn_resnet101_fpn_lsj",
            _LSJ + "R_101_FPN_200ep_LSJ/42131867/model_final_0bb7ae",
            249.5,
            48.0,
            43.1,
            schedule="_200ep",
        ),
        _detectron2(
            "mask_rcnn_resnet101_fpn_lsj",
            _LSJ + "R_101_FPN_100ep_LSJ/42025812/model_final_4f7b58",
            249.5,
            46.4,
            41.6,
            schedule="_100ep",
        ),
        _vitdet("mask_rcnn_vitdet_b", "mask_rcnn_vitdet_b/f325346929/model_final_61ccd1", 423.0, 51.6, 45.9),
        _vitdet("mask_rcnn_vitdet_l", "mask_rcnn_vitdet_l/f325599698/model_final_6146ed", 1261.5, 55.5, 49.2),
        _vitdet("mask_rcnn_vitdet_h", "mask_rcnn_vitdet_h/f329145471/model_final_7224f1", 2522.3, 56.7, 50.2),
        _vitdet(
            "cascade_mask_rcnn_vitdet_b", "cascade_mask_rcnn_vitdet_b/f325358525/model_final_435fa9", 538.5, 54.0, 46.7
        ),
        _vitdet(
            "cascade_mask_rcnn_vitdet_l", "cascade_mask_rcnn_vitdet_l/f328021305/model_final_1a9f28", 1376.9, 57.6, 50.0
        ),
        _vitdet(
            "cascade_mask_rcnn_vitdet_h", "cascade_mask_rcnn_vitdet_h/f328730692/model_final_f05665", 2637.7, 58.7, 51.0
        ),
        _vitdet(
            "cascade_mask_rcnn_swin_b_fpn",
            "cascade_mask_rcnn_swin_b_in21k/f342979038/model_final_246a82",
            531.4,
            53.9,
            46.2,
        ),
        _vitdet(
            "cascade_mask_rcnn_swin_l_fpn",
            "cascade_mask_rcnn_swin_l_in21k/f342979186/model_final_7c897e",
            945.3,
            55.0,
            47.2,
        ),
        _rf_detr("nano", "nano_coco/checkpoint_best_regular.pth", "fb6504cce7fbdc783f7a46991f07639f", 48.4),
        _rf_detr("small", "small_coco/checkpoint_best_regular.pth", "fb37061c1af7bace359c91b723a8d5c1", 53.0),
        _rf_detr("medium", "medium_coco/checkpoint_best_regular.pth", "7223f764a87b863f02eb8d52bf0ce2ee", 54.7),
        _rf_detr("large", "rf-detr-large-2026.pth", "5cb72153541cbcb9aa6efa26222acc75", 56.5),
        _rf_detr("seg_nano", "rf-detr-seg-n-ft.pth", "9995497791d0ff1664a1d9ddee9cfd20", 40.3),
        _rf_detr("seg_small", "rf-detr-seg-s-ft.pth", "0a2a3006381d0c42853907e700eadd08", 43.1),
        _rf_detr("seg_medium", "rf-detr-seg-m-ft.pth", "a49af1562c3719227ad43d0ca53b4c7a", 45.3),
        _rf_detr("seg_large", "rf-detr-seg-l-ft.pth", "275f7b094909544ed2841c94a677d07e", 47.1),
        _rf_detr("seg_xlarge", "rf-detr-seg-xl-ft.pth", "3693b35d0eea86ebb3e0444f4a611fba", 48.8),
        _rf_detr("seg_2xlarge", "rf-detr-seg-2xl-ft.pth", "040bc3412af840fa8a47e0ff69b552ba", 49.9),
        _detr("resnet50", "detr-r50-e632da11", 159.0, 42.0),
        _detr("resnet101", "detr-r101-2c7b67e5", 232.0, 43.5),
    )
}
