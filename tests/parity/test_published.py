"""The table of published weights against torchvision's own metadata."""

import pytest


torchvision = pytest.importorskip("torchvision")

import torchvision.models.detection as detection  # pyright: ignore[reportMissingImports]

from detectax_eqx import zoo


def theirs():
    for name in dir(detection):
        if name.endswith("_Weights"):
            yield from getattr(detection, name)


@pytest.mark.parametrize("name", [n for n in zoo.published_names() if zoo.published(n).source == "torchvision"])
def test_files_figures_and_classes(name):
    ours = zoo.published(name)
    (weights,) = (one for one in theirs() if one.url == ours.url)
    metrics = weights.meta["_metrics"]["COCO-val2017"]
    figures = (metrics["box_map"], metrics.get("mask_map"), metrics.get("kp_map"))
    assert (ours.box_ap, ours.mask_ap, ours.keypoint_ap) == figures
    assert ours.megabytes == weights.meta["_file_size"]
    names = weights.meta["categories"]
    for category in ours.categories:
        assert category.name == names[category.id].replace("__background__", "N/A")
    assert ours.categories[-1].id == len(names) - 1
    assert list(ours.categories[0].keypoints) == weights.meta.get("keypoint_names", [])
