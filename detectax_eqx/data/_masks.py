"""Rasterises segmentations to coverage: the fraction of each cell of a box that the object covers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64, UInt8

from ._dataset import Segmentation


def mask_in_box(
    segmentation: Segmentation, box: Float[np.ndarray, " 4"], *, size: int
) -> UInt8[np.ndarray, "size size"]:
    """Divides a box into `size` × `size` cells and returns the part of each cell that the object covers, 0..255.

    Areas are exact, not sampled. Parts of the object outside the box are ignored.

    - `segmentation`: polygons as arrays of `(x, y)` points, which together form the object; or a run-length encoding in
      pycocotools' format, with compressed counts, whose pixel `i` covers `[i, i+1)`.
    - `box`: `(x0, y0, x1, y1)` in pixels, with a positive area.

    Raises a `ValueError` if there is no segmentation.

    >>> triangle = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    >>> mask_in_box((triangle,), np.array([0.0, 0.0, 4.0, 4.0]), size=2).tolist()
    [[255, 128], [128, 0]]
    """
    if segmentation is None:
        raise ValueError("segmentation is None: the object has a box only.")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}.")
    x0, y0, x1, y1 = (float(side) for side in box)
    if isinstance(segmentation, dict):
        pixels = decode_rle(segmentation)
        top, left = max(0, int(np.floor(y0))), max(0, int(np.floor(x0)))
        pixels = pixels[top : int(np.ceil(y1)), left : int(np.ceil(x1))]
        rows = _overlap(y0 - top, y1 - top, size, pixels.shape[0])
        columns = _overlap(x0 - left, x1 - left, size, pixels.shape[1])
        coverage = rows @ pixels.astype(np.float32) @ columns.T  # (size, h) @ (h, w) @ (w, size)
    else:
        origin, scale = np.array([x0, y0]), size / np.array([x1 - x0, y1 - y0])
        pieces = [polygon_coverage((piece - origin) * scale, size=(size, size)) for piece in segmentation]
        coverage = pieces[0] if len(pieces) == 1 else np.minimum(sum(pieces), 1.0)
    return np.rint(coverage * 255).astype(np.uint8)


def polygon_coverage(points: Float64[np.ndarray, "p 2"], *, size: tuple[int, int]) -> Float64[np.ndarray, "h w"]:
    """Returns the fraction of each grid cell `[j, j+1) × [i, i+1)` that lies inside a polygon, 0..1.

    The edges are cut at every grid line, so that each piece lies in one cell. A piece of signed height `d` whose middle
    lies at the fraction `f` of the cell's width adds `d (1 - f)` to that cell and `d f` to the next one. Cumulative
    sums along the rows then give the signed area to the right of all edges.

    >>> square = np.array([[0.5, 0.0], [2.0, 0.0], [2.0, 1.0], [0.5, 1.0]])
    >>> polygon_coverage(square, size=(2, 3)).tolist()
    [[0.5, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    height, width = size
    start = points
    step = np.roll(points, -1, axis=0) - start
    edges, cuts = [np.arange(len(points))], [np.zeros(len(points))]
    for axis, limit in enumerate((width, height)):
        low = np.minimum(start[:, axis], start[:, axis] + step[:, axis])
        high = np.maximum(start[:, axis], start[:, axis] + step[:, axis])
        first = np.clip(np.floor(low) + 1, 0, limit + 1)  # the first grid line strictly between the ends
        counts = np.maximum(np.clip(np.ceil(high) - 1, -1, limit) - first + 1, 0).astype(np.int64)
        edge = np.repeat(edges[0], counts)
        line = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
        edges.append(edge)
        cuts.append((line - start[edge, axis]) / step[edge, axis])
    edge, cut = np.concatenate(edges), np.concatenate(cuts)
    order = np.argsort(edge + cut)
    edge, cut = edge[order], cut[order]
    ends = np.append(cut[1:], 1.0)
    ends[:-1][edge[1:] != edge[:-1]] = 1.0
    middle, along = (cut + ends) / 2, step[edge]
    y = start[edge, 1] + middle * along[:, 1]
    # Pieces to the left and right of the grid are moved to its border; those above and below do not count.
    x = np.minimum(np.maximum(start[edge, 0] + middle * along[:, 0], 0), width)
    rise = (ends - cut) * along[:, 1] * ((y >= 0) & (y < height))
    column = x.astype(np.int64)
    cell = np.minimum(np.maximum(y, 0), height - 1).astype(np.int64) * (width + 2) + column
    carry = rise * (x - column)  # d f, for the next cell
    area = np.bincount(np.append(cell, cell + 1), np.append(rise - carry, carry), height * (width + 2))
    signed = np.cumsum(area.reshape(height, width + 2)[:, :width], axis=1)  # (h, w)
    return np.minimum(np.abs(signed), 1.0)


def decode_rle(rle: dict[str, Any]) -> UInt8[np.ndarray, "h w"]:
    """Decodes a run-length encoding with compressed counts to pixels, 1 inside the object and 0 elsewhere.

    >>> decode_rle({"size": [2, 3], "counts": b"132"}).tolist()
    [[0, 1, 0], [1, 1, 0]]
    """
    height, width = rle["size"]
    runs = rle_counts(rle["counts"])
    pixels = np.repeat((np.arange(len(runs)) % 2).astype(np.uint8), runs)
    return pixels.reshape(width, height).T  # runs go down the columns


def rle_counts(text: bytes) -> Int64[np.ndarray, " n"]:
    """Decodes run lengths from COCO's compressed form. Their sum is not checked.

    Each character holds 5 bits of a number, least significant first. From the fourth run on, numbers are differences to
    the run two before.

    Raises a `ValueError` if a character is outside the alphabet or the last number is truncated.

    >>> rle_counts(b"52203").tolist()
    [5, 2, 2, 2, 5]
    """
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    values, _ = _numbers(codes, np.array([len(codes)]))
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def decode_counts(texts: Sequence[bytes]) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " m"]]:
    """Decodes `m` compressed encodings. Returns their run lengths, concatenated, and the number of runs of each.

    Raises the same `ValueError` as `rle_counts` if one of them is malformed.

    >>> runs, counts = decode_counts([b"52203", b"6"])
    >>> runs.tolist(), counts.tolist()
    ([5, 2, 2, 2, 5, 6], [5, 1])
    """
    if not texts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    codes = np.frombuffer(b"".join(texts), np.uint8).astype(np.int64) - 48
    values, counts = _numbers(codes, np.array([len(text) for text in texts]))
    position = np.arange(len(values)) - np.repeat(np.cumsum(counts) - counts, counts)  # of each run in its encoding
    # Runs 1, 3, 5, … are a chain of differences, and so are 2, 4, 6, …
    for chain, sizes in ((position % 2 == 1, counts // 2), ((position % 2 == 0) & (position > 0), (counts - 1) // 2)):
        sums = np.cumsum(values[chain])
        before = np.append(0, sums)[np.cumsum(sizes) - sizes]
        values[chain] = sums - np.repeat(before, sizes)
    return values, counts


def _numbers(
    codes: Int64[np.ndarray, " c"], sizes: Int64[np.ndarray, " m"]
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " m"]]:
    """Decodes the signed numbers in `m` concatenated texts of these sizes. Returns them and the count of each text."""
    if sizes.min() == 0 or codes.min() < 0 or codes.max() > 63:
        raise ValueError("its counts are empty or hold a character outside the alphabet")
    ends = np.cumsum(sizes) - 1
    last = (codes & 32) == 0  # the last character of a number
    if not last[ends].all():
        raise ValueError("its counts end within a number")
    starts = np.append(0, np.flatnonzero(last)[:-1] + 1)
    lengths = np.diff(np.append(starts, len(codes)))
    if lengths.max() > 7:  # 35 bits
        raise ValueError("its counts hold a number that is too large")
    shift = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    values = np.add.reduceat((codes & 31) << shift, starts)
    negative = (codes[last] & 16) != 0
    values = np.where(negative, values - (1 << (5 * lengths)), values)
    return values, np.diff(np.append(0, np.cumsum(last)[ends]))


def _overlap(low: float, high: float, cells: int, pixels: int) -> Float32[np.ndarray, "cells pixels"]:
    """Returns the fraction of each of the equal cells between `low` and `high` that lies in each pixel."""
    edges = np.linspace(low, high, cells + 1)
    pixel = np.arange(pixels)
    shared = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)  # (cells, pixels)
    return (np.maximum(shared, 0) * (cells / (high - low))).astype(np.float32)
