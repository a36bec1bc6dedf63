"""A minimal but complete detector, for tests that compile whole training steps."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from detectax_eqx import Batch, Images, Targets, models, nn, train


SIDE, IMAGES = 64, 16
SAMPLING = models.TwoStageSampling(pre_nms_top_n=24, post_nms_top_n=24, rpn_samples=32, box_samples=16)


class Pyramid(eqx.Module):
    """A minimal backbone: three feature maps, each a strided convolution of the previous one."""

    convs: tuple[nn.Conv2d, ...]
    channels = 16
    strides = (8, 16, 32)
    divisor = 32

    def __init__(self, *, key):
        keys = jr.split(key, 3)
        self.convs = tuple(
            nn.Conv2d(i, 16, 2 * s + 1, stride=s, key=k) for i, s, k in zip((3, 16, 16), (8, 2, 2), keys, strict=True)
        )

    @property
    def stages(self):
        return tuple((conv,) for conv in self.convs)

    def __call__(self, image, *, key=None):
        image, maps = image.astype(self.convs[0].weight.dtype), []
        for conv in self.convs:
            image = nn.relu(conv(image))
            maps.append(image)
        return tuple(maps)


SIZES = ((12.0,), (24.0,), (48.0,))


def mask_rcnn(backbone, key):
    model = models.mask_rcnn(backbone, 3, key=key, hidden_size=32, hidden_channels=16, anchor_sizes=SIZES)
    return replace(model, sampling=SAMPLING)


def keypoint_rcnn(backbone, key):
    parts = {"num_keypoints": 2, "hidden_size": 32, "hidden_channels": 16, "depth": 1, "anchor_sizes": SIZES}
    return replace(models.keypoint_rcnn(backbone, 3, key=key, **parts), sampling=SAMPLING)


def retinanet(backbone, key):
    return models.retinanet(backbone, 3, key=key, depth=1, anchor_sizes=SIZES)


def fcos(backbone, key):
    return models.fcos(backbone, 3, key=key, depth=1, anchor_sizes=((8.0,), (16.0,), (32.0,)))


def build(detector=mask_rcnn):
    """Builds a tiny detector, by default a Mask R-CNN whose proposals differ by more than rounding errors."""

    def make():
        keys = jr.split(jr.key(0), 3)
        preprocessing = models.Preprocessing(models.ShortestEdge(SIDE, SIDE))
        return replace(detector(Pyramid(key=keys[0]), keys[1]), preprocessing=preprocessing)

    return random_arrays(eqx.filter_eval_shape(make))


def random_arrays(shapes):
    """Fills a tree of shapes with random arrays. The usual initialisation compiles longer than a training step."""
    draw = np.random.default_rng(0)

    def fill(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        scale = (2 / np.prod(leaf.shape[1:])) ** 0.5 if len(leaf.shape) > 1 else 0.0
        return jnp.asarray(scale * draw.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(fill, shapes)


def loss(model, example, *, key):
    augment_key, loss_key = jr.split(key)
    image, size, targets = train.augment(
        example.images.pixels,
        example.images.sizes,
        example.targets,
        canvas=example.images.canvas,
        min_sizes=(SIDE,),
        max_size=SIDE,
        key=augment_key,
    )
    return model.loss(image, size, targets, key=loss_key)


def make_batch(k):
    """Batch `k` of random images, one of which is padding (`valid` is false)."""
    draw = np.random.default_rng(k)
    corner, side = draw.uniform(0, 30, (IMAGES, 4, 2)), draw.uniform(8, 30, (IMAGES, 4, 2))
    boxes = np.concatenate([corner, corner + side], axis=2).astype(np.float32)
    sizes = np.full((IMAGES, 2), SIDE, np.int32)
    return Batch(
        Images(
            draw.integers(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=np.uint8),
            sizes,
            sizes,
            indices=np.arange(IMAGES, dtype=np.int32),
            valid=np.arange(IMAGES) != 5,
            canvas=(SIDE, SIDE),
        ),
        Targets(
            boxes,
            draw.integers(0, 3, (IMAGES, 4), dtype=np.int32),
            draw.uniform(size=(IMAGES, 4)) < 0.8,
            draw.integers(0, 256, (IMAGES, 4, 14, 14), dtype=np.uint8),
            boxes,
        ),
        overflow=np.zeros(IMAGES, np.int32),
    )
