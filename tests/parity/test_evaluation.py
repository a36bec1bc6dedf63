"""`experiments/evaluate.py` on real images against pycocotools on torchvision's detections at the same weights."""
# pyright: reportMissingImports=false

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


torch = pytest.importorskip("torch", reason="torch is not installed; `make parity` runs this where it is")

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .torchvision_models import random_detector


ROOT = Path(__file__).parents[2]
COCO_MINI = ROOT.parent / "shared" / "data" / "coco-mini"
MIN_SIZE, MAX_SIZE = 320, 533


@pytest.mark.timeout(1800)
def test_coco_numbers(tmp_path):
    annotations, images = COCO_MINI / "annotations" / "instances_val2017.json", COCO_MINI / "val2017"
    if not annotations.exists():
        pytest.skip("no folder of COCO images beside the repository")
    reference = random_detector("mask_rcnn_resnet50_fpn", min_size=MIN_SIZE, max_size=MAX_SIZE)
    torch.save(reference.state_dict(), tmp_path / "weights.pth")

    coco = quiet_coco(annotations)
    results = []
    for image_id, entry in sorted(coco.imgs.items()):
        pixels = np.asarray(Image.open(images / entry["file_name"]).convert("RGB"))
        with torch.no_grad():
            output = reference([torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255])[0]
        for box, score, label, mask in zip(
            output["boxes"].tolist(), output["scores"].tolist(), output["labels"].tolist(), output["masks"], strict=True
        ):
            encoded = rle.encode(np.asfortranarray(mask[0].numpy() > 0.5, np.uint8))
            assert isinstance(encoded["counts"], bytes)
            results.append(
                {
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "score": score,
                    "segmentation": encoded | {"counts": encoded["counts"].decode()},
                }
            )
    results = [r for r in results if r["category_id"] in coco.cats]

    arguments = ["--model", "mask_rcnn_resnet50_fpn", "--weights", tmp_path / "weights.pth", "--output", tmp_path]
    arguments += ["--annotations", annotations, "--images", images, "--min-size", MIN_SIZE, "--max-size", MAX_SIZE]
    command = [sys.executable, ROOT / "experiments" / "evaluate.py", *arguments]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    ours = json.loads((tmp_path / "detections.json").read_text())
    print(f"{len(results)} detections by torchvision, {len(ours)} by ours")
    for kind in ("bbox", "segm"):
        given = [r if kind == "bbox" else {k: v for k, v in r.items() if k != "bbox"} for r in results]
        with contextlib.redirect_stdout(io.StringIO()):
            # The stub of pycocotools accepts only files.
            evaluation = COCOeval(coco, coco.loadRes(given), kind)  # pyright: ignore[reportArgumentType]
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        numbers = list(metrics[kind]["numbers"].values())
        print(kind, "torchvision", evaluation.stats.round(5).tolist())
        print(kind, "ours       ", np.round(numbers, 5).tolist())
        np.testing.assert_allclose(numbers, evaluation.stats, atol=0.001)  # 0.1 AP


def quiet_coco(annotations):
    """pycocotools' index, without its output."""
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(annotations))
