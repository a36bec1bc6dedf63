"""Small detectors on a vision transformer and on a Swin Transformer learn to find shapes, from scratch."""

from dataclasses import replace

import equinox as eqx
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx import data, evaluate, models, nn, train


SIZE, STEPS, CHANNELS = 128, 400, 48
SAMPLING = models.TwoStageSampling(pre_nms_top_n=64, post_nms_top_n=64, rpn_samples=64, box_samples=32)


def vit(keys):
    body = nn.ViT(
        128, 4, 4, key=keys[0], side=8, window=4, global_blocks=(1, 3), relative_side=8, patch_size=16, drop_path=0.05
    )
    return nn.ViTFPN(body, key=keys[1], channels=CHANNELS)


def swin(keys):
    body = nn.Swin(32, (1, 1, 2, 1), (2, 4, 8, 16), key=keys[0], window=4, drop_path=0.05)
    return nn.BackboneWithFPN(body, key=keys[1], channels=CHANNELS)


@eqx.filter_jit
def build(make_backbone, num_classes):
    keys = jr.split(jr.key(0), 3)
    sizes = ((12.0,), (24.0,), (48.0,), (96.0,), (128.0,))
    backbone = make_backbone(keys)
    model = models.faster_rcnn(backbone, num_classes, key=keys[2], anchor_sizes=sizes, hidden_size=128)
    preprocessing = models.Preprocessing(models.ShortestEdge(SIZE, SIZE))
    return replace(model, pooling=models.RoIPooling(aligned=True), preprocessing=preprocessing, sampling=SAMPLING)


def loss(model, example, *, key):
    keys = jr.split(key)
    sizes = {"canvas": example.images.canvas, "min_sizes": (SIZE,), "max_size": SIZE}
    image, size, targets = train.augment(
        example.images.pixels, example.images.sizes, example.targets, **sizes, key=keys[0]
    )
    return model.loss(image, size, targets, key=keys[1])


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("make_backbone", [vit, swin], ids=lambda build: build.__name__)
def test_box_ap50_of_seven_tenths_after_400_steps(make_backbone, tmp_path):
    train_set, test_set = (
        data.load_coco(
            *data.write_shapes_dataset(tmp_path / name, num_images=count, seed=seed, image_size=(SIZE, SIZE))
        )
        for name, count, seed in (("train", 1000, 0), ("test", 100, 1))
    )
    buckets = data.make_buckets(train_set.sizes, canvases=[(SIZE, SIZE)], min_size=SIZE, max_size=SIZE)
    loader = data.Loader(train_set, batch_size=8, buckets=buckets, max_objects=8)
    model = build(make_backbone, train_set.num_classes)
    trainable = models.trainable(model)
    schedule = train.warmup_cosine(1e-3, total_steps=STEPS, warmup_steps=40)
    optimizer = train.adamw(schedule, weight_decay=0.05, decay_mask=models.decayed)
    state = train.init_train_state(model, optimizer, trainable=trainable, key=jr.key(1))
    step = train.make_train_step(loss, optimizer, trainable=trainable)
    history = []
    for _, batch in loader.iterate(0, STEPS):
        state, metrics = step(state, batch)
        history.append(float(metrics["loss"]))
    print(f"loss {np.mean(history[:20]):.2f} at first, {np.mean(history[-20:]):.2f} at last")
    found = evaluate.detect_dataset(state.model, test_set, canvases=((SIZE, SIZE),), batch_size=2)
    numbers = evaluate.evaluate_coco(test_set, found).numbers
    print(f"AP {numbers['AP']:.3f}, AP50 {numbers['AP50']:.3f}")
    assert numbers["AP50"] >= 0.7
