"""Small detectors on transformers learn to find shapes, from scratch."""

import pytest

from .learning import KINDS, learn, measured


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_box_ap50_of_seven_tenths(kind, tmp_path):
    model, _, test_set = learn(kind, tmp_path)
    assert measured(model, test_set)["AP50"] >= 0.7
