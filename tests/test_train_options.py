"""Options of train.py reach what they are for."""

import json
import os
import re
import subprocess
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tyro

from detectax_eqx import data, models, zoo

from . import tiny_train
from .tiny_detector import random_arrays
from .tiny_train import grouped, saved_arrays, script


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """8 images to train on, so that an epoch is 4 steps."""
    folder = tmp_path_factory.mktemp("shapes")
    for name in ("train", "val"):
        data.write_shapes_dataset(folder / name, num_images=8, seed=0, image_size=(64, 64))
    return folder


def run(shapes, output, *options, status=0):
    """What a run without validation prints, after a check of its exit status; and its metrics."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"COLUMNS": "200"}
    command = tiny_train.command(shapes, output, *options)
    for name in ("--val-annotations", "--val-images"):
        del command[command.index(name) : command.index(name) + 2]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert done.returncode == status, done.stdout
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return done.stdout, [json.loads(line) for line in lines]


@pytest.mark.slow
def test_a_run_with_every_option(shapes, tmp_path, monkeypatch):
    options = ["--model", "faster_rcnn_resnet18_fpn", "--steps", "3", "--warmup-steps", "2", "--log-every", "1"]
    options += ["--ema", "0.1", "--accumulate", "2", "--precision", "bfloat16", "--gradient-checkpointing"]
    options += ["--clip-norm", "1e-3", "--weight-decay", "0", "--momentum", "0"]
    _, metrics = run(shapes, tmp_path / "all", *options)
    for line in metrics:
        assert line["gradient_norm"] > 1e-3 and line["skipped"] == 0
        np.testing.assert_allclose(line["update_norm"], 1e-3 * line["rate"], atol=1e-6)  # six digits are logged
    saved = saved_arrays(tmp_path / "all")
    names = [name.removeprefix("ema/") for name in saved if name.startswith("ema/")]
    differs = [name for name in names if (saved[f"ema/{name}"] != saved[f"model/{name}"]).any()]
    assert len(differs) > len(names) / 2
    tiny_train.shrink(monkeypatch)
    detector = zoo.Predictor.from_checkpoint(tmp_path / "all")
    assert isinstance(detector.model, models.FasterRCNN)
    np.testing.assert_array_equal(detector.model.rpn.convs[0].weight, saved["ema/rpn/convs/0/weight"])


def test_a_detector_of_squares_sees_several_sizes(shapes, tmp_path):
    """Each batch draws a canvas, which its images fill; validation has the detector's own size."""
    from _options import check_model, detection_canvases, with_own_sizes

    canvases = ((320, 320), (384, 384), (448, 448))
    options = grouped(output=tmp_path, model="rf_detr_nano", canvases=canvases, batch_size=8)
    options.data.train_annotations, options.data.train_images = "annotations.json", ""
    detector = script.architecture(options).shapes(1)
    options = with_own_sizes(options, detector)
    check_model(options, detector)
    sizes = options.sizes
    assert (sizes.min_sizes, sizes.max_size, sizes.canvases) == ((384,), 384, canvases)
    dataset = data.load_coco(shapes / "train/annotations.json", shapes / "train/images")
    loader = script.make_loader(options, dataset, script.make_mesh(options), detector)
    batches = [loader.batch(k) for k in range(12)]
    assert {batch.images.canvas for batch in batches} == set(canvases)
    assert detection_canvases(options, detector) == ((384, 384),)

    class Seen(eqx.Module):
        preprocessing: models.Preprocessing = eqx.field(static=True)

        def loss(self, image, canvas_size, targets, *, key):
            return {"canvas": image.shape[:2], "filled": canvas_size.tolist(), "widest": targets.boxes[:, 2].max()}

    loss = script.make_loss(options)
    for batch in batches[:4]:
        example = jax.tree.map(lambda x: x[0], batch)
        seen: Any = loss(Seen(detector.preprocessing), example, key=jax.random.key(0))
        assert tuple(seen["filled"]) == seen["canvas"] == batch.images.canvas
        assert 0 < seen["widest"] <= batch.images.canvas[1]

    def own_sizes(**given):
        chosen = with_own_sizes(grouped(output=tmp_path, model="rf_detr_nano", **given), detector).sizes
        return chosen.min_sizes, chosen.canvases

    assert own_sizes() == ((384,), ((384, 384),))
    assert own_sizes(min_sizes=(512,)) == ((512,), ((512, 512),))


