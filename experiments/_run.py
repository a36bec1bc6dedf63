"""Interruption of a training run: signals, a log that a resumed run continues, leftover files."""

import json
import math
import os
import shutil
import signal
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn

import jax
from _shared import console
from jax.experimental import multihost_utils

from detectax_eqx import train


class Stop:
    """Records Ctrl-C and SIGTERM, to be checked between steps; a second signal stops immediately.

    A step donates its input state, so an exception within it would leave nothing to save.

    Several processes must stop after the same step: JAX handles SIGTERM and makes them agree on one. Ctrl-C in any
    process does the same.

    - `signal`: the number of the received signal, or 0.
    """

    def __init__(self):
        self.signal = 0
        self._at_once = False
        self._asked = 0
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._handle)
            signal.signal(signal.SIGINT, self._handle)
        else:
            signal.signal(signal.SIGINT, self._tell_all)

    def after_this_step(self) -> bool:
        """Whether to stop. Call it after every step."""
        # The agreed point is one more than the largest number that any process has passed, or 1 if none has. So count
        # from 1 even in a resumed run: with its own step numbers, a signal during compilation would be missed.
        self._asked += 1
        if multihost_utils.reached_preemption_sync_point(self._asked):
            self.signal = signal.SIGTERM
        return self.signal != 0

    def _handle(self, number: int, frame: object) -> None:
        again, self.signal = self.signal != 0, number
        if again or self._at_once:
            raise KeyboardInterrupt
        console.print("Stopping after this step (interrupt again to stop immediately) …")

    def _tell_all(self, number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        console.print("Stopping all processes after one of the next steps (interrupt again to stop immediately) …")
        os.kill(os.getpid(), signal.SIGTERM)

    @contextmanager
    def at_once(self, what: str, saver: train.CheckpointSaver) -> Generator[None, None, None]:
        """Lets a signal stop the process immediately within the `with` block, which must not change the state."""
        self._at_once = True
        try:
            if self.signal:
                raise KeyboardInterrupt
            yield
        except KeyboardInterrupt:
            self.leave(what, saver)
        finally:
            self._at_once = False

    def leave(self, what: str, saver: train.CheckpointSaver) -> NoReturn:
        """Ends the process once pending checkpoints are on disk, with exit status 128 + signal as in shells."""
        saver.wait()
        console.print(f"Stopped and saved at {what}; --resume continues from there.")
        raise SystemExit(128 + self.signal)


def open_log(path: Path, *, until: int, evaluated: int) -> BinaryIO:
    """Opens the metrics file to append, after removing lines newer than the checkpoint that the run resumes from.

    - `until`: the step of the checkpoint. `evaluated`: the step of its last evaluation.

    Only the first process writes.
    """
    if jax.process_index() > 0:
        return Path(os.devnull).open("ab", buffering=0)
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else [], 1):
        if not line.endswith(b"\n"):
            continue  # a partial line: the process was killed, or the disk was full
        try:
            entry = json.loads(line)
            if entry["step"] <= (until if "loss" in entry else evaluated):
                lines.append(line)
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path}, line {number} is not a line of metrics ({error}): remove it.") from None
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(b"".join(lines))
    temporary.replace(path)
    return path.open("ab", buffering=0)


def remove_strays(output: Path) -> None:
    """Removes unfinished files of a killed process from a run's folder, which must be locked."""
    if jax.process_index() == 0:
        removed = [path for name in ("last", "best") for path in train.remove_unfinished(output / name)]
        for path in (*output.glob(".*.tmp"), *output.glob("evaluation/.*.tmp")):
            path.unlink() if path.is_file() else shutil.rmtree(path)
            removed.append(path)
        if removed:
            names = ", ".join(str(path.relative_to(output)) for path in removed)
            console.print(f"Removed unfinished files of a killed run: {names}", highlight=False, soft_wrap=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("strays removed")


def write(log: BinaryIO, **values: float) -> None:
    """Appends a line and syncs it to disk, so that it precedes a checkpoint of the same step. NaN becomes null."""
    if jax.process_index() > 0:
        return
    try:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        log.write(json.dumps(finite).encode() + b"\n")
        os.fsync(log.fileno())
    except OSError as error:
        raise SystemExit(
            f"Cannot write to {log.name}: {error.strerror}. Fix that, then continue with --resume."
        ) from None
