"""DETR and Deformable DETR against Hugging Face's at equal parameters: detections in real images, losses, gradients."""
# pyright: reportMissingImports=false

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx import Targets, models, weights, zoo


torch = pytest.importorskip("torch", reason="torch is not installed; `make parity` brings it")
pytest.importorskip("transformers", reason="transformers is not installed; `make parity` brings it")

from .. import detr_tiny as tiny
from . import detr_models as theirs
from .double import double_precision, in_double
from .torchvision_models import real_images


IMAGES = 4
KINDS = pytest.mark.parametrize("kind", tiny.KINDS)


def loaded(name, model):
    shapes = eqx.filter_eval_shape(lambda: zoo.build(name, 91, key=jr.key(0)))
    return weights.load_detr(shapes, theirs.arrays_of(model))


@pytest.mark.timeout(1800)
@KINDS
@pytest.mark.parametrize("canvas", [None, (1344, 1344)], ids=["alone", "padded"])
def test_detections_on_real_images(kind, canvas):
    """As Hugging Face's processor and model detect them: boxes within .01 px, scores within 1e-5.

    In double precision: a dozen layers of random attention amplify rounding to another choice of cells.
    """
    images = real_images(IMAGES)
    if len(images) < IMAGES:
        pytest.skip("no folder of real images beside the repository")
    model = theirs.new_detector("resnet50", kind)
    theirs.adjust(model, images[0], 800, 1333, canvas)
    ours = loaded(f"{kind}_resnet50", model)
    classes: set[int] = set()
    for image in images:
        expected = theirs.detections(model.double(), image, 800, 1333, canvas)
        with double_precision():
            found = eqx.filter_jit(lambda m, x: models.detect(m, x, canvas=canvas))(in_double(ours), image)
            found = jax.tree.map(np.asarray, found)
        scores, boxes = (np.abs(getattr(found, key) - expected[key]).max() for key in ("scores", "boxes"))
        print(f"{image.shape}: boxes {boxes:.1e} px, scores {scores:.1e}")
        np.testing.assert_array_equal(found.labels, expected["labels"])
        assert boxes < 0.01 and scores < 1e-5
        classes |= set(np.asarray(found.labels).tolist())
    assert len(classes) > 10


@pytest.mark.timeout(1800)
@KINDS
def test_losses_and_gradients(kind):
    """In double precision: 1e-6, of all parameters, on a batch with 0, 1 and 40 objects."""
    model = theirs.new_detector("resnet50", kind)
    draw, sizes, capacity = np.random.default_rng(0), ((192, 256), (130, 256), (192, 201)), 60
    pixels = draw.integers(0, 256, (3, 192, 256, 3)).astype(np.uint8)
    limits = np.array([[width, height] for height, width in sizes])[:, None] - 40
    corners = draw.uniform(0, 1, (3, capacity, 2)) * limits
    boxes = np.concatenate([corners, corners + draw.uniform(6, 40, corners.shape)], axis=2).astype(np.float32)
    labels = draw.integers(0, 91, (3, capacity)).astype(np.int32)
    valid = np.arange(capacity) < np.array([0, 1, 40])[:, None]
    ours = loaded(f"{kind}_resnet50", model)
    expected = theirs.losses(model.double(), pixels, sizes, boxes, labels, valid)
    torch.stack(list(expected.values())).sum().backward()
    with jax.enable_x64(True):
        ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), ours)
        targets = Targets(jnp.asarray(boxes, jnp.float64), jnp.asarray(labels), jnp.asarray(valid))

        @eqx.filter_jit
        @eqx.filter_grad(has_aux=True)
        def total(model):
            arrays = jnp.asarray(pixels), jnp.array(sizes, jnp.int32), targets
            terms = jax.vmap(lambda *one: model.loss(*one, key=jr.key(0)))(*arrays)
            losses = {term: jax.tree.map(lambda x: x.sum(), values).mean() for term, values in terms.items()}
            return sum(losses.values()), losses

        grads, losses = total(ours)
    for term, loss in losses.items():
        np.testing.assert_allclose(loss, expected[term].item(), rtol=1e-6, err_msg=term)
    wanted = weights.read_detr({name: x.grad.numpy() for name, x in model.named_parameters() if x.grad is not None})
    grads, differences = weights.read_detr(weights.to_detr(grads)), {}
    for key, array in wanted.items():
        # These have gradients of 0 in exact arithmetic: the bias of keys, and attention among queries that are all 0.
        if kind == "detr" and "decoder.layers.0.self_attn.in_proj" in key:
            assert max(np.abs(grads[key][:2]).max(), np.abs(array[:2]).max()) < 1e-12
            array, grads[key] = array[2], grads[key][2]
        elif key.endswith("in_proj_bias"):
            array, grads[key] = array[[0, 2]], grads[key][[0, 2]]
        if kind == "detr" and key.endswith("decoder.layers.0.self_attn.in_proj_weight"):
            continue
        differences[key] = np.abs(grads[key] - array).max() / np.abs(array).max()
    worst = max(differences, key=lambda key: differences[key])
    print(f"gradients of {len(differences)} parameters, worst {differences[worst]:.1e} ({worst})")
    assert len(differences) > 200 and differences[worst] < 1e-6
