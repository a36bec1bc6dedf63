"""Detectron2's detectors at the same weights: the same detections in real images, the same losses and gradients.

Skipped where Detectron2 is not installed; detectron2_models.py says how it runs without compiling.
"""

from dataclasses import replace
from typing import NamedTuple

import pytest


torch = pytest.importorskip(
    "torch", reason="torch is not installed; `make parity` runs this in an environment of its own"
)
pytest.importorskip(
    "detectron2", reason="Detectron2 is not installed and not on PyPI; detectron2_models.py says how to get it"
)

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from detectax_eqx import Targets, models, zoo
from detectax_eqx.weights import load_detectron2, to_detectron2

from ..detectron2_tiny import keypoints
from ..test_detectron2_reference import THEIR_LOSSES, num_classes
from .detectron2_models import (
    CONFIGS,
    EVERYTHING,
    LSJ,
    VITDETS,
    arrays_of,
    detections,
    double_detectron2,
    losses,
    random_detector,
    resized,
)
from .double import double_precision, in_double
from .torchvision_models import real_images


NUM_IMAGES = 10
# Shifts a whole heatmap, which the softmax over its bins takes out again: its gradient is rounding errors alone.
WITHOUT_GRADIENT = "roi_heads.keypoint_head.score_lowres.bias"
# Detectors whose networks differ; the deeper ones are compared on fewer images.
DEEP = [name for name in CONFIGS if "101" in name]


def build(name):
    """Our model, as shapes only, without a drop path."""
    parts = {"drop_path": 0.0} if name in VITDETS else {}
    return eqx.filter_eval_shape(zoo.build, name, num_classes(name), key=jr.key(0), **parts)


def compared(found, expected, *, pixels, scores=1e-4, ties=2e-6):
    """Fails unless the detections are the same in the same order, and returns the largest differences.

    Neighbours whose scores differ by less than rounding errors, `ties`, may have swapped places.
    """
    valid = np.asarray(found.valid)
    count = len(expected["scores"])
    assert valid.sum() == count, f"{valid.sum()} detections, not {count}"
    boxes, labels = np.asarray(found.boxes)[valid], np.asarray(found.labels)[valid]
    own = np.asarray(found.scores)[valid]
    order, free = [], set(range(count))
    for box, label in zip(expected["boxes"], expected["labels"], strict=True):
        distances = np.abs(boxes - box).max(axis=1) + 1e6 * (labels != label)
        order.append(min(free, key=lambda row: distances[row]))
        free.remove(order[-1])
    swapped = [row for row, other in enumerate(order) if row != other]
    assert all(abs(own[row] - own[order[row]]) < ties for row in swapped), f"another order at rows {swapped}"
    np.testing.assert_array_equal(labels[order], expected["labels"])
    np.testing.assert_allclose(own[order], expected["scores"], atol=scores)
    np.testing.assert_allclose(boxes[order], expected["boxes"], atol=pixels)
    of_boxes, of_scores = np.abs(boxes[order] - expected["boxes"]), np.abs(own[order] - expected["scores"])
    return order, (of_boxes.max(initial=0), of_scores.max(initial=0)), len(swapped)


def on_canvas(model, image):
    """Detections in an image that is already resized."""
    canvas = models.smallest_canvas(model.preprocessing.canvas(image.shape[:2]), divisor=model.backbone.divisor)
    padded = np.zeros((*canvas, 3), np.uint8)
    padded[: image.shape[0], : image.shape[1]] = image
    return eqx.filter_jit(model)(jnp.asarray(padded), jnp.asarray(image.shape[:2], jnp.int32))


class Agreement(NamedTuple):
    """Largest differences of boxes, in pixels, and of scores: in the resized image and in that as decoded.

    `total` detections, of which `swapped` changed places with a neighbour. `points`: differences of keypoints in the
    resized image. `ious`: of masks.
    """

    own: tuple[float, float]
    raw: tuple[float, float]
    total: int
    swapped: int
    points: np.ndarray | None
    ious: list[float]


def agreement(name, reference, model, image, own):
    """Fails unless the detections in an image agree: in `own`, resized by Detectron2, and from the image as decoded."""
    # Twelve blocks of a transformer round more than a ResNet.
    pixels, ties = (0.05, 2e-5) if name in VITDETS else (1e-2, 2e-6)
    expected, found = detections(reference, own), on_canvas(model, own)
    order, own_worst, _ = compared(found, expected, pixels=pixels, ties=ties)
    points = None
    if "keypoints" in expected:
        points = np.asarray(found.keypoints)[np.asarray(found.valid)][order] - expected["keypoints"]
    expected, found = detections(reference, own, size=image.shape[:2]), eqx.filter_jit(models.detect)(model, image)
    order, raw_worst, swapped = compared(found, expected, pixels=0.1, ties=ties)
    ious = []
    if "masks" in expected and len(order):
        valid = np.asarray(found.valid)
        masks, boxes = (jnp.asarray(np.asarray(x)[valid][order]) for x in (found.masks, found.boxes))
        pasted = np.asarray(model.paste(masks, boxes, image_size=image.shape[:2], threshold=0.5))
        union = (pasted | expected["masks"]).sum(axis=(1, 2))
        both = (pasted & expected["masks"]).sum(axis=(1, 2))
        ious = (both[union > 0] / union[union > 0]).tolist()
        assert min(ious, default=1.0) > 0.99  # of a small mask, float32 may flip a pixel
    return Agreement(own_worst, raw_worst, len(order), swapped, points, ious)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [*CONFIGS, LSJ, *VITDETS])
