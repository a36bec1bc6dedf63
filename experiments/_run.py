"""What lets a run of training be ended at any moment: signals, a log that a resumed run continues, stray files."""

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
    """Ctrl-C and SIGTERM, to be looked at between steps; a second signal stops at once.

    A step consumes the state that it is given: an exception in its midst would leave nothing to save.

    Several processes must stop after the same step. There JAX takes SIGTERM, and lets them agree on one; Ctrl-C in
    any of them is the same.

    - `signal`: the number of the signal that came, or 0.
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
        """Whether to stop. To be asked after each step."""
        # JAX sets the last number that any process asked with, 0 if none has yet, plus 1. So they count from 1, a
        # resumed run too: its steps begin later, and a signal during compilation would never be answered.
        self._asked += 1
        if multihost_utils.reached_preemption_sync_point(self._asked):
            self.signal = signal.SIGTERM
        return self.signal != 0

    def _handle(self, number: int, frame: object) -> None:
        again, self.signal = self.signal != 0, number
        if again or self._at_once:
            raise KeyboardInterrupt
        console.print("Stopping after this step (once more to stop at once) …")

    def _tell_all(self, number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        console.print("Stopping with the other processes after one of the next steps (once more to stop at once) …")
        os.kill(os.getpid(), signal.SIGTERM)

    @contextmanager
    def at_once(self, what: str, saver: train.CheckpointSaver) -> Generator[None, None, None]:
        """Within the `with` block, where the state is not being changed, a signal does not have to wait."""
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
        """Ends the process when what is being saved is on disk; the exit status is 128 + signal, as shells have it."""
        saver.wait()
        console.print(f"Stopped and saved at {what}; --resume goes on from there.")
        raise SystemExit(128 + self.signal)


def open_log(path: Path, *, until: int, evaluated: int) -> BinaryIO:
    """The metrics file, opened to append, without what was written after the checkpoint that is gone on from.

    - `until`: its step. `evaluated`: the step of the last evaluation that it knows of.

    Of several processes, the first one writes.
    """
    if jax.process_index() > 0:
        return Path(os.devnull).open("ab", buffering=0)
    kept = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else [], 1):
        if not line.endswith(b"\n"):
            continue  # the process was killed, or the disk full, as it was written
        try:
            entry = json.loads(line)
            if entry["step"] <= (until if "loss" in entry else evaluated):
                kept.append(line)
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path}, line {number} is not a line of metrics ({error}): remove it.") from None
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(b"".join(kept))
    temporary.replace(path)
    return path.open("ab", buffering=0)


def remove_strays(output: Path) -> None:
    """Removes what a process that was killed left half written in a run's folder, which must be locked."""
    if jax.process_index() == 0:
        removed = [path for name in ("last", "best") for path in train.remove_unfinished(output / name)]
        for path in (*output.glob(".*.tmp"), *output.glob("evaluation/.*.tmp")):
            path.unlink() if path.is_file() else shutil.rmtree(path)
            removed.append(path)
        if removed:
            names = ", ".join(str(path.relative_to(output)) for path in removed)
            console.print(f"Removed what a killed run left half written: {names}", highlight=False, soft_wrap=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("strays removed")


def write(log: BinaryIO, **values: float) -> None:
    """Adds a line, which is on disk before a checkpoint of the same step is. What is not finite becomes null."""
    if jax.process_index() > 0:
        return
    try:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        log.write(json.dumps(finite).encode() + b"\n")
        os.fsync(log.fileno())
    except OSError as error:
        raise SystemExit(f"Cannot write to {log.name}: {error.strerror}. Fix that, then go on with --resume.") from None
