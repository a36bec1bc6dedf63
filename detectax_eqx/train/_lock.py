"""One run at a time in a folder."""

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

    The operating system holds the lock on `folder/.lock` and takes it back when the process ends, however it ends. The
    file itself stays. Where there are several processes, the first one holds it for all.

    Raises a `BlockingIOError` that names the process and host which hold the lock.

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
        except OSError as error:  # some network file systems know no locks
            warnings.warn(f"{folder} cannot be locked ({error}): nothing keeps another run out of it.", stacklevel=3)
        file.truncate(0)
        file.write(f"process {os.getpid()} on host {socket.gethostname()}")
        file.flush()
        yield
