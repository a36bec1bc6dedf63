"""The page of a training run's curves."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ._page import file_name, write_page


# The maximum number of points per curve. A longer curve is averaged over this many blocks of steps.
MAX_POINTS = 500
# The interval, in seconds, at which the page of a run in progress reloads itself.
RELOAD_SECONDS = 20
# The endings of the COCO metrics that are drawn, after the IoU type.
COCO_METRICS = ("_AP", "_AP50", "_AP75")


def write_curves(path: Path, metrics: Path, *, total_steps: int, running: bool) -> None:
    """Writes a page with the curves of a run: losses, COCO metrics, learning rate and gradient norm over steps.

    - `metrics`: the `metrics.jsonl` file that train.py writes, with one JSON object per line, each with a `step`.
    - `total_steps`: the planned length of the run, where the step axes end.
    - `running`: whether the page reloads itself, so that an open browser follows the run.

    Incomplete lines, such as the last line of a process that was killed, are ignored.
    """
    entries = list(_entries(metrics))
    names = list(dict.fromkeys(name for entry in entries for name in entry))  # in order of first occurrence
    charts = [
        {"title": title, "curves": [curve_of(entries, name) for name in names if belongs(name)]}
        for title, belongs in CHARTS.items()
    ]
    last = max((entry["step"] for entry in entries), default=0)
    content = {
        "title": f"Training: {file_name(path.resolve().parent)}",
        "subtitle": f"step {last:,} of {total_steps:,}" + ("" if running or last >= total_steps else ", stopped"),
        "total": max(total_steps, last),
        "charts": [chart for chart in charts if chart["curves"]],
        "reload": RELOAD_SECONDS if running else None,
    }
    write_page(path, title=content["title"], body="curves.html", scripts=("charts.js", "curves.js"), data=content)


# The title of each chart of the page, and which metrics it shows.
CHARTS = {
    "Loss": lambda name: name.startswith("loss"),
    "COCO metrics": lambda name: name.endswith(COCO_METRICS),
    "Learning rate": lambda name: name == "rate",
    "Gradient norm": lambda name: name == "gradient_norm",
}


def curve_of(entries: Iterable[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """The points of one metric, at most `MAX_POINTS`, without the steps at which it is undefined."""
    points = [(entry["step"], entry[name]) for entry in entries if entry.get(name) is not None]
    if name.endswith(COCO_METRICS):
        # -1: the metric is undefined, as there is no ground truth
        points = [(step, value) for step, value in points if value >= 0]
    size = -(-len(points) // MAX_POINTS) or 1
    blocks = [points[at : at + size] for at in range(0, len(points), size)]
    means = [[sum(values) / len(block) for values in zip(*block, strict=True)] for block in blocks]
    return {"name": name, "xs": [round(step, 1) for step, _ in means], "ys": [value for _, value in means]}


def _entries(metrics: Path) -> Iterable[dict[str, Any]]:
    for line in metrics.read_bytes().splitlines() if metrics.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue
