"""Raises Pillow's limit on the number of pixels for images that are known to be large."""

from collections.abc import Generator
from contextlib import contextmanager
from threading import Lock

from PIL import Image


class _Raised:
    """The pixel numbers that all threads currently allow: Pillow has one limit for the whole process."""

    def __init__(self):
        self._lock = Lock()
        self._allowed: list[int] = []
        self._before: int | None = None

    def add(self, pixels: int) -> None:
        with self._lock:
            if not self._allowed:
                self._before = Image.MAX_IMAGE_PIXELS
            self._allowed.append(pixels)
            self._set()

    def remove(self, pixels: int) -> None:
        with self._lock:
            self._allowed.remove(pixels)
            self._set()

    def _set(self) -> None:
        Image.MAX_IMAGE_PIXELS = None if self._before is None else max([self._before, *self._allowed])


_raised = _Raised()


@contextmanager
def allow_pixels(pixels: int | None) -> Generator[None, None, None]:
    """Lets Pillow open and load an image of up to `pixels` pixels within the `with` block. `None`: keep Pillow's limit.

    The limit also applies to other threads in the meantime. Callers must therefore compare an image's actual size with
    the one they allow before they load it.
    """
    if pixels is None:
        yield
        return
    _raised.add(pixels)
    try:
        yield
    finally:
        _raised.remove(pixels)
