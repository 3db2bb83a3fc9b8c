"""Colours for classes that come without: as many as asked for, the same each time."""

import colorsys

GOLDEN = 0.61803398875  # steps of the golden ratio spread over the colour circle without repeating
LEVELS = ((0.62, 0.95), (0.9, 0.72), (0.45, 0.78), (0.85, 0.5))  # saturation and brightness, in turn


def spread_colours(count: int) -> tuple[tuple[int, int, int], ...]:
    """RGB in 0..255 of `count` classes; neighbours in the order differ in hue and brightness."""
    found = []
    for number in range(count):
        saturation, brightness = LEVELS[number % len(LEVELS)]
        red, green, blue = colorsys.hsv_to_rgb(number * GOLDEN % 1.0, saturation, brightness)
        found.append((round(255 * red), round(255 * green), round(255 * blue)))
    return tuple(found)
