"""Writes checkpoints in the background while training continues."""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from ._checkpoint import Snapshot, take_snapshot, write_snapshot


class CheckpointSaver:
    """Saves checkpoints from a background thread, so that training only waits while the state is copied.

    At most one save runs at a time. Use it as a context manager: on exit, it waits until the last save is on disk, or
    raises its error. With several processes, each has its own saver and makes the same calls; the first process writes.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> from detectax_eqx.train import latest_checkpoint
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with CheckpointSaver() as saver:
    ...         saver.save([folder], {"w": jnp.ones(3)}, step=7, metadata={})
    ...     latest_checkpoint(folder).name
    '00000007'
    """

    def __init__(self):
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="detectax-checkpoint")
        self._under_way: Future[None] | None = None

    def save(
        self,
        folders: Sequence[str | os.PathLike[str]],
        tree: PyTree,
        *,
        step: int,
        metadata: dict[str, Any],
        keep: int = 2,
    ) -> None:
        """Copies the arrays of `tree` and returns. They are then written in the background, as by `save_checkpoint`.

        The next step may donate `tree` immediately. If the previous save is still running, this waits for it first: a
        disk that is too slow for the interval between saves slows training down, but no save is skipped.

        - `folders`: the checkpoint is written to each of them in turn. The other arguments are as for
          `save_checkpoint`.

        Raises the error of the previous save if it failed, and a `ValueError` for the same arguments as
        `save_checkpoint`.
        """
        self.wait()
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}.")
        snapshot = take_snapshot(tree, step, metadata)
        self._under_way = self._executor.submit(_write, [Path(folder) for folder in folders], snapshot, keep)

    def check(self) -> None:
        """Raises the error of the last save if it has already failed. It does not wait: call it after each step."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the current save, if there is one, and raises its `CheckpointError` if it failed."""
        if self._under_way is not None:
            done, self._under_way = self._under_way, None
            done.result()

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._executor.shutdown()


def _write(folders: list[Path], snapshot: Snapshot, keep: int) -> None:
    for folder in folders:
        write_snapshot(folder, snapshot, keep)
