"""Comparing detections of two runtimes: differences that rounding explains, and error messages for the others."""

import re

import numpy as np
import pytest

from detectax_eqx import export
from detectax_eqx.export._compare import HALF, check_counts, match_detections


def detections(*rows, masks=None):
    """Arrays of detections from rows `(label, score, x0, y0, x1, y1)`."""
    table = np.array(rows, np.float32).reshape(-1, 6)
    arrays = {"boxes": table[:, 2:], "scores": table[:, 1], "labels": table[:, 0].astype(np.int32)}
    return arrays if masks is None else arrays | {"masks": np.full((len(rows), 4, 4), masks, np.float32)}


SURE, CELL = (1, 0.95, 10, 10, 50, 60), (2, 0.8, 70, 20, 90, 44)
FAINT = (1, 0.0596, 100, 30, 130, 34.5)
NEXT = (1, 0.9, 14, 10, 54, 60)  # overlaps SURE with an IoU of .82
BOTH = detections(SURE, CELL)

ACCEPTED = {
    "the same": (BOTH, BOTH, (2, 0)),
    "nothing in either": (detections(), detections(), (0, 0)),
    "another order": (detections(CELL, SURE), BOTH, (2, 0)),
    "a faint one missing": (BOTH, detections(SURE, CELL, FAINT), (2, 1)),
    "a faint one more": (detections(SURE, CELL, FAINT), BOTH, (2, 1)),
    "a faint one of another label": (detections(SURE, FAINT), detections(SURE, (2, *FAINT[1:])), (1, 2)),
    "equal boxes of two labels": (
        detections(SURE, (2, 0.9, *SURE[2:])),
        detections((2, 0.9, *SURE[2:]), SURE),
        (2, 0),
    ),
    "equal boxes and label, of two scores": (
        detections((1, 0.3, *SURE[2:]), SURE),
        detections(SURE, (1, 0.3, *SURE[2:])),
        (2, 0),
    ),
    "neighbours": (detections(NEXT, SURE), detections(SURE, NEXT), (2, 0)),
    "a box without area": (detections((1, 0.9, 5, 5, 5, 9)), detections((1, 0.9, 5, 5, 5, 9)), (1, 0)),
    "a box without area, moved by rounding": (
        detections((1, 0.9, 0, 171.8, 0, 193)),
        detections((1, 0.9, 0, 171.8001, 0, 193)),
        (1, 0),
    ),
    "moved within the tolerance": (detections((1, 0.95, 10.04, 10, 50, 60)), detections(SURE), (1, 0)),
    "masks within the tolerance": (detections(SURE, masks=0.505), detections(SURE, masks=0.5), (1, 0)),
}
REFUSED = {
    "a sure one missing": (
        detections(SURE),
        BOTH,
        "the file lacks",
        "label 2, score 0.8, box (70.0, 20.0, 90.0, 44.0)",
    ),
    "a sure one more": (BOTH, detections(CELL), "the model does not make", "label 1, score 0.95"),
    "just above the limit": (detections(SURE), detections(SURE, (2, 0.11, 1, 1, 9, 9)), "up to 0.1", "score 0.11"),
    "a sure one of another label": (detections((2, *SURE[1:])), detections(SURE), "the file lacks", "label 1"),
    "moved": (detections((1, 0.95, 10.06, 10, 50, 60)), detections(SURE), "boxes differ", "by 0.06"),
    "moved, though faint": (
        detections((1, 0.0596, 100.5, 30, 130, 34.5)),
        detections(FAINT),
        "boxes differ",
        "by 0.5, more than 0.05",
    ),
    "another score": (detections((1, 0.9498, *SURE[2:])), detections(SURE), "scores differ", "by 0.0002"),
    "another score of a neighbour": (
        detections(SURE, (1, 0.8, *NEXT[2:])),
        detections(SURE, NEXT),
        "scores differ",
        "box (14.0, 10.0, 54.0, 60.0)",
    ),
    "another mask": (detections(SURE, masks=0.55), detections(SURE, masks=0.5), "masks differ", "more than 0.01"),
    "a score that is no number": (detections((1, np.nan, *SURE[2:])), detections(SURE), "scores differ", "nan"),
    "a box that is no number": (
        detections((1, 0.9, np.nan, 1, 2, 3)),
        detections(),
        "the model does not make",
        "score 0.9",
    ),
    "far away": (detections((1, 0.95, 110, 10, 150, 60)), detections(SURE), "the file lacks", "score 0.95"),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(case):
    found, expected, counts = ACCEPTED[case]
    assert export.compare_detections(found, expected, where="a.png") == counts


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    found, expected, *words = REFUSED[case]
    with pytest.raises(export.ExportError, match=r"\ba\.png\b") as refused:
        export.compare_detections(found, expected, where="a.png")
    for word in words:
        assert word in str(refused.value)


def test_the_option_that_helps_is_named_and_helps():
    found, expected = detections(SURE), detections(SURE, (2, 0.3, 1, 1, 9, 9))
    with pytest.raises(export.ExportError, match=r"--unmatched-score of export\.py"):
        export.compare_detections(found, expected, where="a.png")
    assert export.compare_detections(found, expected, where="a.png", unmatched_score=0.35) == (1, 1)


def test_a_score_at_the_threshold_may_fall_to_either_side():
    found, expected = detections(SURE), detections(SURE, (2, 0.40005, 1, 1, 9, 9))
    assert export.compare_detections(found, expected, where="a.png", score_threshold=0.4) == (1, 1)
    with pytest.raises(export.ExportError, match=r"up to 0\.1\b"):
        export.compare_detections(found, expected, where="a.png")


def test_the_last_of_a_full_image_may_be_another():
    """With at most 2 detections, the second is either of two whose scores are equal up to rounding."""
    found = detections(SURE, (2, 0.60003, 1, 1, 9, 9))
    expected = detections(SURE, (2, 0.60004, 21, 1, 29, 9))
    assert export.compare_detections(found, expected, where="a.png", max_detections=2) == (1, 2)
    with pytest.raises(export.ExportError, match="valid differs"):
        export.compare_detections(found, expected, where="a.png", max_detections=3)


def test_an_overlap_at_the_threshold_may_suppress_on_one_side():
    """Two boxes of 30×10, shifted by 10: an IoU of .5 up to rounding."""
    better, worse = (1, 0.9, 0, 0, 30, 10), (1, 0.8, 10.0001, 0, 40.0001, 10)
    found, expected = detections(better), detections(better, worse)
    assert export.compare_detections(found, expected, where="a.png") == (1, 1)
    assert export.compare_detections(expected, found, where="a.png") == (1, 1)
    other_label, far, lower = (2, *worse[1:]), (1, 0.8, 10.1, 0, 40.1, 10), (1, 0.7, *better[2:])
    for kept, lost in ((better, other_label), (better, far), (lower, worse)):
        with pytest.raises(export.ExportError, match="the file lacks"):
            export.compare_detections(detections(kept), detections(kept, lost), where="a.png")
    with pytest.raises(export.ExportError, match="the file lacks"):
        export.compare_detections(found, expected, where="a.png", nms_threshold=0.6)


def test_faint_detections_with_nothing_in_common():
    check_counts(0, 2, images=2)
    check_counts(30, 30, images=2)
    with pytest.raises(export.ExportError, match=re.escape("in 2 images, 2 match and 3 appear on one side")):
        check_counts(2, 3, images=2)


def test_each_row_is_matched_once():
    rows, other_rows = match_detections(detections(SURE, SURE, NEXT), detections(NEXT, SURE))
    assert sorted(zip(rows, other_rows, strict=True)) in ([(0, 1), (2, 0)], [(1, 1), (2, 0)])


def test_exceptions_in_half_precision():
    """One in ten may differ by more, or be missing, but not be NaN."""
    rows = [(1, 0.9 - 0.05 * i, 20 * i, 10, 20 * i + 15, 30) for i in range(10)]
    expected, moved, lost = detections(*rows), list(rows), rows[1:]
    moved[0] = (1, 0.6, *rows[0][2:])
    for found, counts in ((moved, (9, 1)), (lost, (9, 1))):
        assert export.compare_detections(detections(*found), expected, where="a.png", tolerances=HALF) == counts
        with pytest.raises(export.ExportError):
            export.compare_detections(detections(*found), expected, where="a.png")
    two = detections(*moved[:5], (1, 0.2, *rows[5][2:]), *moved[6:])
    for found, message in ((two, "scores differ on a.png by 0.45"), (detections(*rows[2:]), "the file lacks")):
        with pytest.raises(export.ExportError, match=message):
            export.compare_detections(found, expected, where="a.png", tolerances=HALF)
    for name, value in (("scores", np.nan), ("boxes", np.nan)):
        found = detections(*rows)
        found[name][3] = value
        with pytest.raises(export.ExportError):
            export.compare_detections(found, expected, where="a.png", tolerances=HALF)
