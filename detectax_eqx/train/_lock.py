"""A lock that allows one run at a time in a folder."""

import fcntl
import os
import socket
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import jax


LOCK = ".lock"


@contextmanager
def lock_folder(folder: str | os.PathLike[str]) -> Generator[None, None, None]:
    """Keeps other runs out of a folder for as long as the `with` block, or the process, lasts.

    The operating system locks the file `folder/.lock` and releases the lock when the process ends, even if it is
    killed. The file itself is not removed. With several processes, the first one holds the lock for all of them.

    Raises a `BlockingIOError` that names the process and the host that hold the lock.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, lock_folder(folder):
    ...     with lock_folder(folder):
    ...         pass  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    BlockingIOError: ... is in use by process ... on host ...: wait for it to end, or use another folder.
    """
    if jax.process_index() > 0:
        yield
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise BlockingIOError(
                f"{folder} is in use by {holder}: wait for it to end, or use another folder."
            ) from None
        except OSError as error:  # some network file systems do not support locks
            warnings.warn(f"{folder} cannot be locked ({error}): another run may write to it.", stacklevel=3)
        file.truncate(0)
        file.write(f"process {os.getpid()} on host {socket.gethostname()}")
        file.flush()
        yield
