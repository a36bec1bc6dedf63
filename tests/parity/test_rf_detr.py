"""RF-DETR against rfdetr with equal parameters: detections in real images, losses and gradients."""
# pyright: reportMissingImports=false

import copy
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx import Targets, models, weights, zoo
from detectax_eqx.models import _mask_points, _rf_detr_seg

from .. import rf_detr_tiny as tiny


torch = pytest.importorskip("torch", reason="torch is not installed; `make parity` brings it")
pytest.importorskip("rfdetr", reason="rfdetr is not installed: pip install rfdetr==1.11.2 in the environment of parity")

from ..tiny_train import script
from . import rf_detr_models as theirs
from .double import double_precision, in_double
from .torchvision_models import real_images


SIZES = {"rf_detr_nano": 384, "rf_detr_medium": 576, "rf_detr_seg_nano": 312}
IMAGES = 20


def loaded(name, model):
    shapes = eqx.filter_eval_shape(lambda: zoo.build(name, 91, key=jr.key(0)))
    return weights.load_rf_detr(shapes, theirs.arrays_of(model))


def both_in_double(ours, model, image, size):
    """Detections of both in double precision, in pixels of the image, from equal pixels."""
    count, pixels = model.num_queries, theirs.prepared(image, size).double()
    with theirs.double_precision():
        expected = theirs.detections(copy.deepcopy(model).double(), image, size, count, pixels=pixels)
    x = pixels[0].permute(1, 2, 0).numpy()
    with double_precision():
        exact = in_double(ours)
        exact = replace(exact, preprocessing=replace(exact.preprocessing, mean=(0.0,) * 3, std=(1.0,) * 3))
        canvas_size = jnp.array([size, size], jnp.int32)
        found = eqx.filter_jit(lambda m, x: m(x, canvas_size))(exact, jnp.asarray(x))
        scale = jnp.array([image.shape[1], image.shape[0]] * 2, jnp.float64)[None] / size
        frames = None if found.mask_boxes is None else found.mask_boxes * scale
        return expected, jax.tree.map(np.asarray, replace(found, boxes=found.boxes * scale, mask_boxes=frames))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SIZES)
def test_detections_on_real_images(name):
    """All predictions in order: boxes within .05 px, scores within 1e-4, equal labels, masks of IoU above .99.

    Which cell gets which query is decided by the order of 300 logits. Where rounding decides it, both are compared in
    double precision.
    """
    images = real_images(IMAGES)
    if len(images) < IMAGES:
        pytest.skip("no folder of real images beside the repository")
    model, _ = theirs.new_detector(name)
    if model.segmentation_head is not None:
        theirs.centre_masks(model, theirs.prepared(images[0], SIZES[name]))
        # Logits of some units, as trained ones: beyond 17, float32 has no probabilities to tell them apart.
        with torch.no_grad():
            for parameter in model.segmentation_head.query_features_proj.parameters():
                parameter.mul_(0.1)
    ours, detect = loaded(name, model), eqx.filter_jit(models.detect)
    differences, ious, covered, judged = {"boxes": [], "scores": []}, [], [], []
    for i, image in enumerate(images):
        expected = theirs.detections(model, image, SIZES[name], model.num_queries)
        found = detect(ours, image)
        if not np.array_equal(found.labels, expected["labels"]) or np.abs(found.boxes - expected["boxes"]).max() > 0.05:
            expected, found = both_in_double(ours, model, image, SIZES[name])
            judged.append(i)
        np.testing.assert_array_equal(found.labels, expected["labels"])
        for key, values in differences.items():
            values.append(np.abs(getattr(found, key) - expected[key]).max())
        if "masks" in expected:
            masks, frames = (jnp.asarray(x, jnp.float32) for x in (found.masks, found.frames))
            pasted = np.asarray(ours.paste(masks, frames, image_size=image.shape[:2], threshold=0.5))
            union = (pasted | expected["masks"]).sum(axis=(1, 2))
            ious.append(((pasted & expected["masks"]).sum(axis=(1, 2)) / np.maximum(union, 1))[union > 0].min())
            covered.append(expected["masks"].mean())
    worst = {key: float(max(values)) for key, values in differences.items()}
    print(f"{name}: {IMAGES * model.num_queries} detections on {IMAGES} images, judged in double precision: {judged}")
    print(f"boxes {worst['boxes']:.1e} px, scores {worst['scores']:.1e}, mask IoU at least {min(ious, default=1):.5f}")
    assert worst["boxes"] < 0.05 and worst["scores"] < 1e-4 and min(ious, default=1) > 0.99
    assert len(judged) <= IMAGES // 4
    assert not covered or 0.05 < np.mean(covered) < 0.95  # masks neither empty nor full


