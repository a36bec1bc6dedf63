"""Which parameters a detector has, and which of them are trained."""

import equinox as eqx
import jax
from jaxtyping import PyTree

from ..nn import FrozenBatchNorm, ResNet


def trainable(model: PyTree, *, trainable_layers: int = 5) -> PyTree[bool]:
    """A tree like `model` that is true at the parameters to train: the partition for `make_train_step`.

    The vectors of a `FrozenBatchNorm` are never trained. `trainable_layers` counts the backbone's parts that are, from
    the top: 5 all, 4 all but the stem, 3 all but stem and first stage (torchvision's default for pretrained backbones),
    0 none; pyramid and heads always are.

    Any PyTree will do as `model`; less than 5 layers are a choice among those of the one `ResNet` in it.

    Raises a `ValueError` if `trainable_layers` is not in 0..5, or is less than 5 and there is no such ResNet.

    >>> import jax.random as jr
    >>> from detectax_eqx.models import FasterRCNN
    >>> from detectax_eqx.nn import ResNetFPN, resnet18
    >>> backbone = ResNetFPN(resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    >>> model = FasterRCNN(backbone, 3, key=jr.key(2), hidden_size=32)
    >>> chosen = trainable(model, trainable_layers=3)
    >>> chosen.backbone.body.conv1.weight, chosen.rpn.conv.weight
    (False, True)
    """
    if not 0 <= trainable_layers <= 5:
        raise ValueError(f"trainable_layers must be in 0..5, got {trainable_layers}.")
    frozen = jax.tree.map(lambda _: False, model)
    mask = jax.tree.map(
        lambda leaf: (
            jax.tree.map(lambda _: False, leaf) if isinstance(leaf, FrozenBatchNorm) else eqx.is_inexact_array(leaf)
        ),
        model,
        is_leaf=lambda leaf: isinstance(leaf, FrozenBatchNorm),
    )

    def frozen_parts(tree: PyTree) -> list[PyTree]:
        body = _resnet(tree)
        parts = [body.conv1, body.norm1] if trainable_layers < 5 else []
        return parts + list(body.layers[: max(0, 4 - trainable_layers)])

    return eqx.tree_at(frozen_parts, mask, frozen_parts(frozen)) if trainable_layers < 5 else mask


def in_resnet(tree: PyTree) -> PyTree[bool]:
    """A tree like `tree`, a detector or its parameters, that is true in the backbone's ResNet: a mask for optax.

    Imported weights are often trained at a lower rate than pyramid and heads, which start at random.

    >>> import jax.random as jr, optax
    >>> from detectax_eqx.models import faster_rcnn_resnet18_fpn
    >>> slower = optax.masked(optax.scale(0.1), in_resnet)
    >>> mask = in_resnet(eqx.filter_eval_shape(faster_rcnn_resnet18_fpn, 3, key=jr.key(0)))
    >>> mask.backbone.body.conv1.weight, mask.backbone.fpn.output[0].weight
    (True, False)
    """
    mask = jax.tree.map(lambda _: False, tree)
    return eqx.tree_at(_resnet, mask, jax.tree.map(lambda _: True, _resnet(tree)))


def num_parameters(model: PyTree) -> int:
    """Number of trainable numbers in a model, `FrozenBatchNorm`s left out as torchvision leaves out its buffers.

    The model may be one of shapes alone (`eqx.filter_eval_shape`).

    >>> import jax.random as jr
    >>> from detectax_eqx.models import faster_rcnn_resnet50_fpn
    >>> num_parameters(eqx.filter_eval_shape(lambda: faster_rcnn_resnet50_fpn(90, key=jr.key(0))))
    41755286
    """
    leaves = jax.tree.leaves(model, is_leaf=lambda leaf: isinstance(leaf, FrozenBatchNorm))
    return sum(leaf.size for leaf in leaves if eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct))


def _resnet(tree: PyTree) -> PyTree:
    """The ResNet within a detector."""
    found = [x for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, ResNet)) if isinstance(x, ResNet)]
    if len(found) != 1:
        number = "no" if not found else f"{len(found)}"
        raise ValueError(
            f"{type(tree).__name__} has {number} ResNet, and one is needed to tell its layers apart. Make the mask "
            f"yourself, with eqx.tree_at on that of trainable(model)."
        )
    return found[0]
