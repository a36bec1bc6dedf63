"""Pictures: drawings are in the right place, visible and readable."""

import itertools
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from detectax_eqx import Detections, Targets
from detectax_eqx.draw import (
    class_color,
    draw_comparison,
    draw_detections,
    draw_targets,
    plot_calibration,
    plot_confusion,
    plot_error_costs,
    plot_precision_recall,
)


GRAY = np.full((120, 160, 3), 90, np.uint8)
TINY: dict[str, Any] = {"line_width": 1, "font_size": 8}


def detections_of(*boxes, scores=None, labels=None, valid=None, masks=None):
    n = len(boxes)
    return Detections(
        boxes=np.array(boxes, np.float32).reshape(n, 4),
        scores=np.array(np.linspace(0.99, 0.6, n) if scores is None else scores, np.float32),
        labels=np.array(range(n) if labels is None else labels, np.int32),
        valid=np.ones(n, bool) if valid is None else np.array(valid),
        masks=None if masks is None else np.array(masks, np.float32),
    )


def differs(picture, image=GRAY):
    """A mask of the pixels that were drawn on."""
    assert isinstance(picture, Image.Image) and picture.mode == "RGB"
    return (np.asarray(picture) != image).any(axis=-1)


def has_color(picture, label):
    return (np.asarray(picture) == class_color(label)).all(axis=-1)


def test_a_box_is_outlined_on_its_pixels():
    picture = draw_detections(GRAY, detections_of([20, 40, 100, 90]), **TINY)
    colored = has_color(picture, 0)
    assert colored[40, 20:100].all() and colored[89, 20:100].all()
    assert colored[40:90, 20].all() and colored[40:90, 99].all()
    assert not differs(picture)[42:88, 22:98].any()
    assert not differs(picture)[92:].any() and not differs(picture)[:, 102:].any()
    assert differs(picture)[31:39, 20:40].all()  # the label stands above


def test_an_image_without_detections_comes_back_as_it_was():
    nothing = detections_of([20, 40, 100, 90], [0, 0, 9, 9], scores=[0.49, 0.9], valid=[True, False])
    assert not differs(draw_detections(GRAY, nothing)).any()
    assert differs(draw_detections(GRAY, nothing, score_threshold=0.4)).any()
    assert not differs(draw_detections(GRAY, detections_of())).any()
    assert (GRAY == 90).all()


def test_a_mask_fills_its_box_alone():
    half = np.zeros((1, 28, 28))
    half[:, :, :14] = 1
    picture = draw_detections(GRAY, detections_of([20, 40, 100, 90], masks=half), mask_opacity=0.5, **TINY)
    inside = differs(picture)[42:88, 22:98]
    assert inside[:, :36].all() and not inside[:, 40:].any()
    expected = (np.array(class_color(0)) + 90) / 2
    assert np.abs(np.asarray(picture)[65, 40] - expected).max() <= 1
    empty = draw_detections(GRAY, detections_of([20, 40, 100, 90], masks=half * 0.5), **TINY)
    assert not differs(empty)[42:88, 22:98].any()
    low = draw_detections(GRAY, detections_of([20, 40, 100, 90], masks=half * 0.5), mask_threshold=0.4, **TINY)
    assert differs(low)[65, 40]


def test_a_mask_reaching_beyond_the_image_is_cut_not_squeezed():
    mask = np.zeros((1, 20, 20))
    mask[:, :, 10:] = 1  # the right half of a box whose left half is outside the image
    picture = draw_detections(GRAY, detections_of([-80, 20, 80, 100], masks=mask), **TINY)
    assert differs(picture)[60, 2:80].all() and not differs(picture)[60, 82:].any()
    mask = 1 - mask
    picture = draw_detections(GRAY, detections_of([-80, 20, 80, 100], masks=mask), **TINY)
    assert not differs(picture)[60, 3:78].any()


@pytest.mark.parametrize(
    "box",
    [
        [-1e9, -1e9, 1e9, 1e9],
        [np.nan, 0, 10, 10],
        [0, 0, np.inf, 10],
        [30, 30, 30, 30],
        [50, 50, 20, 20],
        [500, 500, 600, 600],
        [-60, -60, -50, -50],
    ],
)
def test_awkward_boxes_are_survived(box):
    for masks in (None, np.ones((1, 4, 4))):
        assert draw_detections(GRAY, detections_of(box, masks=masks)).size == (160, 120)


