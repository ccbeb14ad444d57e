"""Which part of an image each of its visual tokens stands for."""

import numpy as np

from vlcache_jax.models.families.llava import anyres
from vlcache_jax.models.families.llava.config import LlavaConfig
from vlcache_jax.models.images.transform import ImageTransform
from vlcache_jax.models.vision.config import VisionConfig


def token_regions(config: LlavaConfig, transform: ImageTransform, height: int, width: int, cut: bool) -> np.ndarray:
    """The regions of one image's tokens, f32 [visual tokens, 4]; see `ImageLayout.token_regions`.

    `cut` says whether the image is cut into tiles. LLaVA-NeXT then sees it twice, as one coarse tile and as fine
    ones, so its regions overlap. Row breaks and class tokens have no place.
    """
    vision, grid, side = config.vision, config.vision.grid_size, config.vision.image_size
    tile = _boxes(_edges(vision, slice(0, grid), grid), _edges(vision, slice(0, grid), grid))
    if not cut:
        squared = max(height, width) if transform.pad_to_square else None
        shape = (squared or height, squared or width)
        resized = transform.resized_shape(*shape)
        regions = _to_image(tile, resized, shape, (side, side) if transform.do_center_crop else resized)
        if squared:  # the image lies in the middle of the square
            regions -= np.array([(squared - width) // 2, (squared - height) // 2] * 2)
        if config.has_class_token:
            regions = np.concatenate([np.full((1, 4), np.nan), regions])
        if config.grid_pinpoints:  # a row break
            regions = np.concatenate([regions, np.full((1, 4), np.nan)])
        return regions.astype(np.float32)
    base = _to_image(tile, (side, side), (height, width))
    resolution = anyres.select_resolution(height, width, config.grid_pinpoints)
    kept = anyres.unpadded_range(height, width, *(edge // side * grid for edge in resolution))
    sizes = [max(0, part.stop - part.start) for part in kept]
    shape = anyres.shrunk_shape(sizes[0], sizes[1], grid, config.max_tiles)
    fine = _boxes(*(_edges(vision, part, count) for part, count in zip(kept, shape)))
    fine = _to_image(fine, anyres.fitted_shape(height, width, resolution), (height, width), resolution)
    return anyres.in_lines(base, fine.reshape(*shape, 4), np.nan).astype(np.float32)


def _edges(vision: VisionConfig, part: slice, count: int) -> np.ndarray:
    """Edges of `count` cells spread over a range of patches, across tiles; f64 [count + 1] in pixels of those."""
    at = np.linspace(part.start, part.stop, count + 1)
    whole = np.arange(int(np.ceil(at.max())) + 1)
    # What is left beyond the last whole patch of a tile counts as its.
    pixels = whole // vision.grid_size * vision.image_size + whole % vision.grid_size * vision.patch_size
    return np.interp(at, whole, pixels)


def _boxes(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Boxes between the edges of rows and columns, row by row."""
    top, left = (x.reshape(-1) for x in np.meshgrid(rows[:-1], columns[:-1], indexing="ij"))
    bottom, right = (x.reshape(-1) for x in np.meshgrid(rows[1:], columns[1:], indexing="ij"))
    return np.stack([left, top, right, bottom], axis=1)


def _to_image(
    boxes: np.ndarray, resized: tuple[int, int], original: tuple[int, int], seen: tuple[int, int] | None = None
) -> np.ndarray:
    """Undoes a resizing to `resized` and its centring in (or cropping to) `seen`; shapes are (height, width)."""
    seen = resized if seen is None else seen
    offset = np.array([(seen[1] - resized[1]) / 2, (seen[0] - resized[0]) / 2] * 2)
    scale = np.array([original[1] / resized[1], original[0] / resized[0]] * 2)
    return (boxes - offset) * scale
