"""The names of the zoo for tests that go through all of them."""

import re

import pytest

from detectax_eqx import zoo


# Names of larger sizes of a detector that has smaller ones.
_LARGER = re.compile(r"101|152|_wide|vitdet_[lh]|swin_[sbl]|(detr|seg)_(small|medium|large|xlarge|2xlarge)")
SMALLEST = [name for name in zoo.names() if not _LARGER.search(name)]
LARGER = [name for name in zoo.names() if _LARGER.search(name)]
# As parameters: those of larger sizes are slow.
NAMES = [*SMALLEST, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGER)]
