"""Trains a detector on a dataset in COCO format.

    python experiments/train.py --model faster_rcnn_resnet50_fpn --init resnet50-0676ba61.pth
        --train-annotations train.json --train-images train/ --val-annotations val.json --val-images val/
        --output runs/mine

Defaults are the field's "1x" recipe: SGD .02 for 16 images a step, 12 epochs, decay at 8 and 11. A folder of `--output`
holds `last/` and `best/` checkpoints, `metrics.jsonl`, `timing.jsonl` and the options. Ctrl-C and SIGTERM save. However
a run ended, `--resume` goes on from the last checkpoint to bit-identical parameters and metrics; what a clock says is
kept apart, in `timing.jsonl`.

All devices are used, a batch being spread over them. On several machines, start the script on each of them with
`--coordinator`; `--output` must be a folder that all of them see. A signal to one ends all, after the same step.
"""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from _options import RANGES, Options
from _run import Stop, open_log, write
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

from detectax_eqx import Batch, WeightedSum, data, models, nn, train
from detectax_eqx.evaluate import format_number


def main(options: Options) -> None:
    """Trains until the end or Ctrl-C, if no other run is using the output folder."""
    check_ranges(options, RANGES)
    if options.jitter is not None and options.jitter[0] > options.jitter[1]:
        raise SystemExit(f"--jitter is {options.jitter}: the first must not be larger than the second.")
    if options.coordinator is not None:
        connect(options.coordinator, options.num_processes, options.process_id)
    with train.lock_folder(options.output):
        fit(options)


def fit(options: Options) -> None:
    """Trains: data, model, what was saved, step, loop."""
    last, best = options.output / "last", options.output / "best"
    if not options.resume and last.exists():
        raise SystemExit(f"{options.output} holds a run already: pass --resume to go on with it, or another --output.")
    train_set = load(options.train_annotations, options.train_images, options.box_format)
    val_set = None
    if options.val_annotations is not None:
        val_set = load(options.val_annotations, options.val_images or options.train_images, options.box_format)
        data.check_categories(
            val_set.categories,
            train_set.categories,
            found_in=options.val_annotations,
            known_in=options.train_annotations,
            allow_renamed=options.allow_renamed,
        )

    # Devices.
    if jax.device_count() % options.parameter_shards:
        raise SystemExit(f"--parameter-shards must divide the {jax.device_count()} devices.")
    mesh = train.make_mesh(model=options.parameter_shards)
    if options.batch_size % (mesh.size * options.accumulate):
        raise SystemExit(f"--batch-size must be a multiple of the {mesh.size} devices times --accumulate.")

    # Data. Batch k is a pure function of (seed, k), and each process reads its part.
    sizes = {"min_size": max(options.min_sizes), "max_size": options.max_size}
    max_source = data.source_limit(options.canvases)
    buckets = data.make_buckets(train_set.sizes, canvases=options.canvases, max_source=max_source, **sizes)
    limits = data.describe_limits(train_set, buckets=buckets, max_objects=options.max_objects, **sizes)
    for line in limits.lines:
        console.print(f"{options.train_annotations}: {line}", highlight=False, soft_wrap=True)
    loader = data.Loader(
        train_set,
        batch_size=options.batch_size,
        buckets=buckets,
        seed=options.seed,
        max_objects=options.max_objects,
        mask_size=112 if options.model.startswith("mask") else None,
        num_threads=options.threads,
        rows=train.local_rows(mesh, options.batch_size),
        max_bad_images=options.max_bad_images,
        cache=options.cache,
    )
    epoch_steps = loader.steps_per_epoch
    total_steps = options.steps or options.epochs * epoch_steps

    # Model and optimiser.
    model = build(
        options.model, train_set.num_classes, options.norm, options.seed, checkpoint=options.gradient_checkpointing
    )
    if options.init is not None:
        model = initialize(model, options.model, options.norm, options.init)
    layers = options.trainable_layers
    trainable = models.trainable(model, trainable_layers=layers if layers is not None else 3 if options.init else 5)
    schedule = make_schedule(options, epoch_steps, total_steps)
    optimizer = make_optimizer(options, schedule)
    state = train.init_train_state(
        model, optimizer, trainable=trainable, key=jr.key(options.seed), ema=options.ema is not None
    )

    # What a checkpoint tells besides the state. `so_far` is what a resumed run has to know of the steps before.
    so_far = {"best": -1.0, "evaluated": 0, "left_out": 0, "bad_images": 0}
    metadata: dict[str, Any] = {
        "model": options.model,
        "norm": options.norm,
        "categories": [asdict(category) for category in train_set.categories],
        "min_size": max(options.min_sizes),
        "max_size": options.max_size,
        "canvases": options.canvases,
        "ema": options.ema is not None,
        "so_far": so_far,
    }
    if options.resume:
        try:
            state, saved = load_newest(last, state)
        except FileNotFoundError:
            console.print("Nothing was saved yet: starting at step 0")
        else:
            data.check_categories(
                train_set.categories,
                categories_of(saved),
                found_in=options.train_annotations,
                known_in=str(last),
                allow_renamed=options.allow_renamed,
            )
            so_far |= saved["so_far"]
            console.print(f"Going on at step {int(state.step)} from {last}", highlight=False)
    state = train.shard_state(state, mesh)

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

    def save(*folders: Path) -> None:
        saver.save(folders, state, step=int(state.step), metadata=metadata)

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
        detector = Detector(model, train_set.categories, max(options.min_sizes), options.max_size, options.canvases)
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
        save(*([best] if is_best else []), last)

    def ends_epoch(done: int) -> bool:
        return done % epoch_steps == 0 or done == total_steps

    write_json(options.output / "options.json", asdict(options))
    start, skipped_before = int(state.step), int(state.skipped)
    log = open_log(options.output / "metrics.jsonl", until=start, evaluated=so_far["evaluated"])
    timing = (options.output / "timing.jsonl").open("ab", buffering=0)
    batches = loader.iterate(start, total_steps)
    clock, images, told, pending = time.perf_counter(), 0, 0, None
    with saver, log, timing, closing(batches):
        if val_set is not None and ends_epoch(start) and so_far["evaluated"] < start:
            evaluate(val_set, start)  # the run ended before it could
        with progress() as bar:
            task = bar.add_task("training", total=total_steps, completed=start, status="compiling")
            for k, batch in batches:
                state, metrics = step(state, train.shard_batch(batch, mesh))
                saver.check()
                done, images = k + 1, images + options.batch_size
                stopping = stop.after_this_step() and done < total_steps
                saving = ends_epoch(done) or done % options.checkpoint_every == 0 or stopping
                logging = done % options.log_every == 0 or done == 1 or ends_epoch(done)
                if pending:
                    account(*pending)  # a step late: to wait for this one would leave the devices idle
                pending = k, metrics
                if saving or logging:
                    account(*pending)
                    pending = None
                for error in loader.bad_images[told:]:
                    console.print(f"Left out: {error}", highlight=False, soft_wrap=True)
                told = len(loader.bad_images)
                if logging:
                    values = {name: round(float(value), 6) for name, value in metrics.items()}
                    rate = float(jnp.asarray(schedule(k)))
                    counts = {name: so_far[name] for name in ("left_out", "bad_images")}
                    write(log, step=done, epoch=done / epoch_steps, rate=rate, **counts, **values)
                    speed = images / (time.perf_counter() - clock)
                    write(timing, step=done, time=time.time(), images_s=speed)
                    terms = [f"{n.removeprefix('loss_')} {v:.2f}" for n, v in values.items() if n.startswith("loss_")]
                    status = f"loss {values['loss']:.3f} ({', '.join(terms)}), {speed:.1f} images/s"
                    if so_far["left_out"]:
                        status += f", {so_far['left_out']} objects beyond --max-objects left out so far"
                    bar.update(task, completed=done, status=status)
                    clock, images = time.perf_counter(), 0
                if saving:
                    save(last)
                if stopping:
                    stop.leave(f"step {done}", saver)
                if ends_epoch(done) and val_set is not None:
                    bar.stop()
                    evaluate(val_set, done)
                    bar.start()
                    clock, images = time.perf_counter(), 0


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


