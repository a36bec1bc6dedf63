"""Plots evaluation results from plain arrays. Requires matplotlib: `pip install 'detectax_eqx[plot]'`."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64, Int64

from ._color import class_color
from ._fonts import FontFile, escape, installed_font


# matplotlib is imported where it is used, so that pictures can be drawn without it.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:
    Axes = Any


def plot_precision_recall(
    precision: Float64[np.ndarray, "k r"],
    recall: Float64[np.ndarray, " r"],
    *,
    class_names: Sequence[str],
    font: FontFile | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plots the precision of each class against recall, in its `class_color`, and the mean over classes in black.

    - `precision`, `recall`: 0..1, from `evaluate.analyze_errors`. Classes without objects, marked by -1, are left out.
    - `class_names`: by row of `precision`. There is no legend for more than twelve classes.
    - `font`: a font file for the names, see `draw_detections`. Default: matplotlib's `font.family` setting.
    - `ax`: the axes to draw on. Default: a new figure.

    >>> recall = np.linspace(0, 1, 11)
    >>> ax = plot_precision_recall(1 - recall[None] ** 2, recall, class_names=["cat"])
    >>> ax.get_legend_handles_labels()[1]
    ['cat 0.65', 'mean 0.65']
    """
    ax = _axes(ax, (4.8, 4.0))
    rows = np.flatnonzero(precision.max(axis=1, initial=-1) >= 0)
    names, text = _legible(class_names, font)
    for k in rows.tolist():
        color = np.array(class_color(k)) / 255 * 0.85  # slightly darker than in pictures, for the white background
        ax.plot(recall, precision[k], color=color, linewidth=1.4, label=f"{names[k]} {precision[k].mean():.2f}")
    if len(rows):
        mean = precision[rows].mean(axis=0)
        ax.plot(recall, mean, color="black", linewidth=2, label=f"mean {mean.mean():.2f}")
    ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    if 0 < len(rows) <= 12:
        for label in ax.legend(loc="lower left", fontsize="small").get_texts():
            label.set(**text)
    return ax


def plot_confusion(
    counts: Int64[np.ndarray, "k1 k1"],
    *,
    class_names: Sequence[str],
    font: FontFile | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plots a confusion matrix: counts, shaded by their fraction of the row.

    - `counts`: the output of `evaluate.confusion_matrix`. `class_names`: of the `k1 - 1` classes.
    - `font`: a font file for the names, see `draw_detections`. Default: matplotlib's `font.family` setting.
    - `ax`: the axes to draw on. Default: a new figure.

    >>> ax = plot_confusion(np.array([[8, 2], [1, 0]]), class_names=["cat"])
    >>> [text.get_text() for text in ax.texts]
    ['8', '2', '1']
    """
    if len(class_names) != len(counts) - 1:
        raise ValueError(f"class_names must name {len(counts) - 1} classes, got {len(class_names)}.")
    side = 2.2 + 0.45 * len(counts)
    ax = _axes(ax, (side, side * 0.9))
    share = counts / counts.sum(axis=1, keepdims=True).clip(1)
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if len(counts) <= 25:
        for row, column in np.argwhere(counts).tolist():
            color = "white" if share[row, column] > 0.5 else "black"
            ax.text(column, row, str(int(counts[row, column])), ha="center", va="center", color=color, fontsize="small")
    places = range(len(counts))
    names, text = _legible(class_names, font)
    ax.set_xticks(places, [*names, "missed"], rotation=60, ha="right", rotation_mode="anchor", **text)
    ax.set_yticks(places, [*names, "background"], **text)
    ax.set(xlabel="predicted class", ylabel="true class")
    return ax


def plot_error_costs(costs: Mapping[str, float], *, ax: Axes | None = None) -> Axes:
    """Plots the cost of each kind of error as bars. `costs`: in AP, 0..1, from `evaluate.ErrorAnalysis.costs`.

    >>> ax = plot_error_costs({"missed": 0.25, "background": 0.1})
    >>> [text.get_text() for text in ax.texts]
    ['25.0', '10.0']
    """
    ax = _axes(ax, (4.8, 0.8 + 0.3 * len(costs)))
    values = [100 * cost for cost in costs.values()]
    bars = ax.barh([name.replace("_", " ") for name in costs], values, color="#4878a8")
    ax.bar_label(bars, [f"{value:.1f}" for value in values], padding=3, fontsize="small")
    ax.invert_yaxis()
    ax.set(xlabel="cost, points of AP", xlim=(min(0, *values), 1.15 * max(1e-9, *values)))
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def plot_calibration(
    scores: Float64[np.ndarray, " b"],
    precision: Float64[np.ndarray, " b"],
    counts: Int64[np.ndarray, " b"],
    *,
    ax: Axes | None = None,
) -> Axes:
    """Plots a reliability diagram: precision against score. Calibrated scores lie on the diagonal.

    - `scores`, `precision`, `counts`: of each bin, from `evaluate.calibration`. Empty bins are left out. The area of a
      dot grows with the count of its bin.
    - `ax`: the axes to draw on. Default: a new figure.

    >>> ax = plot_calibration(np.array([0.2, 0.8]), np.array([0.1, 0.9]), np.array([5, 20]))
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('score', 'share that is right')
    """
    ax = _axes(ax, (4.0, 4.0))
    rows = np.flatnonzero(counts)
    area = 220 * counts[rows] / max(1, counts.max(initial=1))
    ax.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    ax.plot(scores[rows], precision[rows], color="#4878a8", linewidth=1.4)
    ax.scatter(scores[rows], precision[rows], s=12 + area, color="#4878a8", alpha=0.6)
    ax.set(xlim=(0, 1), ylim=(-0.02, 1.02), xlabel="score", ylabel="share that is right")
    return ax


def _legible(names: Sequence[str], font: FontFile | None) -> tuple[list[str], dict[str, Any]]:
    """Returns the names, escaped where necessary, and matplotlib text settings to draw them, with `$` as plain text."""
    from matplotlib import font_manager, rcParams

    def add(path: str) -> None:
        font_manager.fontManager.addfont(path)
        families.append(font_manager.FontProperties(fname=path).get_name())

    def has(character: str) -> bool:
        files = (font_manager.findfont(font_manager.FontProperties(family=[family])) for family in families)
        return any(font_manager.get_font(file).get_char_index(ord(character)) for file in files)

    families: list[str] = []
    if font is not None:
        add(os.fspath(font))
    families += rcParams["font.family"]
    for character in sorted(set("".join(names))):
        if character.isprintable() and not has(character) and (path := installed_font(character)) is not None:
            add(path)
    remedy = "Pass font= a font file that has them, or set matplotlib's font.family."
    return escape(names, has, remedy), {"fontfamily": families, "parse_math": False}


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Returns the given axes, or those of a new figure of `size` inches."""
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError("Plots need matplotlib: pip install 'detectax_eqx[plot]'.") from None
    return plt.subplots(figsize=size, layout="constrained")[1]
