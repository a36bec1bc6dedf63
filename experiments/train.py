"""Trains a detector on a dataset in COCO format.

    python experiments/train.py --model faster_rcnn_resnet50_fpn --init resnet50-0676ba61.pth
        --train-annotations train.json --train-images train/ --val-annotations val.json --val-images val/
        --output runs/mine

The defaults are the field's "1x" recipe: SGD at .02 for 16 images per step, 12 epochs, decays after 8 and 11. Warm-up
and decays scale with the length of the run. The plan is printed before the first step.

`--output` receives `last/` (the whole state), `best/` (the model alone), `metrics.jsonl`, `timing.jsonl`,
`options.json` and `curves.html`, a page of curves that refreshes itself. Ctrl-C and SIGTERM save. However a run ended,
`--resume --output ...` continues it from the last checkpoint, with bit-identical parameters and metrics.

A batch is spread over all devices. On several machines, start the script on each with `--coordinator`; `--output` must
be a folder that all of them see. A signal to one process ends all of them after the same step.
"""

import operator
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.random as jr
import optax
from _header import check_objects, print_header
from _options import (
    Options,
    architecture,
    check_model,
    check_promise,
    check_sense,
    complete,
    draws_canvases,
    total_steps,
    with_own_sizes,
)
from _pace import Pace
from _record import ESTIMATE_AFTER, Record, print_memory
from _resume import check_options, given_before, restore, save_options, saved_options
from _run import Stop, remove_strays
from _shared import check_ranges, console, hidden, progress, run, with_sampling
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from detectax_eqx import Batch, WeightedSum, data, models, nn, train, zoo
from detectax_eqx.models import AbstractDetector


def main(options: Options) -> None:
    """Trains until the end or Ctrl-C, if no other run is using the output folder."""
    check_ranges(options)
    check_sense(options)
    if options.devices.coordinator is not None:
        connect(options.devices.coordinator, options.devices.num_processes, options.devices.process_id)
    with train.lock_folder(options.run.output):
        remove_strays(options.run.output)
        fit(options)


def fit(options: Options) -> None:
    """Trains: earlier state, data and model, step, loop."""
    output, resume = options.run.output, options.run.resume
    going_on = resume and train.latest_checkpoint(output / "last") is not None
    if not resume and (output / "last").exists():
        raise SystemExit(f"{output} holds a run already: pass --resume to go on with it, or another --output.")
    before = saved_options(output) if resume else None
    if before is not None:
        options = check_options(options, before, going_on=going_on)
    job = prepare(options, going_on=going_on)
    options, steps, epoch_steps = job.options, job.steps, job.loader.steps_per_epoch
    ema, key = options.optimization.ema, jr.key(options.run.seed)
    state = train.init_train_state(job.model, job.optimizer, trainable=job.trainable, key=key, ema=ema is not None)
    so_far = {"best": -1.0, "best_step": 0, "evaluated": 0, "left_out": 0, "bad_images": 0}
    if resume:
        state, so_far = restore(options, before, job.train_set, state, so_far)
    state = train.shard_state(state, job.mesh)
    start = int(state.step)
    if start < steps:
        save_options(options)
        print_header(
            options, job.train_set, model=job.model, trainable=job.trainable, schedule=job.schedule, steps=epoch_steps
        )
    step = train.make_train_step(
        make_loss(options, job.train_set.keypoint_pairs if "keypoints" in job.model.needs else ()),
        job.optimizer,
        trainable=job.trainable,
        mesh=job.mesh,
        accumulate=options.devices.accumulate,
        ema_decay=ema or 0.0,
    )
    saver, stop, pace = train.CheckpointSaver(), Stop(), Pace(steps, start)
    record = Record(options, job, so_far, saver, stop, start=start, skipped=int(state.skipped))
    del job  # its model would stay in memory beside the state's

    def ends_epoch(done: int) -> bool:
        return done % epoch_steps == 0 or done == steps

    with saver, record, closing(record.loader.iterate(start, steps)) as batches:
        if ends_epoch(start) and so_far["evaluated"] < start:
            record.evaluate(state, start)  # the run ended before it could
        if start >= steps:
            console.print(f"Nothing is left to do: the run has made {start} of {steps} steps (--epochs or --steps).")
            return
        if record.stalled():
            return
        with progress() as bar:
            task = bar.add_task("training", total=steps, completed=start, status="compiling")
            for k, batch in batches:
                batch = train.shard_batch(batch, record.mesh)
                if record.is_new(batch.images.canvas):
                    with pace.paused():  # a program for each canvas
                        print_memory(step.memory(state, batch), batch.images.canvas)
                state, metrics = step(state, batch)
                saver.check()
                done = k + 1
                pace.count(options.run.batch_size)
                stopping = stop.after_this_step() and done < steps
                saving = ends_epoch(done) or done % options.logging.checkpoint_every == 0 or stopping
                logging = done % options.logging.log_every == 0 or done == 1 or ends_epoch(done)
                record.account(k, metrics, at_once=saving or logging)
                if done - start == ESTIMATE_AFTER:
                    console.print(f"About {pace.left(done)} to go, {pace.seconds_per_step(done):.3g} s per step")
                if logging:
                    record.log(done, metrics, pace, bar, task)
                if saving:
                    record.save(state, done)
                if stopping:
                    stop.leave(f"step {done}", saver)
                if ends_epoch(done):
                    with pace.paused(), hidden(bar):
                        record.evaluate(state, done)
                    if record.stalled():
                        return


