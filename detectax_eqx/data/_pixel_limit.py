"""Pillow's limit on the pixels of an image, raised for those images that are known to be large."""

from collections.abc import Generator
from contextlib import contextmanager
from threading import Lock

from PIL import Image


class _Raised:
    """The numbers allowed at the moment, by all threads: Pillow has one limit for the whole process."""

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
    """Lets Pillow open and load an image of this many pixels within the `with` block. `None`: of its own limit.

    Another thread may open as large an image meanwhile, so whoever calls this compares the size found with the one
    allowed before loading.
    """
    if pixels is None:
        yield
        return
    _raised.add(pixels)
    try:
        yield
    finally:
        _raised.remove(pixels)