@pytest.mark.parametrize("before", [[], ["--options", "rf_detr"]], ids=["alone", "after a recipe"])
def test_named_numbers_are_given_alike(before, capsys):
    """As NAME VALUE pairs, also where a recipe or a run to resume has some; those given replace all."""

    def parsed(*arguments):
        arguments = ["--output", "x", *before, *arguments]
        default = script.given_before(arguments)
        known: Any = {} if default is None else {"default": default}
        return tyro.cli(script.Options, args=arguments, config=(tyro.conf.OmitArgPrefixes,), **known)

    given = parsed("--part-lr", "backbone", ".5", "rpn", "2", "--sampling", "box_samples", "128")
    assert given.optimization.part_lr == {"backbone": 0.5, "rpn": 2.0}
    assert given.architecture.sampling == {"box_samples": 128.0}
    assert parsed("--part-lr").optimization.part_lr == {}
    assert parsed().optimization.part_lr == ({"backbone": 0.588, "decoder": 0.7} if before else {})
    for words, message in ((["backbone"], "backbone has no value"), (["backbone", "x"], "could not convert")):
        with pytest.raises(SystemExit):
            parsed("--part-lr", *words)
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_loss_that_is_not_finite(shapes, tmp_path):
    """At a rate of 1e15 the first update is finite, and the loss after it is not."""
    options = ["--lr", "1e15", "--warmup-steps", "0", "--steps", "3", "--log-every", "1", "--checkpoint-every", "1"]
    text, _ = run(shapes, tmp_path / "stop", *options, status=1)
    named = json.loads(text[text.index("ids [") + 4 : text.index("]", text.index("ids [")) + 1])
    dataset = data.load_coco(shapes / "train/annotations.json", shapes / "train/images")
    buckets = data.make_buckets(dataset.sizes, canvases=[(64, 64)], min_size=64, max_size=64)
    second = data.Loader(dataset, batch_size=2, buckets=buckets, mask_size=None).indices(1)
    assert named == [dataset.images[i].id for i in second]
    assert "Step 2: loss or gradient is not finite" in text
    assert str(tmp_path / "stop/last/00000001") in text and "Traceback" not in text
    assert not (tmp_path / "stop/last/00000002").exists()

    _, metrics = run(shapes, tmp_path / "skip", *options, "--non-finite", "skip")
    assert [line["skipped"] for line in metrics] == [0, 1, 2]
    first, last = (saved_arrays(tmp_path / name) for name in ("stop", "skip"))
    assert int(last["step"]) == 3 and int(last["skipped"]) == 2
    for name in first.keys() - {"step", "skipped"}:
        np.testing.assert_array_equal(first[name], last[name], err_msg=name)


def test_the_optimiser_has_its_groups(tmp_path):
    """What test_parameter_groups.py shows of these parts, the script puts together."""
    required = {"train_annotations": tmp_path, "train_images": tmp_path, "output": tmp_path}
    options = grouped(
        **required, part_lr={"backbone": 0.25, "rpn": 2.0}, decay_vectors=False, momentum=0.0, weight_decay=0.5
    )
    model = random_arrays(eqx.filter_eval_shape(tiny_train.build, "", 3, ""))
    ones = jax.tree.map(lambda leaf: jnp.ones_like(leaf) if isinstance(leaf, jax.Array) else None, model)
    optimizer = script.make_optimizer(options, optax.constant_schedule(0.1))
    updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.zeros_like, ones), optimizer.init(ones), ones)
    body, head = updates.backbone.body, updates.box_head
    for array, expected in (
        (head.fc6.weight, -0.05),
        (head.fc6.bias, 0),
        (body.conv1.weight, -0.0125),
        (body.norm1.weight, 0),
        (updates.rpn.objectness.weight, -0.1),
    ):
        np.testing.assert_allclose(array, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"parameter_shards": 3}, "--parameter-shards times --tensor-shards must divide the 8 devices"),
        ({"batch_size": 8, "accumulate": 2}, "--batch-size must be a multiple of the 8 devices times --accumulate"),
        (
            {"batch_size": 9, "tensor_shards": 4},
            "--batch-size must be a multiple of 2 (devices by --tensor-shards) times --accumulate",
        ),
        ({"accumulate": 0}, "--accumulate is 0: it must be positive"),
        ({"clip_norm": 0.0}, "--clip-norm is 0.0: it must be positive"),
        ({"ema": 1.5}, "--ema is 1.5: it must be in 0..1"),
        ({"coordinator": "127.0.0.1:1"}, "--coordinator needs --num-processes and --process-id"),
    ],
)
def test_refusals(shapes, tmp_path, options, message):
    annotations, images = str(shapes / "train/annotations.json"), str(shapes / "train/images")
    with pytest.raises(SystemExit, match=re.escape(message)):
        script.main(grouped(train_annotations=annotations, train_images=images, output=tmp_path, **options))
