"""torchvision's RoIAlign, multi-level RoIAlign, mask cropping and mask pasting, on a thousand random cases each."""
# pyright: reportMissingImports=false

import pytest


torch = pytest.importorskip(
    "torch", reason="torch is not installed; `make parity` runs this in an environment of its own"
)
pytest.importorskip("torchvision", reason="torchvision is not installed; `make parity` runs this")

import jax
import jax.numpy as jnp
import numpy as np
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes
from torchvision.ops import MultiScaleRoIAlign, roi_align as torch_roi_align

from detectax_eqx.ops import crop_masks, multilevel_roi_align, paste_masks, roi_align


ROUNDS, BOXES = 10, 100


def _random_boxes(rng, height, width):
    """A hundred boxes of every kind, `(x0, y0, x1, y1)`."""
    size = np.array([width, height])
    corner, side = rng.uniform(-0.5, 1.3, (BOXES, 2)) * size, np.exp(rng.uniform(-3, 0.3, (BOXES, 2))) * size
    boxes = np.concatenate([corner, corner + side], axis=1)
    boxes[10:20] = np.clip(boxes[10:20], 0, np.tile(size, 2))  # clipped to the image, including points on its border
    boxes[20:30] = np.round(boxes[20:30])
    boxes[30:35, 2:] = boxes[30:35, :2]  # points
    boxes[35:40, 2] = boxes[35:40, 0]  # without width
    boxes[40:50, 2:] = boxes[40:50, :2] + rng.uniform(0, 0.5, (10, 2))  # tiny
    boxes[50:55] = [0, 0, width, height]
    boxes[50:55] += rng.integers(-1, 2, (5, 4))
    boxes[55:60, :2], boxes[55:60, 2:] = -rng.uniform(1, 9, (5, 2)) * size, rng.uniform(1, 9, (5, 2)) * size  # huge
    boxes[60] = 0
    return boxes.astype(np.float32)


def _swapped(boxes):
    """Boxes with swapped corners, for which `aligned` RoIAlign is defined as well."""
    boxes = boxes.copy()
    boxes[62:66] = boxes[62:66][:, [2, 3, 0, 1]]
    return boxes


def _check_gradient(ours, theirs):
    """Both sum hundreds of terms in float32, in different orders: the error is relative to the largest."""
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("output_size", [(7, 7), (2, 3)])
def test_roi_align(aligned, sampling_ratio, output_size):
    rng = np.random.default_rng(sampling_ratio)
    options = {"output_size": output_size, "spatial_scale": 0.25, "sampling_ratio": sampling_ratio, "aligned": aligned}

    @jax.jit
    def run(features, boxes, cotangent):
        out, pull = jax.vjp(lambda features: roi_align(features, boxes, **options), features)
        return out, pull(cotangent)[0]

    for _ in range(ROUNDS):
        features = rng.random((4, 18, 25), np.float32)
        boxes = _swapped(_random_boxes(rng, 72, 100))
        cotangent = rng.standard_normal((BOXES, 4, *output_size), np.float32)
        out, gradient = run(features, boxes, cotangent)
        tensor = torch.tensor(features[None], requires_grad=True)
        expected = torch_roi_align(tensor, [torch.tensor(boxes)], **options)
        expected.backward(torch.tensor(cotangent))
        np.testing.assert_allclose(out, expected.detach(), atol=1e-5)
        _check_gradient(gradient, tensor.grad[0])


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_gradient_to_boxes(aligned, sampling_ratio):
    """torchvision's kernel has none, so its sampling is written out in torch, in float64, for the same boxes."""
    rng = np.random.default_rng(0)
    features = rng.random((3, 18, 25))
    boxes = _random_boxes(rng, 72, 100)[:30]
    boxes[20:] += rng.uniform(0.01, 0.02, (10, 4))  # off the cells, where the gradient jumps
    cotangent = rng.standard_normal((30, 3, 3, 2))

    def loss(boxes):
        out = roi_align(
            jnp.asarray(features, jnp.float32),
            boxes,
            output_size=(3, 2),
            spatial_scale=0.25,
            sampling_ratio=sampling_ratio,
            aligned=aligned,
        )
        return (out * jnp.asarray(cotangent, jnp.float32)).sum()

    gradient = jax.jit(jax.grad(loss))(jnp.asarray(boxes))
    tensor = torch.tensor(boxes, dtype=torch.float64, requires_grad=True)
    for box, weight in zip(tensor, torch.tensor(cotangent), strict=True):
        (_sampled(torch.tensor(features), box, sampling_ratio, aligned) * weight).sum().backward()
    np.testing.assert_allclose(gradient, tensor.grad, atol=1e-4)


