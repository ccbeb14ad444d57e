"""Which part of an image each of its visual tokens stands for."""

import numpy as np

from vlcache_jax.models.families.llava import anyres
from vlcache_jax.models.families.llava.config import LlavaConfig
from vlcache_jax.models.images.transform import ImageTransform


def token_regions(config: LlavaConfig, transform: ImageTransform, height: int, width: int) -> np.ndarray:
    """The regions of one image's tokens, f32 [visual tokens, 4]; see `ImageLayout.token_regions`.

    LLaVA-NeXT sees the image twice, as one coarse tile and as fine ones, so its regions overlap. Row breaks and class
    tokens have no place.
    """
    grid, side = config.vision.grid_size, config.vision.image_size
    if config.model_type != "llava_next":
        patches = _grid_regions(np.arange(grid), np.arange(grid), side / grid)
        squared = max(height, width) if transform.pad_to_square else None
        shape = (squared or height, squared or width)
        resized = transform.resized_shape(*shape)
        regions = _to_image(patches, resized, shape, (side, side) if transform.do_center_crop else resized)
        if squared:  # the image lies in the middle of the square
            regions -= np.array([(squared - width) // 2, (squared - height) // 2] * 2)
        if config.feature_select == "full":
            regions = np.concatenate([np.full((1, 4), np.nan), regions])
        return regions.astype(np.float32)
    base = _to_image(_grid_regions(np.arange(grid), np.arange(grid), side / grid), (side, side), (height, width))
    resolution = anyres.select_resolution(height, width, config.grid_pinpoints)
    rows, columns = (edge // side * grid for edge in resolution)
    kept_rows, kept_columns = anyres.unpadded_range(height, width, rows, columns)
    fine = _grid_regions(np.arange(rows)[kept_rows], np.arange(columns)[kept_columns], side / grid)
    fine = _to_image(fine, anyres.fitted_shape(height, width, resolution), (height, width), resolution)
    lines = fine.reshape(len(np.arange(rows)[kept_rows]), -1, 4)
    lines = np.pad(lines, ((0, 0), (0, 1), (0, 0)), constant_values=np.nan)  # the row breaks
    return np.concatenate([base, lines.reshape(-1, 4)]).astype(np.float32)


def _grid_regions(rows: np.ndarray, columns: np.ndarray, patch: float) -> np.ndarray:
    """Boxes of patches, row by row, in the pixels of what the vision tower sees."""
    y, x = (a.reshape(-1) for a in np.meshgrid(rows, columns, indexing="ij"))
    return np.stack([x, y, x + 1, y + 1], axis=1) * patch


def _to_image(
    boxes: np.ndarray, resized: tuple[int, int], original: tuple[int, int], seen: tuple[int, int] | None = None
) -> np.ndarray:
    """Undoes a resizing to `resized` and its centring in (or cropping to) `seen`; shapes are (height, width)."""
    seen = resized if seen is None else seen
    offset = np.array([(seen[1] - resized[1]) / 2, (seen[0] - resized[0]) / 2] * 2)
    scale = np.array([original[1] / resized[1], original[0] / resized[0]] * 2)
    return (boxes - offset) * scale
