"""Output of a training run: metrics, timing, log, curves, checkpoints, and evaluation results."""

import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from _options import Options, detection_canvases
from _pace import Pace
from _resume import describe_data
from _run import Stop, open_log, write
from _shared import console, evaluate_on
from _track import Trackers
from rich.progress import Progress, TaskID

from detectax_eqx import report, train, zoo
from detectax_eqx.evaluate import format_number


if TYPE_CHECKING:
    from train import Job  # the script, where it is on the path
# The remaining time is first printed after this number of steps.
ESTIMATE_AFTER = 5


class Record:
    """A context manager that holds the files of a run open.

    - `so_far`: state that a resumed run continues: the best score and its step, the last evaluated step, and counts of
      unreadable images and of objects beyond the capacity.
    - `start`, `skipped`: steps made, and steps skipped as not finite, before this process.
    """

    def __init__(
        self,
        options: Options,
        job: "Job",
        so_far: dict[str, Any],
        saver: train.CheckpointSaver,
        stop: Stop,
        *,
        start: int,
        skipped: int,
    ):
        self.loader, self.mesh, self.so_far = job.loader, job.mesh, so_far
        self._options, self._train_set, self._val_set = options, job.train_set, job.val_set
        self._schedule, self._saver, self._stop, self._start = job.schedule, saver, stop, start
        self._skipped, self._reported = skipped, 0
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._canvases: set[tuple[int, int]] = set()
        self._output, self._total = options.run.output, job.steps
        self._last, self._best = self._output / "last", self._output / "best"
        self._trackers = Trackers(options, start=start)
        self._drawn = 0.0
        about = zoo.run_metadata(
            job.architecture,
            job.model,
            job.train_set.categories,
            detection_canvases(options, job.model),
            ema=options.optimization.ema is not None,
        )
        self._metadata = {**about, "data": describe_data(job.train_set), "so_far": so_far}

    def __enter__(self) -> "Record":
        with ExitStack() as stack:
            path = self._output / "metrics.jsonl"
            self._log = stack.enter_context(open_log(path, until=self._start, evaluated=self.so_far["evaluated"]))
            self._timing = stack.enter_context((self._output / "timing.jsonl").open("ab", buffering=0))
            stack.enter_context(self._trackers)
            stack.callback(self._draw, running=False)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def is_new(self, canvas: tuple[int, int]) -> bool:
        """Whether this canvas is seen for the first time."""
        new = canvas not in self._canvases
        self._canvases.add(canvas)
        return new

    def account(self, k: int, metrics: dict[str, jax.Array], *, at_once: bool) -> None:
        """Counts objects and images that batch `k` left out.

        One step late, unless `at_once`: waiting for the current step would leave the devices idle.
        """
        if self._pending is not None:
            self._count(*self._pending)
        self._pending = k, metrics
        if at_once:
            self._count(*self._pending)
            self._pending = None
        for error in self.loader.bad_images[self._reported :]:
            console.print(f"Left out: {error}", highlight=False, soft_wrap=True)
        self._reported = len(self.loader.bad_images)

    def _count(self, k: int, metrics: dict[str, jax.Array]) -> None:
        """Adds up counts, and ends the run after a step that is not finite, unless such steps are skipped."""
        self.so_far["left_out"] += int(metrics["overflow"])
        self.so_far["bad_images"] += int(metrics["invalid"])
        if self._options.optimization.non_finite == "stop" and int(metrics["skipped"]) > self._skipped:
            self._saver.wait()
            ids = [self._train_set.images[i].id for i in self.loader.indices(k)]
            raise SystemExit(
                f"Step {k + 1}: loss or gradient is not finite, on the images with ids {ids}. The last good checkpoint "
                f"is {train.latest_checkpoint(self._last)}. A lower --lr or --clip-norm may help; --non-finite skip "
                "goes on."
            )

    def log(self, done: int, metrics: dict[str, jax.Array], pace: Pace, bar: Progress, task: TaskID) -> None:
        """Writes the metrics of a step to files and trackers, and to the bar or, without a terminal, as a line."""
        values = {name: round(float(value), 6) for name, value in metrics.items()}
        rate = float(jnp.asarray(self._schedule(done - 1)))
        epoch = done / self.loader.steps_per_epoch
        counts = {name: self.so_far[name] for name in ("left_out", "bad_images")}
        write(self._log, step=done, epoch=epoch, rate=rate, **counts, **values)
        speed = pace.images_per_second()
        write(self._timing, step=done, time=time.time(), images_s=speed)
        self._trackers.log("train", {"rate": rate, **values}, done)
        if time.monotonic() > self._drawn + report.RELOAD_SECONDS:
            self._draw(running=True)
        left = pace.left(done) if done - self._start >= ESTIMATE_AFTER else None
        status = describe_step(values, rate, speed, self.so_far["left_out"], left)
        bar.update(task, completed=done, status=status)
        if bar.disable:
            total = bar.tasks[task].total
            console.print(f"step {done}/{total:.0f} (epoch {epoch:.2f}): {status}", highlight=False, soft_wrap=True)

    def save(self, state: train.TrainState, done: int) -> None:
        """Saves a checkpoint of the whole state."""
        self._saver.save([self._last], state, step=done, metadata=self._metadata)

    def evaluate(self, state: train.TrainState, done: int) -> None:
        """Evaluates on the validation images, if there are any, and saves the model if it is the best so far."""
        if self._val_set is None:
            return
        model = train.to_host(state.inference_model)
        canvases = detection_canvases(self._options, model)
        predictor = zoo.Predictor(model, self._train_set.categories, canvases)
        with self._stop.at_once(f"evaluation after step {done}", self._saver):
            metrics = evaluate_on(
                predictor,
                self._val_set,
                self._output / "evaluation",
                num_threads=self._options.reading.threads,
                allow_renamed=self._options.reading.allow_renamed,
            )
        epoch = done / self.loader.steps_per_epoch
        numbers = {f"{kind}_{name}": value for kind, m in metrics.items() for name, value in m.numbers.items()}
        write(self._log, step=done, epoch=epoch, **numbers)
        self._trackers.log("val", numbers, done)
        shown = {name: number for name, number in numbers.items() if name.endswith(("AP", "AP50"))}
        text = ", ".join(f"{name} {format_number(number)}" for name, number in shown.items())
        score = next(numbers[f"{kind}_AP"] for kind in ("segm", "keypoints", "bbox") if f"{kind}_AP" in numbers)
        if score < 0:
            text += "; nothing to score by in the validation annotations: best/ is the last checkpoint"
        console.print(f"epoch {epoch:.1f}: {text}", highlight=False)
        is_best = score > self.so_far["best"] or score < 0
        self.so_far.update(best=max(score, self.so_far["best"]), evaluated=done)
        if is_best:  # the model alone: the rest of the state is in `last`
            self.so_far["best_step"] = done
            detects = {"model" if state.ema is None else "ema": state.inference_model}
            self._saver.save([self._best], detects, step=done, metadata=self._metadata, keep=1)
        self.save(state, done)

    def stalled(self) -> bool:
        """Whether the run must end because its score did not improve for `--patience` epochs; then says so."""
        patience, so_far = self._options.run.patience, self.so_far
        epochs = (so_far["evaluated"] - so_far["best_step"]) / self.loader.steps_per_epoch
        stalled = patience is not None and epochs >= patience
        if stalled:
            console.print(
                f"Stopped after step {so_far['evaluated']}: the best AP, {so_far['best']:.3f}, is {epochs:.0f} epochs "
                f"old (--patience {patience}). best/ holds its model.",
                highlight=False,
            )
        return stalled

    def _draw(self, *, running: bool) -> None:
        """Writes the page of curves."""
        if jax.process_index() == 0:
            page, metrics = self._output / "curves.html", self._output / "metrics.jsonl"
            with suppress(OSError):  # a full disk ends the run where metrics are written, in words of its own
                report.write_curves(page, metrics, total_steps=self._total, running=running)
            self._drawn = time.monotonic()


def print_memory(size: int | None, canvas: tuple[int, int]) -> None:
    """Prints the memory of the program compiled for a canvas."""
    if size is not None:
        console.print(
            f"memory of a step at {canvas[0]}×{canvas[1]}: {size / 2**20:,.0f} MiB on each device", highlight=False
        )


def describe_step(values: dict[str, float], rate: float, speed: float, left_out: int, left: str | None) -> str:
    """The metrics of a step in one line, the most important first, as narrow terminals cut its end."""
    terms = [f"{name.removeprefix('loss_')} {value:.2f}" for name, value in values.items() if name not in train.METRICS]
    ahead = f"{left} left, " if left else ""
    text = f"{speed:.1f} images/s, {ahead}loss {values['loss']:.3f} ({', '.join(terms)}), rate {rate:.3g}"
    return f"{text}, {left_out} objects beyond --max-objects left out so far" if left_out else text
