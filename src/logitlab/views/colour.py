"""One colour scale for every view.

Lightness alone carries the value, so that it survives colour blindness and grey print; the hue
only helps to tell neighbours apart.
"""

from __future__ import annotations

_LIGHT = ((251, 251, 247), (214, 234, 224), (136, 200, 196), (52, 144, 176), (34, 86, 148), (29, 41, 98))
_DARK = ((24, 29, 40), (29, 52, 86), (28, 88, 124), (34, 134, 146), (104, 186, 142), (222, 240, 160))

STEPS = 64

CATEGORIES = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
"""Distinct for colour-blind readers (Okabe and Ito), for labels; what has no colour of its own is `OTHERS`."""
OTHERS = "#8c8c8c"


def background(fraction: float, *, dark: bool = False) -> str:
    """Colour ``#rrggbb`` for a value from 0 to 1, on a light page or a dark one."""
    return _hex(_mixed(fraction, dark))


def foreground(fraction: float, *, dark: bool = False) -> str:
    """Black or white, whichever is easier to read on `background`; their contrast is 4.5 or more."""
    light = luminance(_mixed(fraction, dark))
    return "#000000" if (light + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"


def table(*, dark: bool = False) -> list[tuple[str, str]]:
    """The whole scale in `STEPS` pairs of background and foreground."""
    steps = [i / (STEPS - 1) for i in range(STEPS)]
    return [(background(f, dark=dark), foreground(f, dark=dark)) for f in steps]


def luminance(rgb: tuple[int, int, int]) -> float:
    """Relative luminance from 0 to 1, as WCAG defines it."""
    red, green, blue = (_linear(c / 255) for c in rgb)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _mixed(fraction: float, dark: bool) -> tuple[int, int, int]:
    anchors = _DARK if dark else _LIGHT
    fraction = min(max(fraction, 0.0), 1.0) if fraction == fraction else 0.0  # not a number: as little as possible
    i = min(int(fraction * (len(anchors) - 1)), len(anchors) - 2)
    rest = fraction * (len(anchors) - 1) - i
    low, high = anchors[i], anchors[i + 1]
    red, green, blue = (round(a + (b - a) * rest) for a, b in zip(low, high, strict=True))
    return red, green, blue


def _linear(value: float) -> float:
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def _hex(rgb: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)
