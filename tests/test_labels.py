"""A label outside the model's classes raises an error that names label and image, rather than a silent NaN loss."""

import dataclasses

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from numpy.typing import ArrayLike

from detectax_eqx import Batch, Images, Targets, models, train

from . import tiny_detector


def _targets(labels, valid: ArrayLike = True):
    labels = np.asarray(labels, np.int32)
    boxes = np.broadcast_to(np.array([8, 8, 40, 40], np.float32), (*labels.shape, 4))
    return Targets(boxes, labels, np.broadcast_to(np.asarray(valid), labels.shape).copy())


def _batch(labels, valid=True):
    targets = _targets(labels, valid)
    count = len(targets.labels)
    sizes = np.full((count, 2), 64, np.int32)
    pixels, indices = np.zeros((count, 64, 64, 3), np.uint8), np.arange(count, dtype=np.int32) + 10
    images = Images(pixels, sizes, sizes, indices, np.ones(count, bool), canvas=(64, 64))
    return Batch(images, targets, overflow=np.zeros(count, np.int32))


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("label", [-2, -1, 3, 2**31 - 1])
def test_label_and_image_are_named(make, label):
    targets = jax.tree.map(make, _targets([[0, 2], [1, label]]))
    with pytest.raises(ValueError, match=rf"must be in 0\.\.2, but image 1 has label {label} in row 1"):
        targets.check_labels(3)
    with pytest.raises(ValueError, match=rf"must be in 0\.\.2, but there is {label} in row 1"):
        jax.tree.map(lambda x: x[1], targets).check_labels(3)
    _targets([[0, 2], [1, label]], valid=[[True, True], [True, False]]).check_labels(3)


def test_a_batch_names_the_position_in_its_dataset():
    batch = _batch([[0, 1], [2, 0], [0, 5]])
    with pytest.raises(ValueError, match=r"image 2 of the batch \(index 12 of its dataset\) has label 5 in row 1"):
        batch.check_labels(3)
    batch.images.valid[2] = False
    batch.check_labels(3)


def _step_of(model, mesh=None):
    optimizer = optax.sgd(0.1)
    trainable = jax.tree.map(lambda leaf: True, model)
    state = train.init_train_state(model, optimizer, trainable=trainable, key=jr.key(0))

    def loss(model, example, *, key):
        raise AssertionError("nothing should be compiled")

    return state, train.make_train_step(loss, optimizer, trainable=trainable, mesh=mesh)


@pytest.mark.parametrize("devices", [None, 4])
def test_a_step_refuses_them_before_anything_runs(devices):
    mesh = None if devices is None else train.make_mesh(jax.devices()[:devices])
    state, step = _step_of(tiny_detector.build(), mesh)
    batch = _batch([[0, 1], [2, 0], [0, 2], [0, -1]])
    if mesh is not None:
        state, batch = train.shard_state(state, mesh), train.shard_batch(batch, mesh)
    with pytest.raises(ValueError, match=r"image 3 of the batch \(index 13 of its dataset\) has label -1 in row 1"):
        step(state, batch)


def test_losses_refuse_them():
    model, image, size = tiny_detector.build(), jnp.zeros((64, 64, 3)), jnp.array([64, 64])
    targets = _targets([0, 3])
    with pytest.raises(ValueError, match="there is 3 in row 1"):
        model.loss(image, size, targets, key=jr.key(0))
    masks = np.ones((2, 14, 14), np.float32)
    targets = dataclasses.replace(targets, masks=masks, mask_boxes=targets.boxes)
    with pytest.raises(ValueError, match="there is 3 in row 1"):
        model.loss(image, size, targets, key=jr.key(0))


@pytest.mark.parametrize("label", [-2, -1, 3, 100])
def test_a_compiled_loss_takes_them_for_no_other_class(label):
    """An invalid label counts neither as background nor as a class indexed from the end."""
    boxes = jnp.array([[0.0, 0.0, 8.0, 8.0]])
    sampled = models.SampledProposals(boxes, jnp.array([True]), jnp.array([True]), jnp.array([0]))
    logits, deltas = jnp.zeros((1, 4)), jnp.zeros((1, 4, 4))
    targets = Targets(boxes, jnp.array([label], jnp.int32), jnp.array([True]))
    losses = jax.jit(models.box_loss)(logits, deltas, sampled, targets)
    assert np.isnan(losses["loss_classifier"].total)
    with pytest.raises(ValueError, match=f"there is {label} in row 0"):
        models.box_loss(logits, deltas, sampled, targets)
