"""Speed and remaining time of a run."""

import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta


class Pace:
    """Measures the time of training only: time within `paused` does not count.

    - `total`: steps of the run. `start`: steps made by earlier processes of it.
    """

    def __init__(self, total: int, start: int):
        self._total, self._first = total, start + 1
        self._began = self._window = time.perf_counter()
        self._images, self._counted = 0, 0

    @contextmanager
    def paused(self) -> Generator[None, None, None]:
        """A `with` block that is not training: compiling, evaluating."""
        before = time.perf_counter()
        try:
            yield
        finally:
            duration = time.perf_counter() - before
            self._began += duration
            self._window += duration

    def count(self, images: int) -> None:
        """Counts the images of a step. The first step waits for data, so it is excluded from the remaining time."""
        self._images += images
        self._counted += 1
        if self._counted == 1:
            self._began = time.perf_counter()

    def images_per_second(self) -> float:
        """The speed since this was last called."""
        now = time.perf_counter()
        speed = self._images / (now - self._window)
        self._window, self._images = now, 0
        return speed

    def seconds_per_step(self, done: int) -> float:
        """The mean time of a step so far; the run has made `done` steps."""
        return (time.perf_counter() - self._began) / max(1, done - self._first)

    def left(self, done: int) -> str:
        """The time that the remaining steps will take, without evaluations."""
        return str(timedelta(seconds=round(self.seconds_per_step(done) * (self._total - done))))