@pytest.mark.parametrize("image_size", [(120, 160), (700, 90), (12, 9), (1, 1)])
def test_any_size_of_image(image_size):
    image = np.zeros((*image_size, 3), np.uint8)
    picture = draw_detections(image, detections_of([0, 0, 8, 8], masks=np.ones((1, 3, 3))), class_names=["cat"])
    assert picture.size == image_size[::-1]


@pytest.mark.parametrize("corner", [(0, 0), (150, 0), (0, 110), (150, 110), (-30, -30)])
def test_labels_lie_within_the_image_and_hold_ink(corner):
    x, y = corner
    box = [x, y, x + 10, y + 10]
    picture = draw_detections(GRAY, detections_of(box), class_names=["traffic light"], font_size=12)
    ground = has_color(picture, 0)
    columns = np.flatnonzero(ground.sum(axis=0) > 8)
    rows = np.flatnonzero(ground.sum(axis=1) > 30)
    assert len(columns) > 60 and len(rows) > 8  # "traffic light 0.99" in full
    patch = np.asarray(picture)[rows[0] : rows[-1], columns[0] : columns[-1]]
    black = (patch.max(axis=-1) < 30).sum()
    white = (patch.min(axis=-1) > 225).sum()
    assert max(black, white) > 40


def test_labels_make_room_for_each_other():
    """Two objects in the same place: both labels are fully visible."""
    options = {"class_names": ["apple", "pear"], "font_size": 12}
    box = [40, 50, 120, 100]
    alone = [has_color(draw_detections(GRAY, detections_of(box, labels=[k]), **options), k).sum() for k in (0, 1)]
    both = draw_detections(GRAY, detections_of(box, box), **options)
    outline = 2 * (80 + 50)
    for label in (0, 1):
        assert has_color(both, label).sum() > alone[label] - outline


def test_the_best_is_on_top_in_any_order():
    boxes, masks = ([20, 40, 100, 90], [20, 40, 100, 90]), np.ones((2, 4, 4))
    for scores in ([0.9, 0.6], [0.6, 0.9]):
        picture = draw_detections(GRAY, detections_of(*boxes, scores=scores, masks=masks), mask_opacity=1.0, **TINY)
        assert has_color(picture, int(np.argmax(scores)))[65, 60]


def test_class_names_change_the_label_only():
    box = detections_of([20, 40, 100, 90], labels=[1])
    named, numbered = draw_detections(GRAY, box, class_names=["a", "b"]), draw_detections(GRAY, box)
    assert differs(named, np.asarray(numbered)).any()
    assert not differs(named, np.asarray(draw_detections(GRAY, box, class_names=["", "b"]))).any()
    short = draw_detections(GRAY, box, class_names=["a"])  # label 1 has no name
    assert not differs(short, np.asarray(numbered)).any()


def test_colors_are_distinct_stable_and_bright_enough():
    colors = [class_color(label) for label in range(90)]
    assert len(set(colors)) == 90
    assert colors[:3] == [class_color(label) for label in range(3)]
    for a, b in itertools.combinations(colors[:8], 2):
        assert np.abs(np.subtract(a, b)).sum() > 100
    assert all(np.dot(color, [0.299, 0.587, 0.114]) > 100 for color in colors)
    assert all(min(color) < 200 for color in colors)  # none is near white


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, bool])
def test_targets_use_the_frame_of_their_masks(dtype):
    mask = np.zeros((1, 20, 20), dtype)
    mask[:, :, 10:] = 255 if dtype == np.uint8 else 1
    targets = Targets(
        boxes=np.array([[0, 20, 80, 100]], np.float32),  # clipped
        labels=np.array([0], np.int32),
        valid=np.array([True]),
        masks=mask,
        mask_boxes=np.array([[-80, 20, 80, 100]], np.float32),
    )
    picture = draw_targets(GRAY, targets, class_names=["cat"], **TINY)
    assert differs(picture)[60, 2:80].all() and not differs(picture)[60, 82:].any()
    assert has_color(picture, 0)[20, 20:80].all()
    hidden = Targets(targets.boxes, targets.labels, np.array([False]), targets.masks, targets.mask_boxes)
    assert not differs(draw_targets(GRAY, hidden)).any()


