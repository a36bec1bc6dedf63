"""LW-DETR against Hugging Face's with equal parameters: detections in real images, losses and gradients."""
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

from . import lw_detr_models as theirs
from .detr_models import arrays_of
from .double import double_precision, in_double
from .torchvision_models import real_images


IMAGES, SIZE = 4, 640


def loaded(size, model):
    shapes = eqx.filter_eval_shape(lambda: zoo.build(f"lw_detr_{size}", 91, key=jr.key(0)))
    return weights.load_rf_detr(shapes, arrays_of(model))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", theirs.SIZES)
def test_detections_on_real_images(size):
    """All predictions in order, in double precision: boxes within .01 px, scores within 1e-5, equal labels."""
    images = real_images(IMAGES)
    if len(images) < IMAGES:
        pytest.skip("no folder of real images beside the repository")
    model = theirs.new_detector(size).double()
    ours, classes = loaded(size, model), set()
    for image in images:
        expected = theirs.detections(model, image, SIZE, model.config.num_queries)
        with double_precision():
            found = jax.tree.map(np.asarray, eqx.filter_jit(models.detect)(in_double(ours), image))
        scores, boxes = (np.abs(getattr(found, key) - expected[key]).max() for key in ("scores", "boxes"))
        print(f"{size} {image.shape}: boxes {boxes:.1e} px, scores {scores:.1e}")
        np.testing.assert_array_equal(found.labels, expected["labels"])
        assert boxes < 0.01 and scores < 1e-5
        classes |= set(found.labels.tolist())
    assert len(classes) > 2


@pytest.mark.timeout(1800)
def test_losses_and_gradients():
    """In double precision: 1e-6, on a batch with 0, 1 and 40 objects in images of 320×320."""
    model = theirs.new_detector("tiny")
    draw, side, capacity = np.random.default_rng(0), 320, 60
    pixels = draw.integers(0, 256, (3, side, side, 3)).astype(np.uint8)
    corners = draw.uniform(0, side - 80, (3, capacity, 2))
    boxes = np.concatenate([corners, corners + draw.uniform(6, 80, corners.shape)], axis=2).astype(np.float32)
    labels = draw.integers(0, 91, (3, capacity)).astype(np.int32)
    valid = np.arange(capacity) < np.array([0, 1, 40])[:, None]
    ours = loaded("tiny", model)
    expected = theirs.losses(model.double(), pixels, boxes, labels, valid)
    torch.stack(list(expected.values())).sum().backward()
    with jax.enable_x64(True):
        ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), ours)
        targets = Targets(jnp.asarray(boxes, jnp.float64), jnp.asarray(labels), jnp.asarray(valid))
        canvas = jnp.array([side, side], jnp.int32)

        @eqx.filter_jit
        @eqx.filter_grad(has_aux=True)
        def total(model):
            one = lambda image, targets: model.loss(image, canvas, targets, key=jr.key(0))  # noqa: E731
            terms = jax.vmap(one)(jnp.asarray(pixels), targets)
            losses = {term: jax.tree.map(lambda x: x.sum(), values).mean() for term, values in terms.items()}
            return sum(losses.values()), losses

        grads, losses = total(ours)
    for term, loss in losses.items():
        np.testing.assert_allclose(loss, expected[term].item(), rtol=1e-6, err_msg=term)
    wanted = {name: x.grad.numpy() for name, x in model.named_parameters() if x.grad is not None}
    grads, differences = weights.read_rf_detr(weights.to_rf_detr(grads)), {}
    for key, array in weights.read_rf_detr(wanted).items():
        if key.endswith(("in_proj_bias", "attention.qkv.bias")):  # the bias of keys has a gradient of 0, or none at all
            array, grads[key] = array[[0, 2]], grads[key][[0, 2]]
        differences[key] = np.abs(grads[key] - array).max() / np.abs(array).max()
    worst = max(differences, key=lambda key: differences[key])
    print(f"gradients of {len(differences)} parameters, worst {differences[worst]:.1e} ({worst})")
    assert len(differences) > 150 and differences[worst] < 1e-6