def test_detections_on_real_images(name):
    """Detectron2's detections; where float32 flipped a decision at a threshold, both are compared in float64."""
    images = real_images(2 if name in (*DEEP, LSJ) else NUM_IMAGES)
    if not images:
        pytest.skip("no folder of real images beside the repository")
    reference = random_detector(name)
    model = load_detectron2(build(name), arrays_of(reference))
    all_of, judged_in_double = [], []
    for i, image in enumerate(images):
        own = resized(image, *((1024, 1024) if name in VITDETS else ()))
        assert model.preprocessing.resize(image.shape[:2]) == own.shape[:2]
        try:
            one = agreement(name, reference, model, image, own)
        except AssertionError:
            judged_in_double.append(i)
            with double_detectron2(reference) as double, double_precision():
                one = agreement(name, double, in_double(model), image, own)
        print(f"{name} image {i}: {one.total} detections, own input {one.own}, raw image {one.raw}", flush=True)
        all_of.append(one)
    total, swaps = sum(one.total for one in all_of), sum(one.swapped for one in all_of)
    own_worst, raw_worst = [one.own for one in all_of], [one.raw for one in all_of]
    points, ious = [one.points for one in all_of if one.points is not None], [x for one in all_of for x in one.ious]
    print(f"{name}: judged in double precision: images {judged_in_double}")
    print(f"{name}: {total} detections in {len(images)} images, {swaps} swapped with a neighbour")
    print(f"  own input: boxes {max(a for a, _ in own_worst):.2e} px, scores {max(b for _, b in own_worst):.2e}")
    print(f"  raw image: boxes {max(a for a, _ in raw_worst):.2e} px, scores {max(b for _, b in raw_worst):.2e}")
    assert len(judged_in_double) <= 3
    assert total > 5 * len(images), f"only {total} detections: the comparison shows little"
    if points:  # two places of a heatmap may be as likely: the scores are equal, but not the places
        places, scores = np.split(np.abs(np.concatenate(points)), [2], axis=-1)
        same = places.max(axis=-1) < 0.05
        print(f"  keypoints, own input: {same.sum()} of {same.size} within .05 px, scores {scores.max():.2e}")
        assert same.mean() > 0.99 and scores.max() < 1e-3
    if ious:
        print(f"  masks: IoU least {min(ious):.5f}, mean {np.mean(ious):.6f} of {len(ious)}")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [*(name for name in CONFIGS if name not in DEEP), *VITDETS])
