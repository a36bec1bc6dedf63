"""Checkpoints written while training goes on."""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from ._checkpoint import Snapshot, take_snapshot, write_snapshot


class CheckpointSaver:
    """Saves checkpoints from a thread of its own, so that training waits for a copy of the state alone.

    At most one save is under way. A context manager: when it ends, what was under way is on disk, or its error is
    raised. Where there are several processes, each has one and calls it alike; the first one writes.

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
        """Copies the arrays of `tree` and returns; they are then written as `save_checkpoint` does.

        The next step may consume `tree` at once. If the save before is still under way, it is waited for first: a disk
        that is too slow for the distance of the saves slows training down, and no save is left out.

        - `folders`: one after the other gets the checkpoint. The rest is `save_checkpoint`'s.

        Raises what the save before this one failed with, and a `ValueError` for what `save_checkpoint` refuses.
        """
        self.wait()
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}.")
        snapshot = take_snapshot(tree, step, metadata)
        self._under_way = self._executor.submit(_write, [Path(folder) for folder in folders], snapshot, keep)

    def check(self) -> None:
        """Raises the error of a save that has failed by now. Costs nothing: call it after each step."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is under way, or raises the `CheckpointError` that it failed with."""
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
