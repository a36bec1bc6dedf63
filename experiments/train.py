"""Trains a detector on a dataset in COCO format.

    python experiments/train.py --model faster_rcnn_resnet50_fpn --init resnet50-0676ba61.pth
        --train-annotations train.json --train-images train/ --val-annotations val.json --val-images val/
        --output runs/mine

Defaults are the field's "1x" recipe: SGD .02 for 16 images per step, 12 epochs, decays after 8 and 11. Warm-up and
decays scale with the length of the run, and without `--init` the norm is group. What that comes to is printed before
the first step. A folder of `--output` holds `last/` (all of the run's state), `best/` (the model alone),
`metrics.jsonl`, `timing.jsonl` and the options. Ctrl-C and SIGTERM save. However a run ended, `--resume --output …`
goes on from the last checkpoint to bit-identical parameters and metrics, with the options of before; what a clock says
is kept apart, in `timing.jsonl`.

All devices are used, a batch being spread over them. On several machines, start the script on each of them with
`--coordinator`; `--output` must be a folder that all of them see. A signal to one ends all, after the same step.
"""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from _header import check_objects, print_header
from _options import RANGES, Options, check_model, check_promise, check_sense, complete, total_steps
from _pace import Pace
from _resume import check_data, check_options, check_version, describe_data, options_to_resume, saved_options
from _run import Stop, open_log, remove_strays, write
from _shared import (
    Detector,
    build,
    categories_of,
    check_ranges,
    console,
    evaluate_on,
    initialize,
    load_newest,
    progress,
    run,
    write_json,
)
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from detectax_eqx import Batch, WeightedSum, data, models, nn, train
from detectax_eqx.evaluate import format_number


# The time to go is printed after this number of steps.
ESTIMATE_AFTER = 5


def main(options: Options) -> None:
    """Trains until the end or Ctrl-C, if no other run is using the output folder."""
    check_ranges(options, RANGES)
    check_sense(options)
    if options.coordinator is not None:
        connect(options.coordinator, options.num_processes, options.process_id)
    with train.lock_folder(options.output):
        remove_strays(options.output)
        fit(options)


