"""Faster R-CNN (arXiv:1506.01497) on a feature pyramid."""

from collections.abc import Callable
from dataclasses import dataclass

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int32, PRNGKeyArray, Real

from .._types import Detections, Targets, WeightedSum
from ..nn import Backbone
from ..ops._roi_align import level_pooler
from ._box_head import BoxHead, SampledProposals, box_detections, box_loss, sample_proposals
from ._rpn import ANCHOR_SIZES, ASPECT_RATIOS, RPN, RPNOutput, propose, rpn_loss, sample_anchors


# Mean and standard deviation of ImageNet's pixels, RGB in 0..255: what torchvision's backbones were trained with.
IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)

Features = tuple[Float[Array, "c _ _"], ...]
Pool = Callable[..., Float[Array, "n c s s"]]


@dataclass(frozen=True)
class Selection:
    """Which proposals and detections a two-stage detector keeps; the defaults are torchvision's.

    - `score_threshold`: detections need a score above it, 0..1.
    - `nms_threshold`: IoU above which the lower of two detections of a class is dropped.
    - `max_detections`: detections an image.
    - `pre_nms_top_n`, `post_nms_top_n`: proposals a level before, and in all after, suppression.
    """

    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    max_detections: int = 100
    pre_nms_top_n: int = 1000
    post_nms_top_n: int = 1000


TORCHVISION_SELECTION = Selection()


