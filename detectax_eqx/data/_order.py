"""The order of training batches: the images of batch `k` as a pure function of the seed and `k`."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Int64


class BatchOrder:
    """An endless sequence of batches over groups of images, with random access.

    Each group is an endless stream of permutations of its images, cut into batches. An epoch completes some batches of
    each group, which are shuffled together. Images left over after a group's last complete batch start its first batch
    in the next epoch. Every image is therefore used equally often, up to the group's current batch, and none is
    repeated to fill a batch unless its group is smaller than a batch.

    Without `shuffle`, images keep the given order, and the batches of an epoch are ordered by their last images.
    """

    def __init__(self, groups: Sequence[Sequence[int]], *, batch_size: int, seed: int, shuffle: bool):
        self._groups = [np.asarray(group, np.int64) for group in groups]
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._num_images = sum(len(group) for group in groups)
        # Batches are usually requested in sequence, so only the current permutations are cached.
        self._images = lru_cache(maxsize=2 * len(groups) + 2)(self._make_images)
        self._batches = lru_cache(maxsize=2)(self._make_batches)

    @property
    def steps_per_epoch(self) -> int:
        """Number of images divided by the batch size, rounded, and at least 1."""
        return max(1, (self._num_images + self._batch_size // 2) // self._batch_size)

    def __call__(self, k: int) -> tuple[int, Int64[np.ndarray, " {self._batch_size}"]]:
        """Returns the group of batch `k` and its images."""
        if k < 0:
            raise ValueError(f"k must not be negative, got {k}.")
        epoch = k * self._batch_size // self._num_images  # the epochs before it complete at most k batches
        while self._completed(epoch + 1) <= k:
            epoch += 1
        group, batch = self._batches(epoch)[k - self._completed(epoch)]
        return group, self._take(group, batch)

    def _completed(self, epochs: int) -> int:
        """The number of batches that the first `epochs` epochs complete."""
        return sum(epochs * len(group) // self._batch_size for group in self._groups)

    def _take(self, group: int, batch: int) -> Int64[np.ndarray, " b"]:
        """Returns the images of a group's batch, which may span several permutations."""
        size, start = len(self._groups[group]), batch * self._batch_size
        stop = start + self._batch_size
        images = [self._images(group, epoch) for epoch in range(start // size, -(-stop // size))]
        first = start - start // size * size
        return np.concatenate(images)[first : first + self._batch_size]

    def _make_images(self, group: int, epoch: int) -> Int64[np.ndarray, " n"]:
        images = self._groups[group]
        if not self._shuffle:
            return images
        return np.random.default_rng([self._seed, epoch, group]).permutation(images)

    def _make_batches(self, epoch: int) -> list[tuple[int, int]]:
        """Returns the batches of an epoch, as pairs of a group and a position in its stream of batches."""
        batches = [
            (group, batch)
            for group, images in enumerate(self._groups)
            for batch in range(epoch * len(images) // self._batch_size, (epoch + 1) * len(images) // self._batch_size)
        ]
        if self._shuffle:
            order = np.random.default_rng([self._seed, epoch, len(self._groups)]).permutation(len(batches))
            return [batches[i] for i in order]
        return sorted(batches, key=lambda batch: int(self._take(*batch)[-1]))