def fit(options: Options) -> None:
    """Trains: options, data, model, what was saved, step, loop."""
    last = options.output / "last"
    going_on = options.resume and train.latest_checkpoint(last) is not None
    if not options.resume and last.exists():
        raise SystemExit(f"{options.output} holds a run already: pass --resume to go on with it, or another --output.")
    before = saved_options(options.output) if options.resume else None
    if before is not None:
        options = check_options(options, before, going_on=going_on)
    anchors: dict[str, Any] = {"anchor_sizes": options.anchor_sizes, "aspect_ratios": options.aspect_ratios}
    shapes = eqx.filter_eval_shape(lambda: build(options.model, 1, options.norm or "group", **anchors))
    check_model(options, shapes)
    train_set, val_set = load_data(options, shapes.needs)
    mesh = make_mesh(options)
    loader = make_loader(options, train_set, mesh, with_masks="masks" in shapes.needs)
    epoch_steps = loader.steps_per_epoch
    if not going_on:
        check_promise(options, epoch_steps)
    options = complete(options, epoch_steps)
    steps = total_steps(options, epoch_steps)

    # Model and optimiser.
    norm = options.norm or "group"
    model = build(
        options.model, train_set.num_classes, norm, options.seed, checkpoint=options.gradient_checkpointing, **anchors
    )
    if options.init is not None and not going_on:
        model = initialize(model, options.model, norm, options.init)
    resize = models.ShortestEdge(max(options.min_sizes), options.max_size)
    model = replace(model, preprocessing=replace(model.preprocessing, resize=resize))
    trainable = models.trainable(model, trainable_layers=options.trainable_layers or 0)
    schedule = make_schedule(options, epoch_steps)
    optimizer = make_optimizer(options, schedule)
    state = train.init_train_state(
        model, optimizer, trainable=trainable, key=jr.key(options.seed), ema=options.ema is not None
    )

    # What a checkpoint tells besides the state. `so_far` is what a resumed run has to know of the steps before.
    so_far = {"best": -1.0, "evaluated": 0, "left_out": 0, "bad_images": 0}
    metadata: dict[str, Any] = {
        "model": options.model,
        "norm": options.norm,
        **anchors,
        "categories": [asdict(category) for category in train_set.categories],
        "preprocessing": asdict(model.preprocessing),
        "canvases": options.canvases,
        "ema": options.ema is not None,
        "data": describe_data(train_set),
        "so_far": so_far,
    }
    if options.resume:
        check_version(last)
        try:
            state, saved = load_newest(last, state)
        except FileNotFoundError:
            console.print("Nothing was saved yet: starting at step 0")
        else:
            data.check_categories(
                train_set.categories,
                categories_of(saved),
                found_in=str(options.train_annotations),
                known_in=str(last),
                allow_renamed=options.allow_renamed,
            )
            check_data(train_set, saved, options.train_annotations)
            so_far |= saved["so_far"]
            if before is not None and before.val_annotations != options.val_annotations:
                so_far["best"] = -1.0  # which was of other images
            console.print(f"Going on at step {int(state.step)} from {last}", highlight=False)
    state = train.shard_state(state, mesh)
    start, skipped_before = int(state.step), int(state.skipped)
    if start < steps:
        write_json(options.output / "options.json", asdict(options))
        print_header(options, train_set, model=model, trainable=trainable, schedule=schedule, steps=epoch_steps)
    del model

    step = train.make_train_step(
        make_loss(options),
        optimizer,
        trainable=trainable,
        mesh=mesh,
        accumulate=options.accumulate,
        ema_decay=options.ema or 0.0,
    )
    stop = Stop()
    saver = train.CheckpointSaver()

    def account(k: int, metrics: dict[str, jax.Array]) -> None:
        """Counts what batch `k` left out, and ends the run if it made no update, unless that is to be gone on from."""
        so_far["left_out"] += int(metrics["overflow"])
        so_far["bad_images"] += int(metrics["invalid"])
        if options.non_finite == "stop" and int(metrics["skipped"]) > skipped_before:
            saver.wait()
            ids = [train_set.images[i].id for i in loader.indices(k)]
            raise SystemExit(
                f"Step {k + 1}: loss or gradient is not finite, on the images with ids {ids}. The last good checkpoint "
                f"is {train.latest_checkpoint(last)}. A lower --lr or --clip-norm may help; --non-finite skip goes on."
            )

    def evaluate(val_set: data.CocoDataset, done: int) -> None:
        """Evaluates, and saves what is the best so far."""
        model = train.to_host(state.inference_model)
        detector = Detector(model, train_set.categories, options.canvases)
        with stop.at_once(f"evaluation after step {done}", saver):
            metrics = evaluate_on(
                detector,
                val_set,
                options.output / "evaluation",
                num_threads=options.threads,
                allow_renamed=options.allow_renamed,
            )
        numbers = {f"{kind}_{name}": value for kind, m in metrics.items() for name, value in m.numbers.items()}
        write(log, step=done, epoch=done / epoch_steps, **numbers)
        shown = {name: number for name, number in numbers.items() if name.endswith(("AP", "AP50"))}
        text = ", ".join(f"{name} {format_number(number)}" for name, number in shown.items())
        score = numbers["segm_AP" if "segm_AP" in numbers else "bbox_AP"]
        if score < 0:
            text += "; nothing to score by in the validation annotations: best/ is the last checkpoint"
        console.print(f"epoch {done / epoch_steps:.1f}: {text}", highlight=False)
        is_best = score > so_far["best"] or score < 0
        so_far.update(best=max(score, so_far["best"]), evaluated=done)
        if is_best:  # what detects, and that once: the rest of the state is in `last`
            detects = {"model" if state.ema is None else "ema": state.inference_model}
            saver.save([options.output / "best"], detects, step=done, metadata=metadata, keep=1)
        saver.save([last], state, step=done, metadata=metadata)

    def ends_epoch(done: int) -> bool:
        return done % epoch_steps == 0 or done == steps

    log = open_log(options.output / "metrics.jsonl", until=start, evaluated=so_far["evaluated"])
    timing = (options.output / "timing.jsonl").open("ab", buffering=0)
    batches = loader.iterate(start, steps)
    pace, reported, pending, canvases = Pace(steps, start), 0, None, set()
    with saver, log, timing, closing(batches):
        if val_set is not None and ends_epoch(start) and so_far["evaluated"] < start:
            evaluate(val_set, start)  # the run ended before it could
        if start >= steps:
            console.print(f"Nothing is left to do: the run has made {start} of {steps} steps (--epochs or --steps).")
            return
        with progress() as bar:
            task = bar.add_task("training", total=steps, completed=start, status="compiling")
            for k, batch in batches:
                batch = train.shard_batch(batch, mesh)
                canvas = batch.images.canvas
                if canvas not in canvases:
                    canvases.add(canvas)
                    with pace.paused():
                        print_memory(step.memory(state, batch), canvas)
                state, metrics = step(state, batch)
                saver.check()
                done = k + 1
                pace.count(options.batch_size)
                stopping = stop.after_this_step() and done < steps
                saving = ends_epoch(done) or done % options.checkpoint_every == 0 or stopping
                logging = done % options.log_every == 0 or done == 1 or ends_epoch(done)
                if pending:
                    account(*pending)  # a step late: to wait for this one would leave the devices idle
                pending = k, metrics
                if saving or logging:
                    account(*pending)
                    pending = None
                for error in loader.bad_images[reported:]:
                    console.print(f"Left out: {error}", highlight=False, soft_wrap=True)
                reported = len(loader.bad_images)
                if done - start == ESTIMATE_AFTER:
                    console.print(f"About {pace.left(done)} to go, {pace.seconds_per_step(done):.3g} s per step")
                if logging:
                    values = {name: round(float(value), 6) for name, value in metrics.items()}
                    rate = float(jnp.asarray(schedule(k)))
                    counts = {name: so_far[name] for name in ("left_out", "bad_images")}
                    write(log, step=done, epoch=done / epoch_steps, rate=rate, **counts, **values)
                    speed = pace.images_per_second()
                    write(timing, step=done, time=time.time(), images_s=speed)
                    left = pace.left(done) if done - start >= ESTIMATE_AFTER else None
                    status = describe_step(values, rate, speed, so_far["left_out"], left)
                    bar.update(task, completed=done, status=status)
                    if bar.disable:
                        where = f"step {done}/{steps} (epoch {done / epoch_steps:.2f})"
                        console.print(f"{where}: {status}", highlight=False, soft_wrap=True)
                if saving:
                    saver.save([last], state, step=done, metadata=metadata)
                if stopping:
                    stop.leave(f"step {done}", saver)
                if ends_epoch(done) and val_set is not None:
                    bar.stop()
                    with pace.paused():
                        evaluate(val_set, done)
                    bar.start()