class FasterRCNN(eqx.Module):
    """A two-stage box detector: backbone with pyramid, region proposals, box head.

    Its call takes one image that already lies on its canvas; `detectax_eqx.models.detect` takes any image.

    >>> import jax.random as jr
    >>> from detectax_eqx.nn import ResNetFPN, resnet18
    >>> backbone = ResNetFPN(resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    >>> model = FasterRCNN(backbone, 3, key=jr.key(2), hidden_size=32)
    >>> model.num_classes
    3
    """

    backbone: Backbone
    rpn: RPN
    box_head: BoxHead
    roi_aligned: bool = eqx.field(static=True)
    roi_sampling_ratio: int = eqx.field(static=True)
    pixel_mean: tuple[float, ...] = eqx.field(static=True)
    pixel_std: tuple[float, ...] = eqx.field(static=True)

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        key: PRNGKeyArray,
        anchor_sizes: tuple[tuple[float, ...], ...] = ANCHOR_SIZES,
        aspect_ratios: tuple[float, ...] = ASPECT_RATIOS,
        hidden_size: int = 1024,
        roi_aligned: bool = False,
        roi_sampling_ratio: int = 2,
        pixel_mean: tuple[float, ...] = IMAGENET_MEAN,
        pixel_std: tuple[float, ...] = IMAGENET_STD,
    ):
        """Builds the heads on `backbone`, which maps `(c, h, w)` to pyramid levels and has `channels`, `strides`.

        - `num_classes`: foreground classes.
        - `anchor_sizes`: a tuple for each level, in canvas pixels; `aspect_ratios`: height / width.
        - `hidden_size`: width of the box head.
        - `roi_aligned`, `roi_sampling_ratio`: see `roi_align`. The defaults are torchvision's; Detectron2 uses
          `True, 0`.
        - `pixel_mean`, `pixel_std`: of each channel, in 0..255; as many as the backbone takes.
        """
        if len(pixel_mean) != len(pixel_std):
            raise ValueError(f"pixel_mean and pixel_std have one number per channel, got {pixel_mean} and {pixel_std}.")
        keys = jr.split(key)
        self.backbone = backbone
        self.rpn = RPN(backbone.channels, key=keys[0], anchor_sizes=anchor_sizes, aspect_ratios=aspect_ratios)
        self.box_head = BoxHead(backbone.channels, num_classes, key=keys[1], hidden_size=hidden_size)
        self.roi_aligned = roi_aligned
        self.roi_sampling_ratio = roi_sampling_ratio
        self.pixel_mean = pixel_mean
        self.pixel_std = pixel_std

    @property
    def num_classes(self) -> int:
        """Number of foreground classes."""
        return self.box_head.num_classes

    def normalize(self, image: Real[Array, "h w i"], image_size: Int32[Array, " 2"]) -> Float[Array, "i h w"]:
        """Pixel values 0..255 to the backbone's scale; what lies outside `image_size` becomes 0, as in torchvision."""
        channels = len(self.pixel_mean)
        if image.shape[-1] != channels:
            raise ValueError(
                f"image has {image.shape[-1]} channels, the last axis of (h, w, c), but the model takes {channels} "
                f"(pixel_mean). {_channel_remedy(image.shape[-1], channels)}"
            )
        dtype = jnp.result_type(float)  # float32, or float64 where JAX computes in it
        mean, std = (jnp.asarray(x, dtype)[None, None] for x in (self.pixel_mean, self.pixel_std))
        x = (image.astype(dtype) - mean) / std
        rows = jnp.arange(image.shape[0], dtype=jnp.int32)[:, None, None] < image_size[0]
        columns = jnp.arange(image.shape[1], dtype=jnp.int32)[None, :, None] < image_size[1]
        return jnp.where(rows & columns, x, 0.0).transpose(2, 0, 1)

    def extract(self, image: Real[Array, "h w i"], image_size: Int32[Array, " 2"]) -> tuple[Features, RPNOutput]:
        """The pyramid's features and the proposal head's output for an image on its canvas."""
        features = self.backbone(self.normalize(image, image_size))
        return features, self.rpn(features, (image.shape[0], image.shape[1]))

    def pool(self, features: Features, boxes: Float[Array, "n 4"], *, output_size: int) -> Float[Array, "n c s s"]:
        """The features inside each box, from the level that suits its size. The coarsest map is for anchors only."""
        return self.pooler(features)(boxes, output_size=output_size)

    def pooler(self, features: Features) -> Pool:
        """`pool` of these features, as a function of the other arguments: they are laid out once, not in each call."""
        return level_pooler(
            features[:-1],
            strides=tuple(self.backbone.strides[:-1]),
            sampling_ratio=self.roi_sampling_ratio,
            aligned=self.roi_aligned,
        )

    def __call__(
        self,
        image: Real[Array, "h w i"],
        image_size: Int32[Array, " 2"],
        *,
        selection: Selection = TORCHVISION_SELECTION,
    ) -> Detections:
        """Detections in canvas pixels.

        - `image`: values 0..255 of any dtype, usually RGB, on a canvas of multiples of 32; `image_size`: its
          `(height, width)` there.
        - `selection`: which proposals and detections are kept.
        """
        return self.detect_boxes(image, image_size, selection=selection)[1]

    def detect_boxes(
        self, image: Real[Array, "h w i"], image_size: Int32[Array, " 2"], *, selection: Selection
    ) -> tuple[Pool, Detections]:
        """What the call does, and the `pooler` of the features it did it on, for heads beside the box head."""
        features, output = self.extract(image, image_size)
        size = image_size.astype(jnp.float32)
        proposals = propose(
            output, size, pre_nms_top_n=selection.pre_nms_top_n, post_nms_top_n=selection.post_nms_top_n
        )
        pool = self.pooler(features)
        logits, deltas = self.box_head(pool(proposals.boxes, output_size=self.box_head.pool_size))
        detections = box_detections(
            logits,
            deltas,
            proposals,
            size,
            score_threshold=selection.score_threshold,
            nms_threshold=selection.nms_threshold,
            max_detections=selection.max_detections,
        )
        return pool, detections


def _channel_remedy(got: int, wanted: int) -> str:
    if (got, wanted) == (4, 3):
        return "Drop alpha: image[..., :3]."
    if (got, wanted) == (1, 3):
        return "Repeat the gray channel: np.repeat(image, 3, axis=2)."
    return "Give the backbone's stem that many channels, and pixel_mean and pixel_std a number for each."


