"""Class names in any script, with and without fonts for it: no two names look the same."""

import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from detectax_eqx import Detections, Targets
from detectax_eqx.draw import (
    _fonts,
    draw_comparison,
    draw_detections,
    draw_targets,
    plot_confusion,
    plot_precision_recall,
)


GRAY = np.full((120, 400, 3), 90, np.uint8)
BOX, LABEL, TRUE = np.array([[20, 60, 380, 110]], np.float32), np.array([0], np.int32), np.array([True])
DETECTIONS = Detections(BOX, np.array([0.9], np.float32), LABEL, TRUE)
TARGETS = Targets(BOX, LABEL, TRUE)
DRAW = {
    "detections": lambda **options: draw_detections(GRAY, DETECTIONS, **options),
    "targets": lambda **options: draw_targets(GRAY, TARGETS, **options),
    "comparison": lambda **options: draw_comparison(GRAY, TARGETS, DETECTIONS, **options),
}


def forget():
    for function in (_fonts.installed_font, _fonts._font_of, _fonts._load):
        function.cache_clear()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of installed fonts, which is empty. There is no fontconfig either."""
    for name in ("PATH", "XDG_DATA_DIRS", "XDG_DATA_HOME", "HOME", "WINDIR", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    forget()
    (tmp_path / "fonts").mkdir()
    yield tmp_path / "fonts"
    forget()


@pytest.fixture
def dejavu():
    """A font for Latin, Greek, Cyrillic and Arabic that ships with matplotlib."""
    matplotlib = pytest.importorskip("matplotlib")
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@pytest.mark.parametrize("kind", DRAW)
@pytest.mark.parametrize("pair", [("猫狗", "鸟鱼"), ("猫", "狗"), ("cat 猫", "cat 狗"), ("🐈", "🐕"), ("ก", "ข")])
def test_names_that_no_font_has_are_not_drawn_alike(kind, pair, folder):
    pictures = []
    for name in pair:
        with pytest.warns(UserWarning, match=rf"{name[-1]}.*: they are drawn as .* font= \(predict\.py: --font\)"):
            pictures.append(np.asarray(DRAW[kind](class_names=[name])))
    assert (pictures[0] != pictures[1]).any()


@pytest.mark.parametrize("kind", DRAW)
def test_a_missing_character_is_escaped(kind, folder):
    with pytest.warns(UserWarning, match=r"the characters 猫: they are drawn as \\u732b"):
        missing = np.asarray(DRAW[kind](class_names=["a 猫"]))
    np.testing.assert_array_equal(missing, DRAW[kind](class_names=[r"a \u732b"]))


def test_one_warning_for_all_names(folder):
    """The warning covers classes that are not in the picture, so that later pictures do not warn again."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for label in (0, 1, 2):
            labels = np.array([label], np.int32)
            draw_targets(GRAY, Targets(BOX, labels, TRUE), class_names=["猫", "鱼", "cat"])
    assert len(caught) == 1 and "猫 鱼" in str(caught[0].message) and "cat" not in str(caught[0].message)


@pytest.mark.parametrize("kind", DRAW)
def test_the_font_asked_for_has_the_characters(kind, folder, dejavu):
    """There is no warning and no escape. Pillow's own font would draw boxes for the name."""
    known, other = (np.asarray(DRAW[kind](class_names=[name], font=dejavu)) for name in ("кот", "пёс"))
    assert (known != other).any()
    assert (known != np.asarray(DRAW[kind](class_names=[r"\u043a\u043e\u0442"], font=dejavu))).any()
    latin = (np.asarray(DRAW[kind](class_names=["cat"], font=font)) for font in (None, str(dejavu)))
    assert (next(latin) != next(latin)).any()


def test_an_installed_font_is_found_without_an_option(folder, dejavu):
    asked = np.asarray(DRAW["targets"](class_names=["кот"], font=dejavu, font_size=16))
    shutil.copy(dejavu, folder / "DejaVuSans.ttf")
    found = np.asarray(DRAW["targets"](class_names=["кот"], font_size=16))
    np.testing.assert_array_equal(found[60:], asked[60:])  # the box; only the heights of the labels differ
    assert (found[:58] != np.asarray(DRAW["targets"](class_names=["кит"], font_size=16))[:58]).any()
    with pytest.warns(UserWarning, match="the characters 猫:"):
        DRAW["targets"](class_names=["кот 猫"])


@pytest.mark.parametrize("name", ["кот", "猫狗", "cat"])
def test_whatever_is_installed(name):
    """With the fonts of this machine, whether or not they cover the script, two names look different."""
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one, other = (np.asarray(DRAW["targets"](class_names=[text])) for text in (name, name[::-1]))
    assert (one != other).any()


@pytest.mark.parametrize(
    "name",
    ["قطة", "חתול", "e\u0301", "\u0301", "👩‍👧", "a\nb", "a\tb", "\ud800", "\u200e", " ", "\u00a0", "\0", "a" * 300],
)
@pytest.mark.parametrize("own", [False, True])
def test_awkward_names_are_survived(name, own, folder, dejavu):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for draw in DRAW.values():
            draw(class_names=[name], font=dejavu if own else None)


def test_fonts_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no font file .*none\.ttf"):
        DRAW["targets"](class_names=["cat"], font=tmp_path / "none.ttf")
    (tmp_path / "text.ttf").write_text("not a font")
    with pytest.raises(ValueError, match=r"text\.ttf is not a font"):
        DRAW["targets"](class_names=["cat"], font=tmp_path / "text.ttf")


PLOTS = {
    "precision": lambda names, **options: plot_precision_recall(
        np.ones((len(names), 5)), np.linspace(0, 1, 5), class_names=names, **options
    ),
    "confusion": lambda names, **options: plot_confusion(
        np.ones((len(names) + 1,) * 2, np.int64), class_names=names, **options
    ),
}


@pytest.mark.parametrize("plot", PLOTS)
def test_plots_of_names_in_any_script(plot, folder, dejavu):
    """One warning precedes drawing and names are escaped, where matplotlib would warn for each character."""
    plt = pytest.importorskip("matplotlib.pyplot")
    with pytest.warns(UserWarning, match="the characters 猫 鱼:") as caught:
        ax = PLOTS[plot](["猫", "鱼", "кот", "CA$ in US$", "a\nb"])
    assert len(caught) == 1
    ax.figure.canvas.draw()
    plt.close(ax.figure)
    ax = PLOTS[plot](["кот", "cat"], font=dejavu)
    ax.figure.canvas.draw()
    plt.close(ax.figure)
