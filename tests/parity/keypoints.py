"""Compares the keypoints of a detector with those of torchvision's detector of the same weights."""
# pyright: reportMissingImports=false

from copy import deepcopy

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import torch
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints

from detectax_eqx import models

from .double import double_precision, in_double


# Pixels, and logits, which have a standard deviation of 2.
PLACES, SCORES = 0.05, 1e-3


class KeypointAgreement:
    """Compares keypoints in single precision, and where that cannot decide, in double precision.

    A keypoint is the pixel with the largest value of a map. Where the best two pixels differ by a rounding error, or a
    side of a box by a rounding error from a whole number of pixels, single precision leaves the pixel open. The
    keypoints of such a box are compared again with both keypoint branches in double precision, in the same box.
    """

    def __init__(self, reference, model):
        self.reference, self.model = deepcopy(reference).double(), model
        self.compared = self.judged_in_double = 0
        self.worst, self.worst_in_double = 0.0, 0.0
        self.boxes = None  # on the canvas, of the last image
        # A function rather than a method: copies of the reference need not copy this object.
        reference.roi_heads.register_forward_hook(lambda *call: self._remember(*call))

    def __str__(self):
        return (
            f"{self.compared} keypoints, largest difference {self.worst:.2g} pixels; {self.judged_in_double} judged in "
            f"double precision, largest difference {self.worst_in_double:.2g}"
        )

    def _remember(self, module, arguments, outputs):
        self.boxes = outputs[0][0]["boxes"].clone()

    def compare(self, image, found, expected):
        """Fails unless the keypoints `found` in an image, `(n, k, 3)`, are those `expected`."""
        places = np.abs(found[..., :2] - expected["keypoints"][..., :2]).max(axis=2)  # (n, k)
        scores = np.abs(found[..., 2] - expected["keypoints_scores"])
        wrong = (places > PLACES) | (scores > SCORES)
        self.compared += wrong.size
        self.judged_in_double += int(wrong.sum())
        self.worst = max(self.worst, float(places[~wrong].max(initial=0.0)))
        rows = np.flatnonzero(wrong.any(axis=1))
        if len(rows):
            self._compare_in_double(image, rows)

    def _compare_in_double(self, image, rows):
        assert self.boxes is not None
        boxes = self.boxes[rows].double()
        heads = self.reference.roi_heads
        with torch.no_grad():
            tensor = torch.from_numpy(image.copy()).permute(2, 0, 1).double() / 255
            canvas, _ = self.reference.transform([tensor])
            pooled = heads.keypoint_roi_pool(self.reference.backbone(canvas.tensors), [boxes], canvas.image_sizes)
            heatmaps = heads.keypoint_predictor(heads.keypoint_head(pooled))
            expected, expected_scores = (x.numpy() for x in heatmaps_to_keypoints(heatmaps, boxes))
        with double_precision():

            @eqx.filter_jit
            def keypoints(model, canvas, boxes):
                rois = models.roi_features(model, model.backbone(canvas)[:-1])
                return model.keypoints(rois, boxes, jnp.ones(len(boxes), bool))

            pixels, places = jnp.asarray(canvas.tensors[0].numpy()), jnp.asarray(boxes.numpy())
            found = np.asarray(keypoints(in_double(self.model), pixels, places))
        self.worst_in_double = max(self.worst_in_double, float(np.abs(found - expected)[..., :2].max()))
        np.testing.assert_allclose(found[..., :2], expected[..., :2], atol=PLACES)
        np.testing.assert_allclose(found[..., 2], expected_scores, rtol=1e-6, atol=1e-6)
