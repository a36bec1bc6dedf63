"""What tests of detection transformers share: losses beside stored ones, padding of targets, files in the zoo."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from detectax_eqx import Targets, weights, zoo
from detectax_eqx.zoo import _weights


def compare_losses(detector, pixels, sizes, targets, expected, gradients_by_name) -> None:
    """Every loss of a batch and some gradients in double precision; call it with x64 enabled.

    - `sizes`: `(height, width)` of each image on its canvas.
    - `expected`: by names `loss.…` and `grad.…`. `gradients_by_name`: from a model to arrays by the latter names.
    """
    model: Any = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), detector)

    @eqx.filter_jit
    @eqx.filter_grad(has_aux=True)
    def total(model):
        terms = jax.vmap(lambda *one: model.loss(*one, key=jr.key(0)))(pixels, sizes, targets)
        losses = {term: jax.tree.map(lambda x: x.sum(), values).mean() for term, values in terms.items()}
        return sum(losses.values()), losses

    grads, losses = total(model)
    assert losses.keys() == {key.removeprefix("loss.") for key in expected if key.startswith("loss.")}
    for term, loss in losses.items():
        np.testing.assert_allclose(loss, expected[f"loss.{term}"], rtol=1e-6, err_msg=term)
    grads = gradients_by_name(grads)
    names = [key.removeprefix("grad.") for key in expected if key.startswith("grad.")]
    assert len(names) >= 7
    for name in names:
        difference = np.linalg.norm(grads[name] - expected[f"grad.{name}"])
        assert difference < 1e-6 * np.linalg.norm(expected[f"grad.{name}"]), name


def check_padding(model, pixels, size, boxes, labels) -> None:
    """Invalid targets, wherever they stand, change nothing. Takes one image with six objects or more."""
    loss = eqx.filter_jit(lambda targets: model.loss(jnp.asarray(pixels), size, targets, key=jr.key(0)))
    plain = Targets(boxes[:6], labels[:6], np.ones(6, bool))
    where = np.array([1, 2, 4, 5, 7, 8])
    spread = Targets(np.full((9, 4), np.nan, np.float32), np.zeros(9, np.int32), np.zeros(9, bool))
    spread.boxes[where], spread.labels[where], spread.valid[where] = plain.boxes, plain.labels, True
    for one, other in zip(loss(plain).values(), loss(spread).values(), strict=True):
        np.testing.assert_allclose(one.mean(), other.mean(), rtol=1e-6)


def check_files_in_the_zoo(name, hugging_face, folder, **parts) -> None:
    """A Hugging Face file of a DETR is distinguished from one of this package, and its classes are counted.

    - `hugging_face`: from arrays by the authors' names to those by Hugging Face's. `parts`: of the detector.
    """
    shapes = eqx.filter_eval_shape(zoo.build, name, 4, key=jr.key(0), **parts)
    draw = np.random.default_rng(0)
    model = jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), x.dtype), shapes)
    theirs, ours = folder / "theirs.safetensors", folder / "ours.safetensors"
    weights.save_safetensors(hugging_face(weights.to_detr(model)), theirs)
    weights.save_safetensors(model, ours)
    for path, source in ((theirs, _weights._DETR), (ours, _weights._TORCHVISION)):
        assert _weights.source_of(zoo.Architecture(name), path) is source
        assert _weights.count_classes(zoo.Architecture(name), path) == 4
        assert eqx.tree_equal(source.load(shapes, path), model)