def batch(size):
    """Noise with 0, 1 and 40 objects, in a capacity of 60."""
    draw = np.random.default_rng(0)
    counts, capacity = (0, 1, 40), 60
    pixels = draw.integers(0, 256, (len(counts), size, size, 3)).astype(np.uint8)
    centres, sides = draw.uniform(30, size - 30, (3, capacity, 2)), draw.uniform(10, size / 2, (3, capacity, 2))
    boxes = np.clip(np.concatenate([centres - sides / 2, centres + sides / 2], axis=2), 0, size).astype(np.float32)
    labels = draw.integers(0, 91, (3, capacity)).astype(np.int32)
    masks = (draw.random((3, capacity, size // 12, size // 12)) < 0.5).repeat(12, axis=2).repeat(12, axis=3)
    return pixels, boxes, labels, masks, np.arange(capacity) < np.array(counts)[:, None]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["rf_detr_nano", "rf_detr_seg_nano"])
def test_losses_and_gradients(name, monkeypatch):
    """In double precision: 1e-6. The bias of keys has a gradient of 0 in exact arithmetic."""
    for module in (_mask_points, _rf_detr_seg):
        monkeypatch.setattr(module, "draw_points", lambda _, count: jnp.asarray(tiny.points(count), jnp.float64))
    model, criterion = theirs.new_detector(name)
    arrays, size = batch(SIZES[name]), SIZES[name]
    ours = loaded(name, model)
    with theirs.double_precision():
        expected = theirs.losses(model.double(), criterion, *arrays)
        torch.stack(list(expected.values())).sum().backward()
    with jax.enable_x64(True):
        ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), ours)
        pixels, boxes, labels, masks, valid = (jnp.asarray(x) for x in arrays)
        frames = jnp.broadcast_to(jnp.array([0, 0, size, size], jnp.float64)[None, None], boxes.shape)
        targets = Targets(boxes.astype(jnp.float64), labels, valid, masks, frames)

        @eqx.filter_jit
        @eqx.filter_grad(has_aux=True)
        def total(model):
            canvas = jnp.array([size, size], jnp.int32)
            terms = jax.vmap(lambda image, t: model.loss(image, canvas, t, key=jr.key(0)))(pixels, targets)
            losses = {term: jax.tree.map(lambda x: x.sum(), values).mean() for term, values in terms.items()}
            return sum(losses.values()), losses

        grads, losses = total(ours)
    assert losses.keys() == expected.keys()
    for term, loss in losses.items():
        np.testing.assert_allclose(loss, expected[term].item(), rtol=1e-6, err_msg=term)
    grads, differences = weights.to_rf_detr(grads), {}
    for key, parameter in model.named_parameters():
        if parameter.grad is not None and not key.endswith("key.bias"):
            wanted = parameter.grad.numpy()
            differences[key] = np.abs(grads[key] - wanted).max() / np.abs(wanted).max()
    worst = max(differences, key=lambda key: differences[key])
    print(f"{name}: gradients of {len(differences)} parameters, worst {differences[worst]:.1e} ({worst})")
    assert len(differences) > 400 and differences[worst] < 1e-6