def test_losses_and_gradients(name):
    """Every loss to 1e-5, and the gradient of every parameter; see test_models.py for their tolerances."""
    height, width, objects, everything = 256, 320, 5, EVERYTHING
    changes = {
        "MODEL__RPN__BATCH_SIZE_PER_IMAGE": everything,
        "MODEL__RPN__PRE_NMS_TOPK_TRAIN": 200,
        "MODEL__RPN__POST_NMS_TOPK_TRAIN": 60,
        "MODEL__ROI_HEADS__BATCH_SIZE_PER_IMAGE": everything,
        "MODEL__ROI_HEADS__POSITIVE_FRACTION": 0.5,
        "MODEL__BACKBONE__FREEZE_AT": 0,
        "INPUT__MASK_FORMAT": "bitmask",
    }
    side = max(height, width)
    reference = random_detector(name, side=side, **changes)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, height, width, 3)).astype(np.uint8)
    corners = rng.uniform(0, (width - 120, height - 120), (2, objects, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(20, 120, (2, objects, 2))], axis=2).astype(np.float32)
    labels = rng.integers(0, num_classes(name), (2, objects)).astype(np.int32)
    # Blocks rather than noise, in which a bin of a target may be one half up to rounding.
    masks = (rng.random((2, objects, height // 32, width // 32)) < 0.5).repeat(32, axis=2).repeat(32, axis=3)
    model = load_detectron2(build(name), arrays_of(reference))
    points = keypoints(rng, boxes, 17)
    expected = losses(reference, pixels, boxes, labels, masks, points)
    # A tensor, though pyright sees the 0 that the sum starts from.
    sum(expected.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]

    if "retinanet" not in name:
        sampling = replace(
            model.sampling,
            pre_nms_top_n=200,
            post_nms_top_n=60,
            rpn_samples=everything,
            box_samples=everything,
            box_positive_fraction=0.5,
            rpn_normalizer=float(everything),
        )
        model = replace(model, sampling=sampling)
    if model.preprocessing.square_canvas:
        pixels = np.pad(pixels, ((0, 0), (0, side - height), (0, side - width), (0, 0)))
    frame = jnp.tile(jnp.array([0, 0, width, height], jnp.float32), (2, objects, 1))
    valid = jnp.ones((2, objects), bool)
    targets = Targets(jnp.asarray(boxes), jnp.asarray(labels), valid, jnp.asarray(masks), frame, jnp.asarray(points))

    @eqx.filter_jit
    @eqx.filter_grad(has_aux=True)
    def total(model):
        size = jnp.array([height, width], jnp.int32)
        terms = jax.vmap(lambda i, t: model.loss(i, size, t, key=jr.key(0)))(jnp.asarray(pixels), targets)
        sums = {term: jax.tree.map(lambda x: x.sum(), values) for term, values in terms.items()}
        means = {term: values.mean() for term, values in sums.items()}
        return sum(means.values()), (means, sums)

    grads, (means, sums) = total(model)
    # Detectron2 divides RetinaNet's losses by a moving average of the number of positives.
    moving = getattr(reference, "loss_normalizer", None)
    scale = 1.0 if moving is None else float(sums["classification"].count) / moving
    ours = {THEIR_LOSSES[term]: float(mean) * scale for term, mean in means.items()}
    assert ours.keys() == expected.keys()
    for term, value in expected.items():
        print(f"{name} {term}: {ours[term]:.6f} Detectron2 {value.item():.6f}")
    for term, value in expected.items():
        np.testing.assert_allclose(ours[term], value.item(), rtol=1e-5, atol=1e-6, err_msg=term)
    own = to_detectron2(grads)
    differences = []
    for layer, parameter in reference.named_parameters():
        theirs = parameter.grad.numpy()
        size = np.linalg.norm(theirs)
        if layer == WITHOUT_GRADIENT:
            assert max(size, np.linalg.norm(own[layer])) < 1e-5
            continue
        differences.append((float(np.linalg.norm(own[layer] * scale - theirs) / (size or 1.0)), layer))
    middle, worst = sorted(differences)[len(differences) // 2], max(differences)
    print(f"{name}: {len(differences)} gradients, relative differences: worst {worst}, middle {middle}")
    # In a transformer, every gradient has the rounding errors of all: see the test in double precision below.
    assert middle[0] < (1e-2 if name in VITDETS else 1e-3) and worst[0] < 1e-2


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", VITDETS)
def test_transformers_in_double_precision(name):
    """The maps of the pyramid, and the gradient of every parameter of the backbone and of the image, to 1e-6."""
    whole = random_detector(name, side=320)
    model, reference = load_detectron2(build(name), arrays_of(whole)).backbone, whole.backbone.double()
    image = np.random.default_rng(0).normal(size=(3, 256, 320))
    tensor = torch.tensor(image[None], requires_grad=True)
    expected = list(reference(tensor).values())
    scales = [float(x.detach().abs().mean()) for x in expected]
    torch.stack([torch.cos(x / scale).sum() for x, scale in zip(expected, scales, strict=True)]).sum().backward()
    gradients = {key: p.grad.numpy() for key, p in reference.named_parameters() if p.grad is not None}

    def total(both):
        maps = both[0](both[1])
        return sum(jnp.cos(x / scale).sum() for x, scale in zip(maps, scales, strict=True)), maps

    with double_precision():
        arguments = in_double(model), jnp.asarray(image)
        (_, maps), (grads, of_image) = eqx.filter_jit(eqx.filter_value_and_grad(total, has_aux=True))(arguments)
        ours = to_detectron2(grads) | {"image": np.asarray(of_image)}
    for a, b, scale in zip(maps, expected, scales, strict=True):
        np.testing.assert_allclose(np.asarray(a) / scale, b[0].detach().numpy() / scale, atol=1e-6)
    gradients["image"] = tensor.grad[0].numpy()  # pyright: ignore[reportOptionalSubscript]
    differences = [(np.linalg.norm(ours[key] - g) / (np.linalg.norm(g) or 1.0), key) for key, g in gradients.items()]
    print(f"{name}: {len(gradients)} gradients in double precision, largest relative difference {max(differences)}")
    assert max(differences)[0] < 1e-6


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [*(name for name in CONFIGS if name not in DEEP), *VITDETS])
def test_weights_round_trip(name):
    reference = random_detector(name)
    arrays = arrays_of(reference)
    if "backbone.net.pos_embed" in arrays:
        arrays["backbone.net.pos_embed"][:, 0] = 0  # of the class token, which detectors do not have
    back = to_detectron2(load_detectron2(build(name), arrays))
    assert back.keys() == arrays.keys()
    assert all(np.array_equal(back[key], array) for key, array in arrays.items())
    tensors = {key: torch.from_numpy(array) for key, array in back.items()}
    missing, unexpected = reference.load_state_dict(tensors, strict=False)
    assert not unexpected and all(key.endswith("relative_position_index") for key in missing)  # constants