@dataclass(frozen=True)
class Job:
    """A run: complete options, data, devices, and the parts of the initial state."""

    options: Options
    train_set: data.CocoDataset
    val_set: data.CocoDataset | None
    mesh: Mesh
    loader: data.Loader
    steps: int
    architecture: zoo.Architecture
    model: AbstractDetector
    trainable: Any
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation


def prepare(options: Options, *, going_on: bool) -> Job:
    """Reads and checks the data, and builds the model. `going_on`: a checkpoint will replace its parameters."""
    shapes = architecture(options).shapes(1)
    options = with_own_sizes(options, shapes)
    check_model(options, shapes)
    train_set, val_set = load_data(options, shapes.needs)
    mesh = make_mesh(options)
    loader = make_loader(options, train_set, mesh, shapes)
    epoch_steps = loader.steps_per_epoch
    if not going_on:
        check_promise(options, epoch_steps)
    options = complete(options, epoch_steps)
    parts = architecture(options, train_set)
    model = make_model(options, parts, train_set.num_classes, pretrained=not going_on)
    schedule = make_schedule(options, epoch_steps)
    return Job(
        options,
        train_set,
        val_set,
        mesh,
        loader,
        total_steps(options, epoch_steps),
        parts,
        model,
        models.trainable(model, trainable_layers=options.architecture.trainable_layers or 0),
        schedule,
        make_optimizer(options, schedule),
    )


def make_model(options: Options, parts: zoo.Architecture, num_classes: int, *, pretrained: bool) -> AbstractDetector:
    """The detector, at the sizes of the options, with the weights of `--init` if `pretrained`."""
    model = parts.build(num_classes, key=jr.key(options.run.seed), checkpoint=options.devices.gradient_checkpointing)
    model = with_sampling(model, options.architecture.sampling)
    if options.detector.init is not None and pretrained:
        model, notes = zoo.initialize(model, parts, options.detector.init)
        for note in notes:
            console.print(note, highlight=False)
    sizes, resize = options.sizes, model.preprocessing.resize
    if isinstance(resize, models.Square):
        resize = models.Square(max(sizes.min_sizes))
    else:
        resize = replace(resize, min_size=max(sizes.min_sizes), max_size=sizes.max_size)
    return replace(model, preprocessing=replace(model.preprocessing, resize=resize))


