"""Draws the pictures of docs/tour.md: one synthetic image at each stage of a detector.

    python docs/make_tour.py

Nothing is trained: the "proposals" are noisy copies of the ground truth. Takes a few seconds.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from PIL import Image, ImageDraw

from detectax_eqx import Batch, Detections, data, draw, ops, train


FOLDER = Path(__file__).parent / "tour"
SIZE, MIN_SIZE, MAX_SIZE, CANVAS = (120, 160), 200, 320, (224, 288)
STRIDE = 16  # of the level whose anchors are shown
ANCHORS = {"sizes": (64.0,), "aspect_ratios": (0.5, 1.0, 2.0)}
GREEN, RED, GRAY, BLUE = (0, 150, 70), (220, 40, 40), (140, 140, 140), (30, 90, 220)
ZOOM = 2


def main() -> None:
    """Runs the stages and writes a picture of each."""
    FOLDER.mkdir(exist_ok=True)
    dataset, example = read()
    names = [category.name for category in dataset.categories]
    pixels = np.asarray(example.images.pixels)[: SIZE[0], : SIZE[1]]
    save("decoded", Image.fromarray(pixels))

    # In training, this call also augments; here it only resizes.
    canvas, canvas_size, targets = train.augment(
        example.images.pixels,
        example.images.sizes,
        example.targets,
        canvas=CANVAS,
        min_sizes=(MIN_SIZE,),
        max_size=MAX_SIZE,
        flip_probability=0.0,
        key=jr.key(0),
    )
    picture = np.asarray(canvas).round().astype(np.uint8)
    save("canvas", Image.fromarray(picture))
    save("targets", draw.draw_targets(zoomed(picture), scaled(targets, ZOOM), class_names=names), zoom=1)

    boxes = targets.boxes[: int(targets.valid.sum())]
    anchors = ops.anchor_grid((CANVAS[0] // STRIDE, CANVAS[1] // STRIDE), stride=STRIDE, **ANCHORS)
    save("anchors", draw_anchors(picture, anchors), zoom=1)
    matches = ops.match_boxes(
        ops.pairwise_iou(targets.boxes, anchors),
        targets.valid,
        low_threshold=0.3,
        high_threshold=0.7,
        allow_low_quality=True,
    )
    positive = np.asarray(anchors)[np.asarray(matches.positive)]
    save("matches", draw_boxes(picture, [(positive, GREEN), (boxes, BLUE)]), zoom=1)

    noisy, scores, owners = noisy_copies(np.asarray(boxes), copies=8)
    noisy = ops.clip_boxes(noisy, canvas_size.astype(jnp.float32))
    keep, valid = ops.nms_indices(noisy, scores, jnp.ones(len(noisy), bool), iou_threshold=0.5, max_outputs=16)
    kept = np.asarray(keep)[np.asarray(valid)]
    save("before", draw_boxes(picture, [(noisy, RED)]), zoom=1)
    save("after", draw_boxes(picture, [(noisy[kept], GREEN)]), zoom=1)
    print(f"{len(noisy)} boxes, {len(kept)} after suppression")

    # The picture itself serves as the feature map (3, h, w), with stride 1.
    features = canvas.transpose(2, 0, 1)
    pooled = ops.roi_align(features, noisy[kept], output_size=14, spatial_scale=1.0)
    save("pooled", sheet([to_picture(crop) for crop in pooled]), zoom=1)

    assert targets.masks is not None and targets.mask_boxes is not None
    rows = owners[kept]
    masks = ops.crop_masks(targets.masks[rows], targets.mask_boxes[rows], noisy[kept], output_size=28)
    save("masks", sheet([to_picture(jnp.repeat(255 * mask[None], 3, axis=0)) for mask in masks]), zoom=1)

    ratio = float(SIZE[0] / int(canvas_size[0]))
    detections = Detections(
        noisy[kept] * ratio, scores[kept], targets.labels[rows], jnp.ones(len(kept), bool), masks=masks
    )
    enlarged = replace(detections, boxes=detections.boxes * 4)
    save("detections", draw.draw_detections(zoomed(pixels, 4), enlarged, class_names=names), zoom=1)


def read() -> tuple[data.CocoDataset, Batch]:
    """Returns a dataset of one image, and that image as a training example."""
    with TemporaryDirectory() as folder:
        dataset = data.load_coco(*data.write_shapes_dataset(folder, num_images=1, seed=7, image_size=SIZE))
        buckets = data.make_buckets(dataset.sizes, canvases=[CANVAS], min_size=MIN_SIZE, max_size=MAX_SIZE)
        loader = data.Loader(dataset, batch_size=1, buckets=buckets, max_objects=6, mask_size=56)
        _, batch = next(iter(loader.iterate(0, 1)))
    return dataset, jax.tree.map(lambda x: jnp.asarray(x)[0], batch)


def noisy_copies(boxes: np.ndarray, *, copies: int) -> tuple[jnp.ndarray, jnp.ndarray, np.ndarray]:
    """Returns plausible proposals, scores that decrease with the noise, and the index of each proposal's object."""
    draw_random = np.random.default_rng(0)
    owners = np.repeat(np.arange(len(boxes)), copies)
    sides = np.tile(boxes[owners, 2:] - boxes[owners, :2], 2)
    amount = np.tile(np.linspace(0.01, 0.12, copies), len(boxes))
    noisy = boxes[owners] + draw_random.normal(size=(len(owners), 4)) * sides * amount[:, None]
    scores = 0.99 - 4 * amount + draw_random.uniform(-0.02, 0.02, len(owners))
    return jnp.asarray(noisy, jnp.float32), jnp.asarray(scores, jnp.float32), owners


