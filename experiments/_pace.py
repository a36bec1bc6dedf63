"""How fast a run trains, and how long it has to go."""

import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta


class Pace:
    """Measures training alone: what is done while it is `paused` does not count.

    - `total`: steps of the run. `start`: the steps made before.
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
        """Counts the images of a step. The first, for which data are waited for, is left out of the time to go."""
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
        """The mean over the whole of this run, which has made `done` steps."""
        return (time.perf_counter() - self._began) / max(1, done - self._first)

    def left(self, done: int) -> str:
        """The time that the other steps will take, evaluations aside."""
        return str(timedelta(seconds=round(self.seconds_per_step(done) * (self._total - done))))