def connect(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    """Joins the other processes. Only the first one prints."""
    if coordinator == "auto":
        jax.distributed.initialize()
    elif num_processes is None or process_id is None:
        raise SystemExit("--coordinator needs --num-processes and --process-id, or to be `auto`.")
    else:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    # Synchronise now: later, one process may compile for minutes while another loads from its cache and times out.
    multihost_utils.sync_global_devices("connected")
    console.quiet = jax.process_index() > 0


def load_data(options: Options, needs: frozenset[str]) -> tuple[data.CocoDataset, data.CocoDataset | None]:
    """The training images, checked for the targets that the detector `needs`, and the validation images, if any."""
    assert options.data.train_annotations is not None and options.data.train_images is not None  # check_sense
    train_set = load(options.data.train_annotations, options.data.train_images, options.reading.box_format)
    check_objects(train_set, options, needs)
    if options.data.val_annotations is None:
        return train_set, None
    val_images = options.data.val_images or options.data.train_images
    val_set = load(options.data.val_annotations, val_images, options.reading.box_format)
    data.check_categories(
        val_set.categories,
        train_set.categories,
        found_in=options.data.val_annotations,
        known_in=options.data.train_annotations,
        allow_renamed=options.reading.allow_renamed,
    )
    return train_set, val_set


def load(annotations: str, images: str, box_format: data.BoxFormat) -> data.CocoDataset:
    """Loads a dataset, and prints its repairs."""
    dataset = data.load_coco(annotations, images, box_format=box_format)
    console.print(f"{annotations}: {len(dataset)} images, {dataset.report}", highlight=False)
    return dataset


def make_mesh(options: Options) -> Mesh:
    """The mesh of all devices."""
    devices, shards, tensor = jax.device_count(), options.devices.parameter_shards, options.devices.tensor_shards
    if devices % (shards * tensor):
        raise SystemExit(f"--parameter-shards times --tensor-shards must divide the {devices} devices.")
    mesh = train.make_mesh(model=shards, tensor=tensor)
    if options.run.batch_size % (train.num_parts(mesh) * options.devices.accumulate):
        over = f"the {devices} devices" if tensor == 1 else f"{train.num_parts(mesh)} (devices by --tensor-shards)"
        raise SystemExit(f"--batch-size must be a multiple of {over} times --accumulate.")
    return mesh


def make_loader(options: Options, train_set: data.CocoDataset, mesh: Mesh, detector: AbstractDetector) -> data.Loader:
    """The loader of training batches, with the targets that the detector needs, of which shapes are enough.

    Batch k is a pure function of (seed, k); each process reads its part.
    """
    canvases, max_objects = options.sizes.canvases, options.sizes.max_objects
    sizes = options.sizes.limits
    max_source = data.source_limit(canvases)
    buckets = data.make_buckets(train_set.sizes, canvases=canvases, max_source=max_source, **sizes)
    limits = data.describe_limits(train_set, buckets=buckets, max_objects=max_objects, **sizes)
    for line in limits.lines:
        console.print(f"{options.data.train_annotations}: {line}", highlight=False, soft_wrap=True)
    return data.Loader(
        train_set,
        batch_size=options.run.batch_size,
        buckets=buckets,
        canvases=canvases if draws_canvases(options, detector) else (),
        seed=options.run.seed,
        max_objects=max_objects,
        mask_size=112 if "masks" in detector.needs else None,
        keypoints="keypoints" in detector.needs,
        keypoint_offset=detector.keypoint_offset,
        num_threads=options.reading.threads,
        rows=train.local_rows(mesh, options.run.batch_size),
        max_bad_images=options.reading.max_bad_images,
        cache=options.reading.cache,
    )


def make_loss(
    options: Options, keypoint_pairs: tuple[tuple[int, int], ...] = ()
) -> Callable[..., dict[str, WeightedSum]]:
    """The loss of one example: augmentation and detector, both inside the compiled step.

    `keypoint_pairs`: the keypoints that a flip exchanges, if the targets have any.

    The cast to the compute dtype is inside as well, so that gradients are taken at the float32 parameters.
    """

    def loss(model: Any, example: Batch, *, key: jax.Array) -> dict[str, WeightedSum]:
        augment_key, loss_key = jr.split(key)
        whole = draws_canvases(options, model)  # the image is resized to the whole canvas
        image, image_size, targets = train.augment(
            example.images.pixels,
            example.images.sizes,
            example.targets,
            canvas=example.images.canvas,
            min_sizes=(max(example.images.canvas),) if whole else options.sizes.min_sizes,
            max_size=options.sizes.max_size,
            flip_probability=options.augmentation.flip,
            scale_range=options.augmentation.jitter,
            keypoint_pairs=keypoint_pairs,
            square=isinstance(model.preprocessing.resize, models.Square),
            key=augment_key,
        )
        return nn.cast(model, options.detector.precision).loss(image, image_size, targets, key=loss_key)

    return loss


def make_schedule(options: Options, epoch_steps: int) -> optax.Schedule:
    """The learning rate at each step, of options that are `complete`."""
    chosen = options.optimization
    assert chosen.lr is not None and chosen.warmup_steps is not None and chosen.decay_epochs is not None
    rate = train.scale_learning_rate(chosen.lr, batch_size=options.run.batch_size)
    if chosen.schedule == "cosine":
        total = total_steps(options, epoch_steps)
        return train.warmup_cosine(rate, total_steps=total, warmup_steps=chosen.warmup_steps)
    milestones = [round(epoch * epoch_steps) for epoch in chosen.decay_epochs]
    return train.warmup_multistep(rate, milestones=milestones, warmup_steps=chosen.warmup_steps)


def make_optimizer(options: Options, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimiser, after gradient clipping and before the learning-rate factors of parts and of stages."""
    chosen = options.optimization
    decay = {"weight_decay": chosen.weight_decay, "decay_mask": None if chosen.decay_vectors else models.decayed}
    if chosen.optimizer == "sgd":
        optimizer = train.sgd(schedule, momentum=chosen.momentum, **decay)
    else:
        optimizer = train.adamw(schedule, **decay)
    if chosen.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(chosen.clip_norm), optimizer)
    for name, factor in chosen.part_lr.items():
        optimizer = optax.chain(optimizer, optax.masked(optax.scale(factor), partial(in_part, name)))
    if chosen.layer_decay != 1:
        rates = partial(models.layer_rates, decay=chosen.layer_decay)
        scale = optax.stateless(lambda updates, _: jax.tree.map(operator.mul, updates, rates(updates)))
        optimizer = optax.chain(optimizer, scale)
    return optimizer


def in_part(name: str, tree: Any) -> Any:
    """A mask of the arrays in a field of the detector; in the backbone, of those in its stages."""
    if name == "backbone":
        return models.in_backbone(tree)
    nothing = jax.tree.map(lambda _: False, tree)
    return replace(nothing, **{name: jax.tree.map(lambda _: True, getattr(tree, name))})


if __name__ == "__main__":
    run(main, Options, __doc__, defaults=given_before)