def scaled(targets, factor: float):
    """Scales targets to an enlarged picture."""
    return replace(targets, boxes=targets.boxes * factor, mask_boxes=targets.mask_boxes * factor)


def zoomed(picture: np.ndarray, factor: int = ZOOM) -> np.ndarray:
    """Enlarges a picture by repeating its pixels."""
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def draw_boxes(picture: np.ndarray, groups: Sequence[tuple], width: int = 2) -> Image.Image:
    """Draws boxes on the enlarged picture, with a colour per group."""
    image = Image.fromarray(zoomed(picture))
    pen = ImageDraw.Draw(image)
    for boxes, color in groups:
        for box in np.asarray(boxes):
            pen.rectangle([float(side) * ZOOM for side in box], outline=color, width=width)
    return image


def draw_anchors(picture: np.ndarray, anchors) -> Image.Image:
    """Draws the anchor centre of every cell, and the anchors of one cell."""
    rows, columns, ratios = CANVAS[0] // STRIDE, CANVAS[1] // STRIDE, len(ANCHORS["aspect_ratios"])
    cells = np.asarray(anchors).reshape(rows, columns, ratios, 4)
    image = draw_boxes(picture, [(cells[rows // 2, columns // 2], BLUE)])
    pen = ImageDraw.Draw(image)
    for box in cells[:, :, 0].reshape(-1, 4):
        x, y = ZOOM * (box[0] + box[2]) / 2, ZOOM * (box[1] + box[3]) / 2
        pen.ellipse([x - 2, y - 2, x + 2, y + 2], fill=GRAY)
    return image


def to_picture(crop: jnp.ndarray) -> Image.Image:
    """Converts a map of three channels, 0..255, to a picture with enlarged pixels."""
    pixels = np.asarray(crop).transpose(1, 2, 0).clip(0, 255).round().astype(np.uint8)
    return Image.fromarray(pixels).resize((112, 112), Image.Resampling.NEAREST)


def sheet(pictures: Sequence[Image.Image], gap: int = 8) -> Image.Image:
    """Places pictures in a row."""
    width, height = pictures[0].size
    row = Image.new("RGB", (len(pictures) * (width + gap) - gap, height), "white")
    for i, picture in enumerate(pictures):
        row.paste(picture, (i * (width + gap), 0))
    return row


def save(name: str, picture: Image.Image, zoom: int = ZOOM) -> None:
    """Writes a picture of the tour."""
    width, height = picture.size
    picture = picture.resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
    picture.save(FOLDER / f"{name}.png", optimize=True)
    path = FOLDER / f"{name}.png"
    if path.stat().st_size > 60_000:  # lossless compression does poorly on noise
        path.unlink()
        path = FOLDER / f"{name}.jpg"
        picture.save(path, quality=85)
    print(f"{path.name}: {picture.size[0]}×{picture.size[1]}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