def test_arrays_of_jax_and_read_only_arrays():
    detections = detections_of([20, 40, 100, 90], masks=np.ones((1, 4, 4)))
    expected = np.asarray(draw_detections(GRAY, detections))
    arrays = Detections(
        *(jnp.asarray(getattr(detections, name)) for name in ("boxes", "scores", "labels", "valid", "masks"))
    )
    np.testing.assert_array_equal(draw_detections(jnp.asarray(GRAY), arrays), expected)
    assert arrays.masks is not None
    half = Detections(
        *(
            arrays.boxes,
            arrays.scores.astype(jnp.bfloat16),
            arrays.labels,
            arrays.valid,
            arrays.masks.astype(jnp.bfloat16),
        )
    )
    assert not differs(draw_detections(GRAY, half, class_names=[""]), expected)[42:88, 22:98].any()


def test_a_batch_is_refused():
    batch = Detections(
        np.zeros((2, 1, 4), np.float32),
        np.zeros((2, 1), np.float32),
        np.zeros((2, 1), np.int32),
        np.zeros((2, 1), bool),
    )
    with pytest.raises(ValueError, match=r"one image, got boxes of shape \(2, 1, 4\)"):
        draw_detections(GRAY, batch)
    targets = Targets(batch.boxes, batch.labels, batch.valid)
    with pytest.raises(ValueError, match="one image"):
        draw_targets(GRAY, targets)


def test_a_crowd_is_striped():
    targets = Targets(np.array([[20, 40, 100, 90]], np.float32), np.array([0], np.int32), np.array([True]))
    plain = draw_targets(GRAY, targets, class_names=[""], **TINY)
    crowd = draw_targets(GRAY, targets, crowd=np.array([True]), class_names=[""], **TINY)
    assert not differs(plain)[42:88, 22:98].any()
    inside = differs(crowd)[42:88, 22:98]
    assert 0.45 < inside.mean() < 0.55
    assert (inside[:, 3:] == ~inside[:, :-3]).all()  # stripes as wide as the gaps, slanted
    assert (inside[3:] == ~inside[:-3]).all()
    # A mask bounds the stripes.
    half = np.zeros((1, 28, 28), np.float32)
    half[:, :, :14] = 1
    masked = Targets(targets.boxes, targets.labels, targets.valid, half)
    inside = differs(draw_targets(GRAY, masked, crowd=np.array([True]), **TINY))[42:88, 22:98]
    assert 0.4 < inside[:, :36].mean() < 0.6 and not inside[:, 40:].any()
    with pytest.raises(ValueError, match="crowd must have a row for each of the 1 targets, got 2"):
        draw_targets(GRAY, targets, crowd=np.array([True, False]))


def test_an_empty_name_gives_no_label():
    boxes = np.array([[20, 40, 100, 90], [110, 40, 150, 90]], np.float32)
    targets = Targets(boxes, np.array([0, 1], np.int32), np.array([True, True]))
    picture = draw_targets(GRAY, targets, class_names=["", "b"], **TINY)
    assert not differs(picture)[:38, :105].any() and differs(picture)[:38, 105:].any()


def test_a_comparison_has_truth_at_left_and_findings_at_right():
    targets = Targets(np.array([[20, 40, 100, 90]], np.float32), np.array([0], np.int32), np.array([True]))
    found = detections_of([60, 10, 150, 60], [0, 0, 9, 9], scores=[0.9, 0.2], labels=[1, 2])
    options = {"class_names": ["a", "b", "c"], **TINY}
    picture = np.asarray(draw_comparison(GRAY, targets, found, **options))
    strip = picture.shape[0] - 120
    assert 8 <= strip <= 20 and picture.shape[1] == 2 * 160 + 6
    np.testing.assert_array_equal(picture[strip:, :160], draw_targets(GRAY, targets, **options))
    np.testing.assert_array_equal(picture[strip:, 166:], draw_detections(GRAY, found, **options))
    titles = picture[:strip]
    assert (titles[:, :160] < 100).any() and (titles[:, 166:] < 100).any()
    low = np.asarray(draw_comparison(GRAY, targets, found, score_threshold=0.1, **options))
    assert (low[:, 166:] != picture[:, 166:]).any() and (low[:, :160] == picture[:, :160]).all()