def _sampled(features, box, sampling_ratio, aligned, bins=(3, 2), scale=0.25):
    """RoIAlign of one box in differentiable operations of torch."""
    weights = []
    for low, high, size, count in ((box[1], box[3], 18, bins[0]), (box[0], box[2], 25, bins[1])):
        start, end = low * scale - 0.5 * aligned, high * scale - 0.5 * aligned
        length = end - start if aligned else torch.clamp(end - start, min=1)
        samples = sampling_ratio or int(torch.ceil(length / count))
        index = torch.arange(count * samples, dtype=torch.float64)
        position = start + (index + 0.5) * length / (count * max(samples, 1))
        inside = (position >= -1) & (position <= size)
        position = position.clamp(0, size - 1)
        hat = (1 - (position[:, None] - torch.arange(size)[None]).abs()).clamp(min=0) * inside[:, None]
        weights.append(hat.reshape(count, samples, size).sum(1) / max(samples, 1))
    return torch.einsum("ph,chw,qw->cpq", weights[0], features, weights[1])


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("size", [7, 14])
def test_multilevel_roi_align(size, sampling_ratio):
    rng = np.random.default_rng(size)
    strides, height, width = (4, 8, 16, 32), 320, 480
    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], size, sampling_ratio)

    @jax.jit
    def run(features, boxes, cotangent):
        def align(features):
            return multilevel_roi_align(
                features, boxes, output_size=size, strides=strides, sampling_ratio=sampling_ratio, aligned=False
            )

        out, pull = jax.vjp(align, features)
        return out, pull(cotangent)[0]

    for _ in range(ROUNDS):
        features = [rng.random((3, height // stride, width // stride), np.float32) for stride in strides]
        boxes = _random_boxes(rng, height, width)
        boxes[70:74] = [[8, 8, 8 + side, 8 + side] for side in (112, 224, 448, 111)]  # on the boundary of a level
        cotangent = rng.standard_normal((BOXES, 3, size, size), np.float32)
        out, gradient = run(features, boxes, cotangent)
        tensors = {str(i): torch.tensor(feature[None], requires_grad=True) for i, feature in enumerate(features)}
        expected = theirs(tensors, [torch.tensor(boxes)], [(height, width)])
        expected.backward(torch.tensor(cotangent))
        np.testing.assert_allclose(out, expected.detach(), atol=1e-5)
        for ours, tensor in zip(gradient, tensors.values(), strict=True):
            _check_gradient(ours, tensor.grad[0])


def test_crop_masks():
    rng = np.random.default_rng(0)
    height, width = 60, 84
    frames = jnp.tile(jnp.array([[0.0, 0, width, height]]), (BOXES, 1))

    @jax.jit
    def run(masks, rois, cotangent):
        out, pull = jax.vjp(lambda masks: crop_masks(masks, frames, rois, output_size=14), masks)
        return out, pull(cotangent)[0]

    for _ in range(ROUNDS):
        masks = (rng.random((BOXES, height, width)) > 0.5).astype(np.float32)
        rois = _random_boxes(rng, height, width)
        cotangent = rng.standard_normal((BOXES, 14, 14), np.float32)
        tensor = torch.tensor(masks, requires_grad=True)
        expected = project_masks_on_boxes(tensor, torch.tensor(rois), torch.arange(BOXES), 14)
        expected.backward(torch.tensor(cotangent))
        out, gradient = run(masks, rois, cotangent)
        np.testing.assert_allclose(out, expected.detach(), atol=1e-5)
        _check_gradient(gradient, tensor.grad)
        out = crop_masks(jnp.asarray(masks * 255, jnp.uint8), frames, jnp.asarray(rois), output_size=14)
        np.testing.assert_allclose(out, expected.detach(), atol=1e-5)


@pytest.mark.parametrize("size", [28, 7])
def test_paste_masks(size):
    rng = np.random.default_rng(size)
    height, width = 60, 84

    @jax.jit
    def run(masks, boxes, cotangent):
        out, pull = jax.vjp(lambda masks: paste_masks(masks, boxes, image_size=(height, width)), masks)
        return out, pull(cotangent)[0]

    for _ in range(ROUNDS):
        masks = rng.random((BOXES, size, size), np.float32)
        boxes = _random_boxes(rng, height, width)
        # Where a box misses the image, torchvision's slices wrap around and raise an error.
        middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * (size + 2) / size
        touches = (middle + half > 0).all(axis=1) & (middle - half < [width, height]).all(axis=1)
        boxes[~touches] = np.array([3.5, 4.25, 50, 33], np.float32)
        cotangent = rng.standard_normal((BOXES, height, width), np.float32)
        tensor = torch.tensor(masks[:, None], requires_grad=True)
        expected = paste_masks_in_image(tensor, torch.tensor(boxes), (height, width))[:, 0]
        expected.backward(torch.tensor(cotangent))
        out, gradient = run(masks, boxes, cotangent)
        np.testing.assert_allclose(out, expected.detach(), atol=1e-5)
        _check_gradient(gradient, tensor.grad[:, 0])