@dataclass(frozen=True)
class Sampling:
    """What a two-stage loss looks at; the defaults are torchvision's.

    - `pre_nms_top_n`, `post_nms_top_n`: proposals a level before, and in all after, suppression.
    - `rpn_samples`, `rpn_positive_fraction`: anchors looked at, and the part of them that may be positive.
    - `rpn_positive_iou`, `rpn_negative_iou`: from and below which IoU an anchor is positive, negative.
    - `box_samples`, `box_positive_fraction`: the same for proposals.
    - `box_positive_iou`: from which IoU a proposal is positive; below it is negative.
    """

    pre_nms_top_n: int = 2000
    post_nms_top_n: int = 2000
    rpn_samples: int = 256
    rpn_positive_fraction: float = 0.5
    rpn_positive_iou: float = 0.7
    rpn_negative_iou: float = 0.3
    box_samples: int = 512
    box_positive_fraction: float = 0.25
    box_positive_iou: float = 0.5


TORCHVISION_SAMPLING = Sampling()


def faster_rcnn_loss(
    model: FasterRCNN,
    image: Real[Array, "h w i"],
    image_size: Int32[Array, " 2"],
    targets: Targets,
    *,
    key: PRNGKeyArray,
    sampling: Sampling = TORCHVISION_SAMPLING,
) -> dict[str, WeightedSum]:
    """The four losses of Faster R-CNN for one image on its canvas, as sums and counts.

    `loss_objectness`, `loss_rpn_box_reg`, `loss_classifier`, `loss_box_reg`; matching, sampling and normalisation are
    torchvision's. An image without objects has only negatives, and finite losses.

    - `image`: RGB in 0..255; `image_size`: its `(height, width)` on the canvas; `targets`: in canvas pixels.
    - `key`: picks the sampled anchors and proposals.

    Raises a `ValueError` if a label is not in `0..K-1`; in a compiled program, that gives NaN (`Targets.check_labels`).

    >>> from detectax_eqx.nn import ResNetFPN, resnet18
    >>> backbone = ResNetFPN(resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    >>> model = FasterRCNN(backbone, 3, key=jr.key(2), hidden_size=32)
    >>> image, size = jnp.zeros((64, 64, 3)), jnp.array([64, 64])
    >>> targets = Targets(jnp.array([[4.0, 4.0, 40.0, 40.0]]), jnp.array([2]), jnp.array([True]))
    >>> losses = eqx.filter_eval_shape(faster_rcnn_loss, model, image, size, targets, key=jr.key(3))
    >>> sorted(losses)
    ['loss_box_reg', 'loss_classifier', 'loss_objectness', 'loss_rpn_box_reg']
    """
    return two_stage_losses(model, image, image_size, targets, key=key, sampling=sampling)[0]


def two_stage_losses(
    model: FasterRCNN,
    image: Real[Array, "h w i"],
    image_size: Int32[Array, " 2"],
    targets: Targets,
    *,
    key: PRNGKeyArray,
    sampling: Sampling,
) -> tuple[dict[str, WeightedSum], Pool, SampledProposals]:
    """`faster_rcnn_loss`, and for heads beside the box head the `pooler` of its features and its proposals."""
    targets.check_labels(model.num_classes)
    rpn_key, box_key = jr.split(key)
    features, output = model.extract(image, image_size)
    anchors = sample_anchors(
        output.anchors,
        targets,
        key=rpn_key,
        num_samples=sampling.rpn_samples,
        positive_fraction=sampling.rpn_positive_fraction,
        positive_iou=sampling.rpn_positive_iou,
        negative_iou=sampling.rpn_negative_iou,
    )
    # `output` is for proposals, which have no gradient: where the loss looks, the predictions are made again.
    losses = rpn_loss(*model.rpn.at_anchors(features, anchors.indices), anchors, targets)
    proposals = propose(
        output,
        image_size.astype(jnp.float32),
        pre_nms_top_n=sampling.pre_nms_top_n,
        post_nms_top_n=sampling.post_nms_top_n,
    )
    sampled = sample_proposals(
        proposals,
        targets,
        key=box_key,
        num_samples=sampling.box_samples,
        positive_fraction=sampling.box_positive_fraction,
        positive_iou=sampling.box_positive_iou,
    )
    pool = model.pooler(features)
    logits, deltas = model.box_head(pool(sampled.boxes, output_size=model.box_head.pool_size))
    return losses | box_loss(logits, deltas, sampled, targets), pool, sampled