def load(annotations: str, images: str, box_format: data.BoxFormat) -> data.CocoDataset:
    """A dataset, with a word on what was repaired."""
    dataset = data.load_coco(annotations, images, box_format=box_format)
    console.print(f"{annotations}: {len(dataset)} images, {dataset.report}", highlight=False)
    return dataset


def make_loss(options: Options) -> Callable[..., dict[str, WeightedSum]]:
    """The loss of one example: augmentation and detector, both inside the compiled step.

    The cast to the dtype that is computed in is there too, so that gradients are of the float32 parameters.
    """
    detector_loss = models.mask_rcnn_loss if options.model.startswith("mask") else models.faster_rcnn_loss

    def loss(model: Any, example: Batch, *, key: jax.Array) -> dict[str, WeightedSum]:
        augment_key, loss_key = jr.split(key)
        image, image_size, targets = train.augment(
            example.images,
            example.image_sizes,
            example.targets,
            canvas=example.canvas,
            min_sizes=options.min_sizes,
            max_size=options.max_size,
            flip_probability=options.flip,
            scale_range=options.jitter,
            key=augment_key,
        )
        return detector_loss(nn.cast(model, options.precision), image, image_size, targets, key=loss_key)

    return loss


def make_schedule(options: Options, epoch_steps: int, total_steps: int) -> optax.Schedule:
    """The learning rate at each step."""
    rate = train.scale_learning_rate(options.lr, batch_size=options.batch_size)
    if options.schedule == "cosine":
        return train.warmup_cosine(rate, total_steps=total_steps, warmup_steps=options.warmup_steps)
    milestones = [epoch * epoch_steps for epoch in options.decay_epochs]
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
        optimizer = optax.chain(optimizer, optax.masked(optax.scale(options.backbone_lr), models.in_resnet))
    return optimizer


if __name__ == "__main__":
    run(main, Options, __doc__)
