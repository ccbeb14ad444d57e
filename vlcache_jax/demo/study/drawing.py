"""A sheet to draw on: coordinates in pixels of the finished picture, edges smoothed."""

import itertools
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Point = tuple[float, float]

PAPER, INK, GREY, LINE, TRACK = (255, 255, 255), (28, 35, 43), (104, 114, 125), (223, 227, 232), (240, 242, 245)
PALETTE: tuple[Colour, ...] = (
    (213, 94, 0),
    (0, 114, 178),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
    (120, 94, 60),
    (150, 70, 200),
    (20, 90, 60),
    (200, 40, 90),
)
"""Okabe and Ito's colours for all kinds of sight, and a few more."""

_SCALE = 3  # drawn so much larger, then reduced: Pillow does not smooth lines


class Sheet:
    """A picture in the making."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._image = Image.new("RGB", (width * _SCALE, height * _SCALE), PAPER)
        self._draw = ImageDraw.Draw(self._image)

    def picture(self) -> Image.Image:
        """The finished picture."""
        return self._image.resize((self.width, self.height), Image.Resampling.LANCZOS)

    def text(self, x: float, y: float, text: str, size: int = 20, colour: Colour = INK, anchor: str = "ls") -> None:
        """Writes one line; `anchor` as in Pillow."""
        self._draw.text(_large(x, y), text, colour, _font(size * _SCALE), anchor=anchor)

    def rectangle(self, x: float, y: float, right: float, bottom: float, colour: Colour, radius: float = 0) -> None:
        """Fills a rectangle."""
        box = (*_large(x, y), *_large(max(x, right), max(y, bottom)))
        self._draw.rounded_rectangle(box, radius * _SCALE, colour)

    def line(self, points: Sequence[Point], colour: Colour, width: float = 2, dash: Sequence[float] = ()) -> None:
        """A line through points; `dash` gives lengths of strokes and gaps in turn."""
        for piece in _dashes(points, dash) if dash else [points]:
            for start, end in itertools.pairwise(piece):
                self._stroke(start, end, colour, width / 2)

    def _stroke(self, start: Point, end: Point, colour: Colour, half: float) -> None:
        """A straight line with round ends. Pillow's own wide lines differ in width with their direction."""
        length = math.dist(start, end)
        if length:
            x, y = half * (end[1] - start[1]) / length, half * (start[0] - end[0]) / length
            corners = [(start[0] + x, start[1] + y), (end[0] + x, end[1] + y)]
            corners += [(end[0] - x, end[1] - y), (start[0] - x, start[1] - y)]
            self._draw.polygon([(a * _SCALE, b * _SCALE) for a, b in corners], colour)
        if half > 1:
            for a, b in (start, end):
                box = ((a - half) * _SCALE, (b - half) * _SCALE, (a + half) * _SCALE, (b + half) * _SCALE)
                self._draw.ellipse(box, colour)

    def marker(self, x: float, y: float, colour: Colour, shape: int = 0, radius: float = 5) -> None:
        """A circle, square, triangle or diamond, with a white edge."""
        for size, fill in ((radius + 1.5, PAPER), (radius, colour)):
            match shape % 4:
                case 0:
                    self._draw.ellipse((*_large(x - size, y - size), *_large(x + size, y + size)), fill)
                case 1:
                    size *= 0.88
                    self._draw.rectangle((*_large(x - size, y - size), *_large(x + size, y + size)), fill)
                case 2:
                    corners = [(x - size, y + size * 0.8), (x + size, y + size * 0.8), (x, y - size)]
                    self._draw.polygon([_large(*corner) for corner in corners], fill)
                case _:
                    size *= 1.15
                    corners = [(x - size, y), (x, y - size), (x + size, y), (x, y + size)]
                    self._draw.polygon([_large(*corner) for corner in corners], fill)

    def paste(self, image: Image.Image, x: float, y: float, width: int, height: int) -> None:
        """Places an image."""
        large = image.resize((width * _SCALE, height * _SCALE), Image.Resampling.LANCZOS)
        self._image.paste(large, (round(x * _SCALE), round(y * _SCALE)))


def text_width(text: str, size: int) -> float:
    """Pixels that a line of text takes."""
    return _font(size * _SCALE).getlength(text) / _SCALE


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """Between two colours: `a` at 0, `b` at 1."""
    share = min(1.0, max(0.0, share))
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def _large(x: float, y: float) -> tuple[int, int]:
    return round(x * _SCALE), round(y * _SCALE)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _dashes(points: Sequence[Point], dash: Sequence[float]) -> list[list[Point]]:
    """The strokes of a dashed line, which goes on around corners."""
    strokes: list[list[Point]] = []
    index, left, current = 0, dash[0], [points[0]]
    for start, end in itertools.pairwise(points):
        length = math.dist(start, end)
        gone = 0.0
        while length - gone > left:
            gone += left
            at = (start[0] + (end[0] - start[0]) * gone / length, start[1] + (end[1] - start[1]) * gone / length)
            if index % 2 == 0:
                strokes.append([*current, at])
            current, index = [at], index + 1
            left = dash[index % len(dash)]
        left -= length - gone
        current.append(end)
    return [*strokes, current] if index % 2 == 0 else strokes
