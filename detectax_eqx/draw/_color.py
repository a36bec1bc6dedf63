"""The colours of classes."""

import colorsys


# Steps by the golden ratio give consecutive labels distant hues and never repeat a hue.
_GOLDEN = 0.6180339887498949
_DARKEST = 0.42  # minimum luminance of a class colour, 0..1


def class_color(label: int) -> tuple[int, int, int]:
    """Returns the RGB colour of a class. It is always the same, and visible on dark and light backgrounds.

    >>> class_color(0) == class_color(0) != class_color(1)
    True
    """
    hue = (0.58 + label * _GOLDEN) % 1.0
    # Saturation and value vary with a period of three, so that classes with similar hues still differ.
    saturation, value = ((0.85, 1.0), (0.65, 1.0), (0.9, 0.8))[label % 3]
    color = colorsys.hsv_to_rgb(hue, saturation, value)
    # Blue and violet are dark. They are mixed with white until they stand out from shadows.
    white = max(0.0, (_DARKEST - luminance(color)) / (1 - luminance(color)))
    red, green, blue = (round(255 * (channel + (1 - channel) * white)) for channel in color)
    return red, green, blue


def luminance(color: tuple[float, float, float]) -> float:
    """Returns the luminance of a colour, in the unit of its components (ITU-R BT.601).

    >>> round(luminance((0.0, 1.0, 0.0)), 3)
    0.587
    """
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
