"""Transformers whose heads and MLPs are cut over eight devices train as on one, and send only their tokens."""

import math
from collections import Counter
from dataclasses import replace
from functools import cache

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx import models, nn, train

from . import tiny_detector
from .test_scaling import arrays, require_the_same, sent


STEPS, IMAGES, CHANNELS, WINDOW = 5, 4, 32, 3
SIZES = ((8.0,), (16.0,), (24.0,), (32.0,), (48.0,))


def vit(key):
    body = nn.ViT(CHANNELS, 2, 8, key=key, side=4, window=WINDOW, global_blocks=(1,), relative_side=4)
    return nn.ViTFPN(body, key=key, channels=16)


def swin(key):
    """The three heads of its first stage cannot be cut over eight devices, but its MLP can."""
    body = nn.Swin(12, (1, 2, 1, 1), (3, 8, 8, 8), key=key, window=WINDOW, drop_path=0.0)
    return nn.BackboneWithFPN(body, key=key, channels=16, norm=nn.LayerNorm2d)


@eqx.filter_jit
def build(make_backbone, key):
    """A Faster R-CNN whose attention is not nearly uniform."""
    keys = jr.split(key, 3)
    backbone = make_backbone(keys[0])

    def decisive(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name.endswith("qkv.weight"):
            return 10 * leaf
        return leaf + 0.2 * jr.normal(keys[1], leaf.shape) if ".attention.positions." in name else leaf

    backbone = jax.tree_util.tree_map_with_path(decisive, backbone)
    model = models.faster_rcnn(backbone, 3, key=keys[2], hidden_size=32, anchor_sizes=SIZES)
    preprocessing = models.Preprocessing(models.ShortestEdge(tiny_detector.SIDE, tiny_detector.SIDE))
    return replace(model, sampling=tiny_detector.SAMPLING, preprocessing=preprocessing)


@cache
def trained(make_backbone, tensor, shards=1):
    """State, metrics of each step and the program's text, over eight devices or on one (`tensor` 0)."""
    model = build(make_backbone, jr.key(0))
    trainable, optimizer = models.trainable(model), train.sgd(0.02)
    mesh = train.make_mesh(jax.devices()[:8], model=shards, tensor=tensor) if tensor else None
    step = train.make_train_step(tiny_detector.loss, optimizer, trainable=trainable, mesh=mesh)
    state = train.init_train_state(model, optimizer, trainable=trainable, key=jr.key(1), ema=True)
    batches = [jax.tree.map(lambda x: x[:IMAGES], tiny_detector.make_batch(k)) for k in range(STEPS)]
    if mesh is not None:
        state, batches = train.shard_state(state, mesh), [train.shard_batch(batch, mesh) for batch in batches]
    program = eqx.filter_jit(lambda batch, state: step(state, batch), donate="all-except-first")
    program = program.lower(batches[0], state).compile()  # pyright: ignore[reportFunctionMemberAccess]
    history, layout = [], [leaf.sharding for leaf in arrays(state)]
    for batch in batches:
        state, metrics = program(batch, state)
        history.append({name: float(value) for name, value in metrics.items()})
    assert [leaf.sharding for leaf in arrays(state)] == layout
    return state, history, program.compiled.as_text()


@pytest.mark.slow
@pytest.mark.parametrize("make_backbone, tensor, shards", [(vit, 8, 1), (vit, 2, 2), (swin, 8, 1)])
def test_the_same_as_on_one_device(make_backbone, tensor, shards):
    require_the_same(trained(make_backbone, 0), trained(make_backbone, tensor, shards))


@pytest.mark.slow
def test_each_device_holds_its_heads_and_hidden_values():
    state, _, _ = trained(vit, 8)
    for tree in (state.model, state.ema):
        for block in tree.backbone.body.blocks:
            attention, mlp = block.attention, block.mlp
            for array, shape in (
                (attention.qkv.weight, (3, CHANNELS // 8, CHANNELS)),
                (attention.qkv.bias, (3, CHANNELS // 8)),
                (attention.projection.weight, (CHANNELS, CHANNELS // 8)),
                (mlp.fc1.weight, (4 * CHANNELS // 8, CHANNELS)),
                (mlp.fc1.bias, (4 * CHANNELS // 8,)),
                (mlp.fc2.weight, (CHANNELS, 4 * CHANNELS // 8)),
            ):
                assert array.addressable_shards[0].data.shape == shape
    whole = [leaf for leaf in arrays(state.model) if leaf.sharding.is_fully_replicated]
    assert len(whole) == len(arrays(state.model)) - 2 * 6


def test_blocks_send_their_tokens_and_nothing_else():
    """Twice forward and twice backward for each block, and the gradients of relative positions, which heads share."""
    _, _, text = trained(vit, 8)
    messages = Counter((kind, math.prod(shape)) for kind, shape in sent(text)[0])
    windowed, tokens = IMAGES * 4 * WINDOW**2 * CHANNELS, IMAGES * 16 * CHANNELS
    assert {kind for kind, _ in messages} == {"all-reduce"}
    offsets = Counter({("all-reduce", (2 * side - 1) * CHANNELS // 8): 2 for side in (WINDOW, 4)})
    # The first block attends within windows, which are padded.
    expected = Counter({("all-reduce", windowed): 2, ("all-reduce", tokens): 2 + 4})
    assert messages == expected + offsets


def test_heads_that_do_not_divide_stay_whole():
    attention = nn.SelfAttention(12, 3, key=jr.key(0))
    assert attention.tensor_axes(2) == {} and attention.tensor_axes(3)["qkv.weight"] == 1
    assert nn.MLP(4, 6, key=jr.key(0)).tensor_axes(4) == {}
    mesh = train.make_mesh(jax.devices()[:2], tensor=2)
    assert train.num_parts(mesh) == 1
    placed = train.shard_state({"attention": attention, "mlp": nn.MLP(4, 6, key=jr.key(0))}, mesh)
    assert placed["attention"].qkv.weight.sharding.is_fully_replicated
    assert placed["mlp"].fc2.weight.addressable_shards[0].data.shape == (4, 3)
    assert placed["mlp"].fc2.bias.sharding.is_fully_replicated


def test_a_batch_is_repeated_over_the_devices_that_share_it():
    mesh = train.make_mesh(jax.devices()[:8], tensor=4)
    placed = train.shard_batch(np.arange(4), mesh)
    assert [shard.data.tolist() for shard in placed.addressable_shards] == [[0, 1]] * 4 + [[2, 3]] * 4
    assert train.local_rows(mesh, 4).tolist() == [0, 1, 2, 3]
