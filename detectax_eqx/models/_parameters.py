"""Selects and counts the parameters of a detector."""

import equinox as eqx
import jax
from jaxtyping import PyTree

from ..nn import FrozenBatchNorm, PatchPositions, Positions
from ._detector import AbstractDetector


def trainable(model: AbstractDetector, *, trainable_layers: int | None = None) -> PyTree[bool]:
    """Returns a tree like `model` that is true at the parameters to train, as `make_train_step` takes it.

    The vectors of a `FrozenBatchNorm` are never trained. `trainable_layers` is the number of the backbone's `stages` to
    train, counted from the top; default all. For a ResNet, 5 trains all stages, 4 all but the stem, 3 all but the stem
    and the first stage (torchvision's default for pretrained backbones), and 0 none. Layers above the stages are always
    trained.

    Raises a `ValueError` if the backbone has fewer stages.

    >>> import jax.random as jr
    >>> from detectax_eqx.models import faster_rcnn
    >>> from detectax_eqx.nn import BackboneWithFPN, resnet18
    >>> backbone = BackboneWithFPN(resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    >>> model = faster_rcnn(backbone, 3, key=jr.key(2), hidden_size=32)
    >>> chosen = trainable(model, trainable_layers=3)
    >>> chosen.backbone.body.conv1.weight, chosen.rpn.objectness.weight
    (False, True)
    """
    stages = len(model.backbone.stages)
    frozen = 0 if trainable_layers is None else stages - trainable_layers
    if not 0 <= frozen <= stages:
        raise ValueError(f"trainable_layers must be in 0..{stages}, got {trainable_layers}.")
    mask = jax.tree.map(
        lambda leaf: jax.tree.map(lambda _: False, leaf) if _is_frozen(leaf) else eqx.is_inexact_array(leaf),
        model,
        is_leaf=_is_frozen,
    )

    def frozen_stages(tree: PyTree) -> list[PyTree]:
        return [module for stage in tree.backbone.stages[:frozen] for module in stage]

    return eqx.tree_at(frozen_stages, mask, _all(frozen_stages(mask), False)) if frozen else mask


def in_backbone(tree: PyTree) -> PyTree[bool]:
    """Returns a tree like `tree` that is true in the backbone's stages: a mask for optax.

    `tree` is a detector or its parameters.

    Imported weights are often trained at a lower learning rate than the randomly initialised pyramid and heads.

    >>> import jax.random as jr, optax
    >>> from detectax_eqx.models import faster_rcnn
    >>> from detectax_eqx.nn import BackboneWithFPN, resnet18
    >>> slower = optax.masked(optax.scale(0.1), in_backbone)
    >>> backbone = BackboneWithFPN(resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    >>> mask = in_backbone(faster_rcnn(backbone, 3, key=jr.key(2), hidden_size=32))
    >>> mask.backbone.body.conv1.weight, mask.backbone.fpn.output[0].weight
    (True, False)
    """
    return eqx.tree_at(_stage_modules, _all(tree, False), _all(_stage_modules(tree), True))


def layer_rates(tree: PyTree, *, decay: float) -> PyTree[float]:
    """Returns a tree like `tree` of factors for the learning rate: `decay` to the power of the stages above a layer.

    `tree` is a detector or its parameters. The uppermost stage of the backbone has the factor `decay`, the one below it
    `decay**2`, and so on; layers above the stages have 1. Detectron2's rule for ViTDet, which has 0.7 for ViT-B.

    Raises a `ValueError` for a decay outside 0..1.

    >>> import jax.random as jr
    >>> from detectax_eqx.models import faster_rcnn
    >>> from detectax_eqx.nn import BackboneWithFPN, resnet18
    >>> backbone = BackboneWithFPN(resnet18(key=jr.key(0), width=8), key=jr.key(1), channels=16)
    >>> rates = layer_rates(faster_rcnn(backbone, 3, key=jr.key(2), hidden_size=32), decay=0.5)
    >>> rates.backbone.body.conv1.weight, rates.backbone.body.layers[3][0].conv1.weight, rates.rpn.objectness.weight
    (0.03125, 0.5, 1.0)
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be in 0..1, got {decay}.")
    stages = tree.backbone.stages
    factors = [
        jax.tree.map(lambda _, i=i: decay ** (len(stages) - i), module)
        for i, stage in enumerate(stages)
        for module in stage
    ]
    return eqx.tree_at(_stage_modules, jax.tree.map(lambda _: 1.0, tree), factors)


def decayed(tree: PyTree) -> PyTree[bool]:
    """A mask of weight decay for `train.adamw`: true at arrays of two or more axes but biases and positions.

    `tree` is a model or its parameters. Norms, biases and positions do not decay, as is usual for transformers.

    >>> import jax.random as jr
    >>> from detectax_eqx.nn import ViT
    >>> mask = decayed(ViT(8, 1, 2, key=jr.key(0)))
    >>> mask.patches.weight, mask.patches.bias, mask.positions.table
    (True, False, False)
    """

    def is_decayed(path: tuple, leaf: PyTree) -> PyTree[bool]:
        if _is_positions(leaf):
            return _all(leaf, False)
        return leaf.ndim > 1 and jax.tree_util.keystr(path[-1:], simple=True) != "bias"

    return jax.tree_util.tree_map_with_path(is_decayed, tree, is_leaf=_is_positions)


def num_parameters(model: PyTree) -> int:
    """Counts the trainable numbers of a model. `FrozenBatchNorm`s are excluded, as torchvision excludes buffers.

    The model may consist of shapes only (`eqx.filter_eval_shape`).

    >>> import jax.random as jr
    >>> from detectax_eqx.nn import resnet18
    >>> num_parameters(eqx.filter_eval_shape(lambda: resnet18(key=jr.key(0))))
    11166912
    """
    leaves = jax.tree.leaves(model, is_leaf=_is_frozen)
    return sum(leaf.size for leaf in leaves if eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct))


def _is_frozen(leaf: object) -> bool:
    return isinstance(leaf, FrozenBatchNorm)


def _is_positions(leaf: object) -> bool:
    return isinstance(leaf, PatchPositions | Positions)


def _stage_modules(tree: PyTree) -> list[PyTree]:
    return [module for stage in tree.backbone.stages for module in stage]


def _all(tree: PyTree, value: bool) -> PyTree[bool]:
    return jax.tree.map(lambda _: value, tree)
