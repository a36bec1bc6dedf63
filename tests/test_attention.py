"""Attention, windows and the layers of vision transformers, against loops in NumPy."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx import models, nn, ops


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def random_like(tree, seed=0, scale=1.0):
    """The tree with normal values in its arrays."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(draw.normal(0, scale, leaf.shape), jnp.float32) if eqx.is_array(leaf) else leaf, tree
    )


def test_windows_keep_their_tokens_together():
    windows = nn.Windows(grid=(3, 5), size=2)
    tokens = jnp.arange(1.0, 16.0)[:, None]
    # Rows 1-5, 6-10 and 11-15 of the grid; zeros are padding.
    assert windows.split(tokens)[..., 0].tolist() == [
        [1, 2, 6, 7],
        [3, 4, 8, 9],
        [5, 0, 10, 0],
        [11, 12, 0, 0],
        [13, 14, 0, 0],
        [15, 0, 0, 0],
    ]
    assert windows.mask is None


def test_shifted_windows():
    """A 4×4 grid in windows of 2 tokens, rolled by one: the four corners meet in the last window."""
    windows = nn.Windows(grid=(4, 4), size=2, shift=(1, 1))
    tokens = jnp.arange(1.0, 17.0)[:, None]
    assert windows.split(tokens)[..., 0].tolist() == [[6, 7, 10, 11], [8, 5, 12, 9], [14, 15, 2, 3], [16, 13, 4, 1]]
    # Who may attend to whom within a window: all; the same column; the same row; nobody else.
    assert windows.mask is not None
    together = (np.asarray(windows.mask)[:, 0].reshape(4, 4, 4) == 0).astype(int).tolist()
    columns = [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    rows = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert together == [np.ones((4, 4), int).tolist(), columns, rows, np.eye(4, dtype=int).tolist()]
    assert set(np.unique(windows.mask)) == {-100, 0}


@pytest.mark.parametrize("grid", [(7, 7), (8, 13), (3, 20)])
@pytest.mark.parametrize("size, shift", [(0, 0), (4, 0), (4, 2), (7, 3)])
def test_merge_is_the_inverse_of_split(grid, size, shift):
    windows = nn.Windows(grid, size, (shift, shift))
    tokens = jr.normal(jr.key(0), (grid[0] * grid[1], 3))
    np.testing.assert_array_equal(windows.merge(windows.split(tokens)), tokens)


def test_a_shifted_window_does_not_join_opposite_borders():
    """A change at the right border changes no token at the left one, though both are in one window."""
    block = random_like(nn.TransformerBlock(8, 2, key=jr.key(0), positions=nn.PositionBias(4, 2, key=jr.key(1))))
    windows, x = nn.Windows((8, 8), 4, (2, 2)), jr.normal(jr.key(2), (64, 8))
    # Not by the same number in all channels, which the norm would subtract.
    changed = x.reshape(8, 8, 8).at[:, -1].multiply(-1.0).reshape(64, 8)
    difference = np.abs(block(x, windows) - block(changed, windows)).reshape(8, 8, 8).max(axis=2)
    assert (difference[:, :2] == 0).all() and (difference[:, 6:] > 1e-3).all()


@pytest.mark.parametrize("biased", [False, True])
def test_attention(getkey, biased):
    q, k, v = (jr.normal(getkey(), (2, 3, n, 4)) for n in (5, 6, 6))
    terms: Any = (jr.normal(getkey(), (1, 3, 5, 2, 1)), jr.normal(getkey(), (2, 1, 5, 1, 3))) if biased else ()
    logits = np.einsum("gand,gamd->ganm", q, k) / 2
    if biased:
        logits = logits + (np.asarray(terms[0]) + np.asarray(terms[1])).reshape(2, 3, 5, 6)
    expected = softmax(logits) @ np.asarray(v)
    np.testing.assert_allclose(nn.attention(q, k, v, terms), expected, atol=1e-5)


def test_relative_offsets(getkey):
    positions = random_like(nn.RelativeOffsets((3, 4), 5))
    q = jr.normal(getkey(), (2, 1, 12, 5))
    rows, columns = positions(q, (3, 4))
    found = np.asarray(rows + columns)  # (g, a, n, h, w)
    for y, x, i, j in np.ndindex(3, 4, 3, 4):
        vector = positions.vertical[y - i + 2] + positions.horizontal[x - j + 3]
        np.testing.assert_allclose(found[:, 0, 4 * y + x, i, j], np.asarray(q)[:, 0, 4 * y + x] @ vector, atol=1e-5)


def test_relative_offsets_of_another_size():
    """Five vectors for a side of 3 become seven for a side of 4, by linear interpolation at their centres."""
    table = jnp.asarray([[0.0], [1.0], [4.0], [9.0], [16.0]])
    positions = eqx.tree_at(lambda p: (p.vertical, p.horizontal), nn.RelativeOffsets((3, 3), 1), (table, table))
    rows, _ = positions(jnp.ones((1, 1, 16, 1)), (4, 4))
    places = np.clip((np.arange(7) + 0.5) * 5 / 7 - 0.5, 0, 4)
    expected = np.interp(places, np.arange(5), np.asarray(table)[:, 0])
    for y, i in np.ndindex(4, 4):
        np.testing.assert_allclose(rows[0, 0, 4 * y, i, 0], expected[y - i + 3], atol=1e-5)


def test_position_bias():
    positions = random_like(nn.PositionBias(3, 2, key=jr.key(0)))
    (found,) = positions(jnp.zeros((1, 2, 9, 4)), (3, 3))
    for y, x, i, j in np.ndindex(3, 3, 3, 3):
        row = (y - i + 2) * 5 + x - j + 2
        np.testing.assert_array_equal(found[0, :, 3 * y + x, i, j], positions.table[row])


def test_self_attention(getkey):
    module = random_like(nn.SelfAttention(8, 2, key=getkey()))
    tokens = jr.normal(getkey(), (3, 5, 8))
    q, k, v = (
        (np.asarray(tokens) @ np.asarray(weight).T + np.asarray(bias)).reshape(3, 5, 2, 4).swapaxes(1, 2)
        for weight, bias in zip(module.qkv.weight, module.qkv.bias, strict=True)
    )
    joined = (softmax(q @ k.swapaxes(2, 3) / 2) @ v).swapaxes(1, 2).reshape(3, 5, 8)
    expected = joined @ np.asarray(module.projection.weight).T + np.asarray(module.projection.bias)
    np.testing.assert_allclose(module(tokens, (5, 1)), expected, atol=1e-4)


def test_heads_must_divide_channels():
    with pytest.raises(ValueError, match="heads must divide channels, got 8 channels and 3 heads"):
        nn.SelfAttention(8, 3, key=jr.key(0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_norm(getkey, dtype):
    x = (jr.normal(getkey(), (6, 4, 5)) * 3 + 2).astype(dtype)
    wide = np.asarray(x, np.float64)
    for module, axis in ((nn.LayerNorm(5), 2), (nn.LayerNorm2d(6), 0)):
        module = random_like(module)
        shape = np.where(np.arange(3) == axis, x.shape[axis], 1)
        mean, variance = wide.mean(axis=axis, keepdims=True), wide.var(axis=axis, keepdims=True)
        weight, bias = (np.asarray(v, np.float64).reshape(shape) for v in (module.weight, module.bias))
        expected = (wide - mean) / np.sqrt(variance + 1e-6) * weight + bias
        found = module(x)
        assert found.dtype == dtype
        np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=1e-5 if dtype == jnp.float32 else 0.05)


def test_layer_norm_of_large_values():
    """The mean is subtracted before squares are summed: values of 1e4 keep their digits."""
    x = jnp.asarray([10000.0, 10001.0, 10002.0, 10003.0])
    np.testing.assert_allclose(nn.LayerNorm(4)(x), [-1.341641, -0.447214, 0.447214, 1.341641], atol=1e-5)


def test_drop_path():
    keys, x = jr.split(jr.key(0), 2000), jnp.ones((2, 3))
    found = np.asarray(jax.vmap(lambda key: nn.drop_path(x, 0.25, key=key))(keys))
    dropped = (found == 0).all(axis=(1, 2))
    np.testing.assert_allclose(found[~dropped], 1 / 0.75, rtol=1e-6)
    assert abs(dropped.mean() - 0.25) < 0.03


def cubic(distance, a=-0.75):
    x = abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


@pytest.mark.parametrize("size", [(4, 6), (9, 5), (2, 3), (13, 13)])
def test_resize_bicubic(size):
    x = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
    matrices = []
    for side, count in zip(x.shape[1:], size, strict=True):
        matrix = np.zeros((count, side))
        for i in range(count):
            centre = (i + 0.5) * side / count - 0.5
            for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
                matrix[i, min(max(j, 0), side - 1)] += cubic(centre - j)
        matrices.append(matrix)
    expected = np.einsum("ri,cij,sj->crs", matrices[0], x, matrices[1])
    np.testing.assert_allclose(ops.resize_bicubic(jnp.asarray(x), size), expected, atol=1e-5)


def tiny_vit(**options):
    return nn.ViT(
        16, 3, 2, key=jr.key(0), patch_size=8, side=4, window=3, global_blocks=(2,), relative_side=4, **options
    )


def tiny_swin(**options):
    return nn.Swin(8, (2, 2, 2, 2), (1, 2, 4, 8), key=jr.key(0), window=4, **options)


@pytest.mark.parametrize("make", [tiny_vit, pytest.param(tiny_swin, marks=pytest.mark.slow)])
def test_checkpointing_changes_no_gradient(make):
    image = jr.normal(jr.key(1), (3, 64, 96))

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(body):
        return sum(jnp.sin(x).sum() for x in jax.tree.leaves(body(image, key=jr.key(2))))

    plain, again = (jax.tree.leaves(gradient(random_like(make(checkpoint=c), scale=0.3))) for c in (False, True))
    for a, b in zip(again, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("make", [tiny_vit, tiny_swin])
def test_drop_path_needs_a_key(make):
    body, image = random_like(make(drop_path=0.5), scale=0.3), jr.normal(jr.key(1), (3, 64, 64))
    run = eqx.filter_jit(lambda key: jax.tree.leaves(body(image, key=key))[-1])
    alone = run(None)
    np.testing.assert_array_equal(run(None), alone)
    drawn = [run(jr.key(seed)) for seed in range(4)]
    assert all((x != alone).any() for x in drawn) and (drawn[0] != drawn[1]).any()


@pytest.mark.parametrize("make", [tiny_vit, tiny_swin])
def test_stages_hold_every_block(make):
    """All parameters but the last norms, so that freezing and learning rates by layer reach them."""
    body = make()
    in_stages = {id(leaf) for leaf in jax.tree.leaves(body.stages)}
    outside = {id(leaf) for leaf in jax.tree.leaves(body) if eqx.is_array(leaf)} - in_stages
    norms = body.norms if isinstance(body, nn.Swin) else ()
    assert outside == {id(leaf) for leaf in jax.tree.leaves(norms)}


def test_bfloat16():
    """Attention and norms in float32, matrix products in bfloat16."""
    body, image = random_like(tiny_vit(), scale=0.1), jr.normal(jr.key(1), (3, 64, 64))
    found, wanted = nn.cast(body, jnp.bfloat16)(image), body(image)
    assert found.dtype == jnp.bfloat16
    assert jnp.linalg.norm(found.astype(jnp.float32) - wanted) < 0.03 * jnp.linalg.norm(wanted)


@pytest.mark.slow
def test_square_canvas():
    """A preprocessing with a square canvas gives the features that this canvas gives."""
    backbone = nn.ViTFPN(random_like(tiny_vit(), scale=0.3), key=jr.key(1), channels=16)
    model = models.faster_rcnn_detectron2(
        backbone,
        3,
        key=jr.key(2),
        hidden_size=16,
        preprocessing=models.Preprocessing(models.ShortestEdge(64, 64), square_canvas=True),
    )
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    detect = eqx.filter_jit(models.detect)
    found, wanted = (
        detect(model, image, score_threshold=0.0),
        detect(model, image, score_threshold=0.0, canvas=(64, 64)),
    )
    np.testing.assert_array_equal(found.boxes, wanted.boxes)
    assert (detect(model, image, score_threshold=0.0, canvas=(48, 64)).boxes != wanted.boxes).any()


def test_sine_embedding():
    positions = np.random.default_rng(0).uniform(0, 1, (3, 4)).astype(np.float32)
    found = nn.sine_embedding(jnp.asarray(positions), 6, temperature=100.0)
    for i in range(3):
        angle = 2 * np.pi * positions / 100 ** (2 * i / 6)
        np.testing.assert_allclose(found[..., 2 * i], np.sin(angle), atol=1e-5)
        np.testing.assert_allclose(found[..., 2 * i + 1], np.cos(angle), atol=1e-5)


def test_sine_positions():
    found = nn.sine_positions((2, 5), 8)
    rows = nn.sine_embedding(jnp.array([0.5, 1.0]), 4)
    columns = nn.sine_embedding(jnp.arange(1.0, 6.0) / 5.0, 4)
    for row, column in np.ndindex(2, 5):
        np.testing.assert_allclose(found[:4, row, column], rows[row], atol=1e-5)
        np.testing.assert_allclose(found[4:, row, column], columns[column], atol=1e-5)
    inside = nn.sine_positions((4, 6), 8, size=jnp.array([2, 5], jnp.int32))
    np.testing.assert_allclose(inside[:, :2, :5], found, atol=1e-6)
