"""Pan and scan: crops of elongated images, seen beside the whole one (arXiv 2503.19786, section 2.1)."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from vlcache_jax.files.limits import IMAGE_SIDE, TILES, Range
from vlcache_jax.models.io.section import Section

_RATIO = Range(1.0, 1e4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PanAndScan:
    """When images are cropped, and into how many pieces.

    Attributes:
      min_crop_size: pixels of the shorter side of a crop; an image that would yield smaller ones is left whole.
      max_num_crops: the most of one image.
      min_ratio_to_activate: of the longer side to the shorter one.
    """

    min_crop_size: int = 256
    max_num_crops: int = 4
    min_ratio_to_activate: float = 1.2

    def crops(self, height: int, width: int) -> list[tuple[int, int, int, int]]:
        """(left, top, right, bottom) of the crops of an image, along its longer side; none if it is left whole."""
        long, short = max(height, width), min(height, width)
        if long / short < self.min_ratio_to_activate:
            return []
        count = max(2, min(long // self.min_crop_size, math.floor(long / short + 0.5)))
        step = math.ceil(long / min(count, self.max_num_crops))
        if min(step, short) < self.min_crop_size:
            return []
        ends = [(start, min(start + step, long)) for start in range(0, long, step)]
        return [(a, 0, b, height) if width >= height else (0, a, width, b) for a, b in ends]

    def as_dict(self) -> dict[str, Any]:
        """What `read_pan_and_scan` reads."""
        return {f"pan_and_scan_{name}": value for name, value in dataclasses.asdict(self).items()}


def read_pan_and_scan(settings: dict[str, Any], source: str) -> PanAndScan | None:
    """What the settings of an image processor, found in the file `source`, ask for; None if for nothing.

    Raises CheckpointError if they are malformed.
    """
    section = Section(Path(source), "", {k: v for k, v in settings.items() if v is not None}, PanAndScan().as_dict())
    if not section.flag("do_pan_and_scan", False):
        return None
    return PanAndScan(
        min_crop_size=section.integer("pan_and_scan_min_crop_size", IMAGE_SIDE),
        max_num_crops=section.integer("pan_and_scan_max_num_crops", Range(2, TILES)),
        min_ratio_to_activate=section.number("pan_and_scan_min_ratio_to_activate", _RATIO),
    )
