"""Box heads in stages: one head, or a cascade of heads that refine its boxes (Cascade R-CNN, arXiv:1712.00726)."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from .._types import Targets, WeightedSum
from ..ops import RoIFeatures, clip_boxes, decode_boxes
from ._box_head import BoxHead, ConvBoxHead, SampledProposals, box_loss, match_proposals
from ._rpn import SMOOTH_L1_BETA, Proposals, Weights, has_area


# The weights of the box coders, and the IoU from which boxes are positive in each stage after the first
# (Cascade R-CNN, sections 4.2 and 5.1).
CASCADE_WEIGHTS: tuple[Weights, ...] = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
CASCADE_IOUS = (0.6, 0.7)


class CascadeHead(eqx.Module):
    """Box heads of which each refines the boxes of the one before. Their scores are averaged.

    In training, each stage asks for a higher IoU of a positive box. A box is the same for all classes.

    - `positive_ious`: IoU from which a box is positive in the second stage and those after it. The first stage has the
      `box_positive_iou` of `TwoStageSampling`.
    """

    stages: tuple[BoxHead | ConvBoxHead, ...]
    positive_ious: tuple[float, ...] = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        key: PRNGKeyArray,
        hidden_size: int = 1024,
        weights: tuple[Weights, ...] = CASCADE_WEIGHTS,
        positive_ious: tuple[float, ...] = CASCADE_IOUS,
        smooth_l1_beta: float = SMOOTH_L1_BETA,
        head: Callable[..., BoxHead | ConvBoxHead] = BoxHead,
    ):
        """Initialises the heads.

        - `num_classes`: foreground classes.
        - `hidden_size`, `smooth_l1_beta`: of each head. `head`: their class.
        - `weights`: of the box coder of each stage.
        """
        if len(weights) != len(positive_ious) + 1:
            raise ValueError(
                f"positive_ious must have one number for each stage after the first: {len(weights) - 1} for "
                f"{len(weights)} weights, got {positive_ious}."
            )
        options = {"hidden_size": hidden_size, "smooth_l1_beta": smooth_l1_beta, "class_agnostic": True}
        keys = jr.split(key, len(weights))
        self.stages = tuple(
            head(channels, num_classes, key=k, weights=w, **options) for k, w in zip(keys, weights, strict=True)
        )
        self.positive_ious = positive_ious

    @property
    def num_classes(self) -> int:
        """Number of foreground classes."""
        return self.stages[0].num_classes


# Refines boxes in `stages`, of which a head on its own has one.
AnyBoxHead = BoxHead | ConvBoxHead | CascadeHead


def run_stages(
    head: AnyBoxHead, rois: RoIFeatures, proposals: Proposals, image_size: Float[Array, " 2"]
) -> tuple[Float[Array, "p k1"], Float[Array, "p k1 4"], Proposals]:
    """Returns class logits, the deltas of the last stage, and the proposals that it refines.

    With several stages, the logits are the logarithms of the averaged probabilities.

    >>> maps = jnp.ones((8, 16, 16)), jnp.ones((8, 8, 8))
    >>> rois = RoIFeatures(maps, strides=(4, 8), sampling_ratio=2)
    >>> proposals = Proposals(jnp.array([[4.0, 4.0, 40.0, 30.0]]), jnp.ones(1), jnp.array([True]))
    >>> head = CascadeHead(8, 3, key=jr.key(0), hidden_size=16)
    >>> logits, deltas, refined = run_stages(head, rois, proposals, jnp.array([64.0, 64.0]))
    >>> logits.shape, deltas.shape, round(float(jnp.exp(logits).sum()), 4)
    ((1, 4), (1, 4, 4), 1.0)
    """
    stages, log_probabilities = head.stages, []
    logits, deltas = _run(stages[0], rois, proposals.boxes)
    for before, stage in pairwise(stages):
        log_probabilities.append(jax.nn.log_softmax(logits))
        proposals = replace(proposals, boxes=_refined(before, deltas, proposals.boxes, image_size))
        logits, deltas = _run(stage, rois, proposals.boxes)
    if log_probabilities:
        log_probabilities.append(jax.nn.log_softmax(logits))
        logits = jax.nn.logsumexp(jnp.stack(log_probabilities), axis=0) - jnp.log(float(len(stages)))
    return logits, deltas, proposals


def stage_losses(
    head: AnyBoxHead, rois: RoIFeatures, sampled: SampledProposals, targets: Targets, image_size: Float[Array, " 2"]
) -> dict[str, WeightedSum]:
    """Returns the losses of `box_loss`, in a cascade those of each stage: `loss_classifier_stage0`, ….

    The boxes that a stage refines are matched to the objects again, without sampling. They have no gradient. The
    gradient of the features is divided by the number of stages, as in Detectron2.
    """
    if not isinstance(head, CascadeHead):
        logits, deltas = _run(head, rois, sampled.boxes)
        return box_loss(logits, deltas, sampled, targets, weights=head.weights, beta=head.smooth_l1_beta)
    rois = jax.tree.map(lambda features: optax.scale_gradient(features, 1 / len(head.stages)), rois)
    losses: dict[str, WeightedSum] = {}
    for i, stage in enumerate(head.stages):
        logits, deltas = _run(stage, rois, sampled.boxes)
        terms = box_loss(logits, deltas, sampled, targets, weights=stage.weights, beta=stage.smooth_l1_beta)
        losses |= {f"{name}_stage{i}": term for name, term in terms.items()}
        if i < len(head.positive_ious):
            boxes = lax.stop_gradient(_refined(stage, deltas, sampled.boxes, image_size))
            valid = sampled.valid & has_area(boxes)
            sampled = match_proposals(boxes, valid, targets, positive_iou=head.positive_ious[i])
    return losses


def _run(
    head: BoxHead | ConvBoxHead, rois: RoIFeatures, boxes: Float[Array, "p 4"]
) -> tuple[Float[Array, "p k1"], Float[Array, "p k1 4"]]:
    return head(rois.pool(boxes, output_size=head.pool_size))


def _refined(
    head: BoxHead | ConvBoxHead, deltas: Float[Array, "p k1 4"], boxes: Float[Array, "p 4"], size: Float[Array, " 2"]
) -> Float[Array, "p 4"]:
    """The box of a stage, the same for all classes, clipped to the image."""
    return clip_boxes(decode_boxes(deltas[:, 0], boxes, weights=head.weights), size)
