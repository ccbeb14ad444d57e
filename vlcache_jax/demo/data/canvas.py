"""Drawing on a uint8 image with numpy: fast enough to make training data on the fly, equal on every machine."""

import functools

import numpy as np

from vlcache_jax.demo.data.font import text_mask

Colour = tuple[int, int, int]

_TEXTURE_SIZE = 1024


@functools.cache
def _texture() -> np.ndarray:
    """Paper grain, uint8 [1024, 1024, 1] in 0..7."""
    return np.random.default_rng(20_26).integers(0, 8, (_TEXTURE_SIZE, _TEXTURE_SIZE, 1), np.uint8)


def paper(rng: np.random.Generator, height: int, width: int, colour: Colour) -> np.ndarray:
    """A new image uint8 [height, width, 3] of a colour (each channel at most 247) with some grain."""
    y, x = rng.integers(0, _TEXTURE_SIZE - np.array([height, width]) + 1)
    return _texture()[y : y + height, x : x + width] + np.array(colour, np.uint8)


def blend(image: np.ndarray, mask: np.ndarray, y: int, x: int, ink: Colour) -> None:
    """Paints `ink` where the mask f32 [h, w] in [0, 1] is set, its corner at (y, x); what falls outside is cut."""
    top, left = max(y, 0), max(x, 0)
    region = image[top : y + mask.shape[0], left : x + mask.shape[1]]
    if region.size == 0:
        return
    mask = mask[top - y :, left - x :][: region.shape[0], : region.shape[1], None]
    region[:] = region + (np.array(ink, np.float32) - region) * mask


def text(image: np.ndarray, string: str, y: int, x: int, ink: Colour, scale: int = 1) -> None:
    """Prints a line of text with its corner at (y, x)."""
    mask = text_mask(string)
    if scale > 1:
        mask = mask.repeat(scale, axis=0).repeat(scale, axis=1)
    blend(image, mask, y, x, ink)


def rule(image: np.ndarray, y: int, x: int, length: int, ink: Colour, *, vertical: bool = False) -> None:
    """A line one pixel thick."""
    if vertical:
        image[y : y + length, x : x + 1] = ink
    else:
        image[y : y + 1, x : x + length] = ink


def box(image: np.ndarray, y: int, x: int, height: int, width: int, ink: Colour) -> None:
    """The outline of a rectangle."""
    rule(image, y, x, width, ink)
    rule(image, y + height - 1, x, width, ink)
    rule(image, y, x, height, ink, vertical=True)
    rule(image, y, x + width - 1, height, ink, vertical=True)


def _inside(shape: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Whether points of the plane lie in a shape of radius 1 around the origin; y points down."""
    radius = np.hypot(y, x)
    match shape:
        case "circle":
            return radius <= 0.95
        case "square":
            return np.maximum(abs(y), abs(x)) <= 0.85
        case "triangle":
            return (y <= 0.8) & (abs(x) <= 0.55 * (y + 1))
        case "diamond":
            return abs(y) + abs(x) <= 1.05
        case "cross":
            return (np.minimum(abs(y), abs(x)) <= 0.32) & (np.maximum(abs(y), abs(x)) <= 0.98)
        case "star":
            sector = 2 * np.pi / 5
            angle = abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
            along, across = radius * np.cos(angle), radius * np.sin(angle)
            tip, notch = np.array([1.05, 0.0]), 0.45 * np.array([np.cos(sector / 2), np.sin(sector / 2)])
            edge = notch - tip  # the star is on the inner side of the line from its tip to the notch
            return edge[0] * (across - tip[1]) - edge[1] * (along - tip[0]) >= 0
    raise ValueError(f"unknown shape {shape!r}")


@functools.lru_cache(maxsize=1024)
def shape_mask(shape: str, radius: int) -> np.ndarray:
    """An antialiased shape: f32 [2 * radius + 1, 2 * radius + 1]."""
    size, fine = 2 * radius + 1, 5
    points = ((np.arange(size * fine) + 0.5) / fine - size / 2) / radius
    inside = _inside(shape, points[:, None], points[None, :]).astype(np.float32)
    mask = inside.reshape(size, fine, size, fine).mean(axis=(1, 3))
    mask.setflags(write=False)
    return mask
