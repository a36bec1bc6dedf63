"""torchvision detectors as ONNX files give JAX's detections; where rounding decides, torchvision is the judge."""

from copy import deepcopy
from itertools import groupby

import pytest


torch = pytest.importorskip(
    "torch", reason="torch is not installed; `make parity` runs this in an environment of its own"
)
pytest.importorskip("torchvision", reason="torchvision is not installed; `make parity` runs this")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed; `make parity` brings it")

import jax
import jax.numpy as jnp
import numpy as np

from detectax_eqx import Detections, export, models, ops

from .test_models import CASES, assert_masks_agree, assert_same, on_real_images, torchvision_detections


# Within this distance of a threshold, float32 may flip a decision: IoUs and scores here differ by 1e-5 at most.
MARGIN = 1e-5
# Detectors of keypoints are refused, see tests/test_keypoint_runs.py.
EXPORTED = [kind for kind in CASES if "keypoint" not in kind]


def _first(found, image, most):
    """The detections of a batch's first image, and the best `most` in torchvision's form, with masks pasted."""
    found = jax.tree.map(lambda x: jnp.asarray(x)[0], found)
    n = min(int(found.valid.sum()), most)
    rows = {"boxes": found.boxes[:n], "labels": found.labels[:n] + 1, "scores": found.scores[:n]}
    if found.masks is not None:
        rows["masks"] = ops.paste_masks(found.masks[:n], found.boxes[:n], image_size=image.shape[:2])[:, None]
    return found, {name: np.asarray(value) for name, value in rows.items()}


def _by_torchvision(reference, image):
    """torchvision's detections in each precision, and in double precision with one threshold moved by `MARGIN`."""
    double = deepcopy(reference).double()
    yield "double precision", torchvision_detections(double, image)
    yield "single precision", torchvision_detections(reference, image)
    heads = getattr(double, "roi_heads", double)
    thresholds = [(heads, "nms_thresh"), (heads, "score_thresh")]
    for module, name in [*([(double.rpn, "nms_thresh")] if heads is not double else []), *thresholds]:
        threshold = getattr(module, name)
        for moved in (threshold - MARGIN, threshold + MARGIN):
            setattr(module, name, moved)
            yield f"{type(module).__name__}.{name} = {moved:.5f}", torchvision_detections(double, image)
        setattr(module, name, threshold)


def _judged(reference, image, sides, first_label, most):
    """For each side, a setting in which torchvision gives its detections; fails if there is none."""
    judges = {}
    for judge, expected in _by_torchvision(reference, image):
        for side, detections in sides.items():
            try:
                assert_same(detections, expected, image, first_label, most)
            except AssertionError:
                continue
            judges.setdefault(side, judge)
        if len(judges) == len(sides):
            return judges
    raise AssertionError(f"torchvision gives the detections of {list(judges)} only, of {list(sides)}")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", EXPORTED)
def test_onnx_gives_the_detections_of_jax(kind, tmp_path):
    """On real images, on the canvases that torchvision would use as well.

    A decision at a threshold, or for the hundredth place, may be so close that rounding flips it in one program and not
    in the other. torchvision then has to give the detections of each: in single precision, or in double precision with
    its thresholds moved by at most `MARGIN`.
    """
    images, reference, model = on_real_images(kind)
    names = [str(label) for label in range(model.num_classes)]
    most = model.selection.max_detections
    more = models.selected(model, max_detections=most + 10)  # two equal scores may swap places at the cut

    def canvas_of(image):
        return models.smallest_canvas(model.preprocessing.resize(image.shape[:2]), divisor=model.backbone.divisor)

    total, agreements, turned = 0, [], {}
    for canvas, group in groupby(sorted(images, key=canvas_of), canvas_of):
        group = list(group)
        source = tuple(max(image.shape[axis] for image in group) for axis in (0, 1))
        shape, file = export.Shape(1, source, canvas), tmp_path / "detector.onnx"
        export.save_onnx(model, file, shape=shape, images=group[:1], class_names=names, selection=more)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        run = jax.jit(export.detection_program(model, shape, more))
        for i, image in enumerate(group):
            padded, sizes = export.pad_images([image], shape)
            ours, expected = _first(run(padded, sizes), image, most)
            detections = Detections(*session.run(None, {"images": padded, "image_sizes": sizes}))
            exported, _ = _first(detections, image, most)
            total += len(expected["scores"])
            try:
                agreements.append(assert_same(exported, expected, image, most=most))
            except AssertionError:
                sides = {"onnx": exported, "jax": ours}
                turned[f"{i} on {canvas}"] = _judged(reference, image, sides, 91 - model.num_classes, most)
    boxes, scores = (max(getattr(agreement, name) for agreement in agreements) for name in ("boxes", "scores"))
    print(
        f"{kind}: {total} detections on {len(images)} images; boxes within {boxes:.1e} px, scores within {scores:.1e}"
    )
    print(f"judged by torchvision: {turned}")
    assert total > 20 * 5, f"only {total} detections: the comparison shows little"
    assert len(turned) <= 2
    if "masks" in model.needs:
        assert_masks_agree(agreements)