@pytest.mark.timeout(1800)
def test_an_optimiser_step():
    """AdamW with the recipe's rates, from the same state and gradients: parameters equal to 1e-6 of their step.

    The last norm of the backbone is in no stage here, so that it has the rate of the heads.
    """
    from _resume import given_before  # of the folder that `tiny_train` puts on the path

    options = given_before(["--options", "rf_detr"])
    assert options is not None
    model, _ = theirs.new_detector("rf_detr_nano")
    ours = loaded("rf_detr_nano", model)
    before = theirs.arrays_of(copy.deepcopy(model))
    draw = np.random.default_rng(5)
    for parameter in model.parameters():
        parameter.grad = torch.from_numpy(draw.normal(0, 1e-4, parameter.shape).astype(np.float32))
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    gradients = weights.load_rf_detr(ours, gradients)

    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert norm > 0.1
    torch.optim.AdamW(theirs.parameter_groups(model), lr=1e-4, weight_decay=1e-4).step()

    optimizer = script.make_optimizer(options, script.make_schedule(options, 1000))
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(ours), ours)
    found = weights.to_rf_detr(jax.tree.map(jnp.add, ours, updates))
    differences = {}
    for name, parameter in model.named_parameters():
        if name in found and "layernorm" not in name:
            wanted = parameter.detach().numpy()
            differences[name] = np.abs(found[name] - wanted).max() / np.abs(wanted).max()
            assert np.abs(wanted - before[name]).max() > 0, name
    worst = max(differences, key=lambda key: differences[key])
    print(f"{len(differences)} parameters, worst {differences[worst]:.1e} ({worst})")
    assert len(differences) > 400 and differences[worst] < 1e-6


def test_hugging_face_writes_the_same_names(tmp_path):
    """A file of `save_pretrained` is read, and both predict the same from the same pixels."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed; `make parity` brings it")
    backbone = transformers.RfDetrDinov2Config(
        hidden_size=tiny.CHANNELS,
        num_hidden_layers=tiny.DEPTH,
        num_attention_heads=tiny.HEADS,
        image_size=tiny.SIZE,
        patch_size=tiny.PATCH,
        num_windows=2,
        out_indices=list(tiny.TAPS),
    )
    options = {"decoder_layers": tiny.LAYERS, "decoder_self_attention_heads": 4, "decoder_cross_attention_heads": 4}
    options |= {"decoder_n_points": 2, "decoder_ffn_dim": tiny.HIDDEN, "d_model": tiny.WIDTH, "dropout": 0.0}
    options |= {"num_queries": tiny.QUERIES, "group_detr": tiny.GROUPS, "num_labels": tiny.CLASSES}
    config = transformers.RfDetrConfig(backbone_config=backbone, **options)
    model = transformers.RfDetrForObjectDetection(config).eval()
    model.save_pretrained(tmp_path)
    theirs.randomize_file(tmp_path / "model.safetensors")
    model = transformers.RfDetrForObjectDetection.from_pretrained(tmp_path).eval()
    ours = weights.load_rf_detr(tiny.build("boxes"), tmp_path / "model.safetensors")
    pixels = np.random.default_rng(0).normal(size=(3, tiny.SIZE, tiny.SIZE)).astype(np.float32)
    with torch.no_grad():
        expected = model(pixel_values=torch.from_numpy(pixels)[None])
    ours = replace(ours, preprocessing=replace(ours.preprocessing, mean=(0.0,) * 3, std=(1.0,) * 3))
    size = jnp.array([tiny.SIZE, tiny.SIZE], jnp.int32)
    _, _, found = models._rf_detr.predict_queries(ours, jnp.asarray(pixels.transpose(1, 2, 0)), size)
    # Random weights amplify rounding in float32.
    np.testing.assert_allclose(found.logits[-1, 0], expected.logits[0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.boxes_cxcywh[-1, 0], expected.pred_boxes[0], atol=1e-4)