def test_plots_show_what_they_are_given():
    plt = pytest.importorskip("matplotlib.pyplot")
    figure, axes = plt.subplots(2, 2)
    recall = np.linspace(0, 1, 101)
    precision = np.stack([1 - recall, np.full(101, -1.0), np.ones(101)])
    ax = plot_precision_recall(precision, recall, class_names=["a", "none", "b"], ax=axes[0, 0])
    assert ax.get_legend_handles_labels()[1] == ["a 0.50", "b 1.00", "mean 0.75"]
    np.testing.assert_allclose(np.asarray(ax.lines[-1].get_ydata()), 1 - recall / 2)
    ax = plot_confusion(np.array([[3, 0, 1], [0, 0, 0], [2, 0, 0]]), class_names=["a", "b"], ax=axes[0, 1])
    assert {text.get_position(): text.get_text() for text in ax.texts} == {(0, 0): "3", (2, 0): "1", (0, 2): "2"}
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b", "missed"]
    shares = ax.images[0].get_array()
    assert shares is not None
    np.testing.assert_allclose(shares, [[0.75, 0, 0.25], [0, 0, 0], [1, 0, 0]])
    ax = plot_error_costs({"missed": 0.2, "background": 0.0}, ax=axes[1, 0])
    # Bars are rectangles; the type stub of `patches` does not say so.
    widths = [bar.get_width() for bar in ax.patches]  # pyright: ignore[reportAttributeAccessIssue]
    assert widths == pytest.approx([20, 0])
    scores, share, counts = np.array([0.1, 0.0, 0.9]), np.array([0.2, 0.0, 0.8]), np.array([4, 0, 9])
    ax = plot_calibration(scores, share, counts, ax=axes[1, 1])
    assert np.asarray(ax.lines[-1].get_xydata()).tolist() == [[0.1, 0.2], [0.9, 0.8]]
    figure.canvas.draw()
    plt.close(figure)
    with pytest.raises(ValueError, match="class_names must name 2 classes, got 1"):
        plot_confusion(np.zeros((3, 3), np.int64), class_names=["a"])


def points_of(*points):
    return np.array([points], np.float32)


def test_keypoints_are_discs_and_bones_are_lines():
    detections = detections_of([20, 40, 100, 90])
    detections = replace(detections, keypoints=points_of((30, 50, 1.0), (90, 50, 0.2), (60, 80, -1.0)))
    skeleton = [[(0, 1), (1, 2)]]
    colored = has_color(draw_detections(GRAY, detections, skeletons=skeleton, **TINY), 0)
    assert colored[50, 30] and colored[50, 90] and colored[50, 30:90].all()
    assert not colored[78:83, 58:63].any() and not colored[65, 75]  # its score is below the threshold
    colored = has_color(draw_detections(GRAY, detections, skeletons=skeleton, keypoint_threshold=-2.0, **TINY), 0)
    assert colored[80, 60] and colored[65, 75]
    colored = has_color(draw_detections(GRAY, detections, **TINY), 0)
    assert colored[50, 30] and not colored[50, 40:80].any()


def test_hidden_keypoints_are_rings():
    boxes = np.array([[20, 40, 100, 90]], np.float32)
    targets = Targets(boxes, np.zeros(1, np.int32), np.ones(1, bool))
    targets = replace(targets, keypoints=points_of((30, 50, 2.0), (90, 50, 1.0), (60, 80, 0.0)))
    colored = has_color(draw_targets(GRAY, targets, line_width=2, font_size=8), 0)
    assert colored[50, 30] and not colored[50, 90] and colored[50, 93] and not colored[78:83, 58:63].any()
    both = draw_comparison(GRAY, targets, detections_of(), skeletons=[[(0, 1)]], line_width=2, font_size=8)
    assert both.size[0] == 2 * 160 + 6


@pytest.mark.parametrize("place", [np.nan, np.inf, -1e9, 1e12])
def test_awkward_keypoints_are_left_out(place):
    detections = detections_of([20, 40, 100, 90])
    points = replace(detections, keypoints=points_of((place, 50, 1.0), (50, 60, 1.0)))
    colored = has_color(draw_detections(GRAY, points, skeletons=[[(0, 1), (1, 7)]], **TINY), 0)
    assert colored[60, 50] and not colored[50, 60:95].any()
