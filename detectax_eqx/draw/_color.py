"""The colours of classes."""

import colorsys


# Neighbouring labels get distant hues; the golden ratio never comes back to one already used.
_GOLDEN = 0.6180339887498949
_DARKEST = 0.42  # luminance of the darkest class colour, 0..1


def class_color(label: int) -> tuple[int, int, int]:
    """The RGB colour of a class, the same at all times and distinct on dark and light ground.

    >>> class_color(0) == class_color(0) != class_color(1)
    True
    """
    hue = (0.58 + label * _GOLDEN) % 1.0
    # Every third class is paler or deeper, so that hues that come near each other still differ.
    saturation, value = ((0.85, 1.0), (0.65, 1.0), (0.9, 0.8))[label % 3]
    color = colorsys.hsv_to_rgb(hue, saturation, value)
    # Blue and violet are dark: mixed with white up to a luminance that stands out from shadows.
    white = max(0.0, (_DARKEST - luminance(color)) / (1 - luminance(color)))
    red, green, blue = (round(255 * (part + (1 - part) * white)) for part in color)
    return red, green, blue


def luminance(color: tuple[float, float, float]) -> float:
    """How bright a colour looks, in the unit of its parts (ITU-R BT.601).

    >>> round(luminance((0.0, 1.0, 0.0)), 3)
    0.587
    """
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
