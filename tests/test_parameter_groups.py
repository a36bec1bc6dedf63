"""Learning rates and decay by group: every parameter moves as it would alone, with the options of its group."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from detectax_eqx import models, nn, train

from .tiny_detector import random_arrays


RATE, DECAY, FACTOR = 0.1, 0.5, 0.25
leaves_with_path = jax.tree_util.tree_leaves_with_path


@pytest.fixture(scope="module")
def parameters():
    """The trained parameters of a Mask R-CNN whose stem is frozen."""

    def build():
        body = nn.ResNet(nn.BasicBlock, (1, 1, 1, 1), key=jr.key(0), width=8, norm=nn.GroupNorm)
        backbone = nn.BackboneWithFPN(body, key=jr.key(1), channels=16)
        return models.mask_rcnn(backbone, 3, key=jr.key(2), hidden_size=32, hidden_channels=16)

    model = random_arrays(eqx.filter_eval_shape(build))
    return eqx.filter(model, models.trainable(model, trainable_layers=4))


def updated(optimizer, tree):
    """A tree after three updates with different gradients."""
    state = optimizer.init(tree)

    @jax.jit
    def step(tree, state, scale):
        gradient = jax.tree.map(lambda leaf: scale * jnp.cos(leaf), tree)
        updates, state = optimizer.update(gradient, state, tree)
        return optax.apply_updates(tree, updates), state

    for scale in (1.0, -2.0, 0.0):
        tree, state = step(tree, state, scale)
    return tree


@pytest.mark.parametrize("build", [train.sgd, train.adamw])
def test_each_parameter_moves_as_alone(parameters, build):
    grouped = optax.chain(
        build(RATE, weight_decay=DECAY, decay_mask=train.no_vectors),
        optax.masked(optax.scale(FACTOR), models.in_backbone),
    )
    together = {jax.tree_util.keystr(p): leaf for p, leaf in leaves_with_path(updated(grouped, parameters))}
    groups = {}
    for path, leaf in leaves_with_path(parameters):
        name = jax.tree_util.keystr(path)
        slow, decays = "body" in name, path[-1].name == "weight" and "norm" not in name
        groups.setdefault((slow, decays), {})[name] = leaf
    assert len(groups) == 4
    for (slow, decays), group in groups.items():
        alone = updated(build(RATE * (FACTOR if slow else 1), weight_decay=DECAY * decays), group)
        for name, leaf in alone.items():
            np.testing.assert_allclose(together[name], leaf, rtol=1e-5, atol=1e-7, err_msg=name)


def test_a_frozen_part_has_no_group(parameters):
    assert models.in_backbone(parameters).backbone.body.conv1.weight is None


@pytest.fixture(scope="module")
def transformer():
    body = nn.ViT(8, 3, 2, key=jr.key(0), window=2, relative_side=4)
    backbone = nn.ViTFPN(body, key=jr.key(1), channels=16)
    return models.faster_rcnn(backbone, 3, key=jr.key(2), hidden_size=16)


def test_learning_rates_by_layer(transformer):
    """ViTDet's rule (Detectron2's `get_vit_lr_decay_rate`): of three blocks, the last has one power of the decay."""
    rates = models.layer_rates(transformer, decay=0.5)
    body = rates.backbone.body
    assert [set(jax.tree.leaves(block)) for block in body.blocks] == [{0.125}, {0.25}, {0.5}]
    assert set(jax.tree.leaves((body.patches, body.positions))) == {0.0625}
    others = (rates.backbone.levels, rates.rpn, rates.box_head)
    assert set(jax.tree.leaves(others)) == {1.0}


def test_frozen_layers_have_no_rate(transformer):
    chosen = eqx.filter(transformer, models.trainable(transformer, trainable_layers=2))
    body = models.layer_rates(chosen, decay=0.5).backbone.body
    assert body.positions.table is None and body.blocks[0].mlp.fc1.weight is None
    assert body.blocks[2].mlp.fc1.weight == 0.5


def test_what_decays(transformer):
    """Matrices and kernels; not norms, biases or positions."""
    mask = models.decayed(transformer)
    block = mask.backbone.body.blocks[0]
    assert set(jax.tree.leaves((block.attention.positions, block.norm1, mask.backbone.body.positions))) == {False}
    assert block.attention.qkv.weight and not block.attention.qkv.bias
    assert mask.box_head.fc6.weight and not mask.box_head.fc6.bias
