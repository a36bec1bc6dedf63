"""Small detectors on transformers that learn to find shapes, from scratch."""

from dataclasses import replace

import equinox as eqx
import jax.random as jr
import numpy as np

from detectax_eqx import data, evaluate, models, nn, train


SIZE, CHANNELS = 128, 48
CANVAS = (SIZE, SIZE)
SAMPLING = models.TwoStageSampling(pre_nms_top_n=64, post_nms_top_n=64, rpn_samples=64, box_samples=32)


def faster_rcnn(backbone, num_classes, key):
    sizes = ((12.0,), (24.0,), (48.0,), (96.0,), (128.0,))
    model = models.faster_rcnn(backbone, num_classes, key=key, anchor_sizes=sizes, hidden_size=128)
    preprocessing = models.Preprocessing(models.ShortestEdge(SIZE, SIZE))
    return replace(model, pooling=models.RoIPooling(aligned=True), preprocessing=preprocessing, sampling=SAMPLING)


def vit(num_classes, keys):
    windows = {"side": 8, "window": 4, "global_blocks": (1, 3), "relative_side": 8}
    body = nn.ViT(128, 4, 4, key=keys[0], patch_size=16, drop_path=0.05, **windows)
    return faster_rcnn(nn.ViTFPN(body, key=keys[1], channels=CHANNELS), num_classes, keys[2])


def swin(num_classes, keys):
    body = nn.Swin(32, (1, 1, 2, 1), (2, 4, 8, 16), key=keys[0], window=4, drop_path=0.05)
    return faster_rcnn(nn.BackboneWithFPN(body, key=keys[1], channels=CHANNELS), num_classes, keys[2])


def rf_detr(num_classes, keys):
    body = nn.WindowedViT(96, 4, key=keys[0], patch_size=8, side=16, windows=2, taps=(2, 4))
    backbone = nn.ProjectedViT(body, key=keys[1], channels=64, depth=1)
    options = {"layers": 2, "queries": 30, "groups": 5, "self_heads": 4, "cross_heads": 4, "hidden_size": 128}
    return models.rf_detr(backbone, num_classes, key=keys[2], size=SIZE, **options)


# The steps in which each learns.
KINDS = {"vit": (vit, 400), "swin": (swin, 400), "rf_detr": (rf_detr, 1500)}


def loss(model, example, *, key):
    keys = jr.split(key)
    sizes = {"canvas": example.images.canvas, "min_sizes": (SIZE,), "max_size": SIZE}
    image, size, targets = train.augment(
        example.images.pixels, example.images.sizes, example.targets, **sizes, key=keys[0]
    )
    return model.loss(image, size, targets, key=keys[1])


def learn(kind, folder):
    """The detector of a kind after training, and the sets of images that it was trained and is to be tested on."""
    build, steps = KINDS[kind]
    train_set, test_set = (
        data.load_coco(*data.write_shapes_dataset(folder / name, num_images=count, seed=seed, image_size=CANVAS))
        for name, count, seed in (("train", 1000, 0), ("test", 100, 1))
    )
    buckets = data.make_buckets(train_set.sizes, canvases=[CANVAS], min_size=SIZE, max_size=SIZE)
    loader = data.Loader(train_set, batch_size=8, buckets=buckets, max_objects=8)
    model = eqx.filter_jit(build)(train_set.num_classes, jr.split(jr.key(0), 3))
    trainable = models.trainable(model)
    schedule = train.warmup_cosine(1e-3, total_steps=steps, warmup_steps=40)
    optimizer = train.adamw(schedule, weight_decay=0.05, decay_mask=models.decayed)
    state = train.init_train_state(model, optimizer, trainable=trainable, key=jr.key(1))
    step = train.make_train_step(loss, optimizer, trainable=trainable)
    history = []
    for k, batch in loader.iterate(0, steps):
        state, metrics = step(state, batch)
        history.append(float(metrics["loss"]))
        if k % 100 == 99:
            print(f"step {k + 1}: loss {np.mean(history[-20:]):.2f}", flush=True)
    return state.model, train_set, test_set


def measured(model, test_set):
    """AP and AP50 of the detector."""
    found = evaluate.detect_dataset(model, test_set, canvases=(CANVAS,), batch_size=2)
    numbers = evaluate.evaluate_coco(test_set, found).numbers
    print(f"AP {numbers['AP']:.3f}, AP50 {numbers['AP50']:.3f}")
    return numbers