def connect(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    """Joins the other processes; all but the first are silent."""
    if coordinator == "auto":
        jax.distributed.initialize()
    elif num_processes is None or process_id is None:
        raise SystemExit("--coordinator needs --num-processes and --process-id, or to be `auto`.")
    else:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    # Now, as they will not wait long: one may compile a step for minutes that another finds in its cache.
    multihost_utils.sync_global_devices("connected")
    console.quiet = jax.process_index() > 0


def load_data(options: Options, needs: frozenset[str]) -> tuple[data.CocoDataset, data.CocoDataset | None]:
    """The images to train on, with what the detector `needs`, and those to evaluate on, if there are any."""
    assert options.train_annotations is not None and options.train_images is not None  # check_sense
    train_set = load(options.train_annotations, options.train_images, options.box_format)
    check_objects(train_set, options, needs)
    if options.val_annotations is None:
        return train_set, None
    val_set = load(options.val_annotations, options.val_images or options.train_images, options.box_format)
    data.check_categories(
        val_set.categories,
        train_set.categories,
        found_in=options.val_annotations,
        known_in=options.train_annotations,
        allow_renamed=options.allow_renamed,
    )
    return train_set, val_set


def load(annotations: str, images: str, box_format: data.BoxFormat) -> data.CocoDataset:
    """A dataset, with a word on what was repaired."""
    dataset = data.load_coco(annotations, images, box_format=box_format)
    console.print(f"{annotations}: {len(dataset)} images, {dataset.report}", highlight=False)
    return dataset


def make_mesh(options: Options) -> Mesh:
    """The devices."""
    if jax.device_count() % options.parameter_shards:
        raise SystemExit(f"--parameter-shards must divide the {jax.device_count()} devices.")
    mesh = train.make_mesh(model=options.parameter_shards)
    if options.batch_size % (mesh.size * options.accumulate):
        raise SystemExit(f"--batch-size must be a multiple of the {mesh.size} devices times --accumulate.")
    return mesh


def make_loader(options: Options, train_set: data.CocoDataset, mesh: Mesh, *, with_masks: bool) -> data.Loader:
    """Training batches. Batch k is a pure function of (seed, k), and each process reads its part."""
    sizes = {"min_size": max(options.min_sizes), "max_size": options.max_size}
    max_source = data.source_limit(options.canvases)
    buckets = data.make_buckets(train_set.sizes, canvases=options.canvases, max_source=max_source, **sizes)
    limits = data.describe_limits(train_set, buckets=buckets, max_objects=options.max_objects, **sizes)
    for line in limits.lines:
        console.print(f"{options.train_annotations}: {line}", highlight=False, soft_wrap=True)
    return data.Loader(
        train_set,
        batch_size=options.batch_size,
        buckets=buckets,
        seed=options.seed,
        max_objects=options.max_objects,
        mask_size=112 if with_masks else None,
        num_threads=options.threads,
        rows=train.local_rows(mesh, options.batch_size),
        max_bad_images=options.max_bad_images,
        cache=options.cache,
    )


def print_memory(size: int | None, canvas: tuple[int, int]) -> None:
    """What the program that was compiled for a canvas takes."""
    if size is not None:
        console.print(
            f"memory of a step at {canvas[0]}×{canvas[1]}: {size / 2**20:,.0f} MiB on each device", highlight=False
        )


def describe_step(values: dict[str, float], rate: float, speed: float, left_out: int, left: str | None) -> str:
    """A step's numbers in a line, the ones that matter most first: a terminal cuts its end."""
    terms = [f"{name.removeprefix('loss_')} {value:.2f}" for name, value in values.items() if name not in train.METRICS]
    ahead = f"{left} left, " if left else ""
    text = f"{speed:.1f} images/s, {ahead}loss {values['loss']:.3f} ({', '.join(terms)}), rate {rate:.3g}"
    return f"{text}, {left_out} objects beyond --max-objects left out so far" if left_out else text


def make_loss(options: Options) -> Callable[..., dict[str, WeightedSum]]:
    """The loss of one example: augmentation and detector, both inside the compiled step.

    The cast to the dtype that is computed in is there too, so that gradients are of the float32 parameters.
    """

    def loss(model: Any, example: Batch, *, key: jax.Array) -> dict[str, WeightedSum]:
        augment_key, loss_key = jr.split(key)
        image, image_size, targets = train.augment(
            example.images.pixels,
            example.images.sizes,
            example.targets,
            canvas=example.images.canvas,
            min_sizes=options.min_sizes,
            max_size=options.max_size,
            flip_probability=options.flip,
            scale_range=options.jitter,
            key=augment_key,
        )
        return nn.cast(model, options.precision).loss(image, image_size, targets, key=loss_key)

    return loss


def make_schedule(options: Options, epoch_steps: int) -> optax.Schedule:
    """The learning rate at each step, of options that are `complete`."""
    assert options.lr is not None and options.warmup_steps is not None and options.decay_epochs is not None
    rate = train.scale_learning_rate(options.lr, batch_size=options.batch_size)
    if options.schedule == "cosine":
        total = total_steps(options, epoch_steps)
        return train.warmup_cosine(rate, total_steps=total, warmup_steps=options.warmup_steps)
    milestones = [round(epoch * epoch_steps) for epoch in options.decay_epochs]
    return train.warmup_multistep(rate, milestones=milestones, warmup_steps=options.warmup_steps)


def make_optimizer(options: Options, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimiser, between a bound on the gradient and the backbone's own rate."""
    decay = {"weight_decay": options.weight_decay, "decay_mask": None if options.decay_vectors else train.no_vectors}
    if options.optimizer == "sgd":
        optimizer = train.sgd(schedule, momentum=options.momentum, **decay)
    else:
        optimizer = train.adamw(schedule, **decay)
    if options.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(options.clip_norm), optimizer)
    if options.backbone_lr != 1:
        optimizer = optax.chain(optimizer, optax.masked(optax.scale(options.backbone_lr), models.in_backbone))
    return optimizer


if __name__ == "__main__":
    run(main, Options, __doc__, defaults=options_to_resume)
