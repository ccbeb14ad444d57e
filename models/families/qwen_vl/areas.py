"""The least and the greatest area of a resized image, in all spellings that there are."""

from collections.abc import Mapping
from typing import Any

from vlcache_jax.errors import CheckpointError
from vlcache_jax.files.json_text import shorten
from vlcache_jax.files.limits import Range

_PIXELS = Range(1, 2**30)


def read_areas(
    settings: Mapping[str, Any], source: str, default: tuple[int, int], token_area: int | None = None
) -> tuple[int, int]:
    """The two areas in pixels: by either name in `size`, or beside it, or as visual tokens. They must agree.

    Args:
      settings: with `size` (shortest_edge and longest_edge, which are areas, or min_pixels and max_pixels),
        `min_pixels` and `max_pixels`.
      source: where they are from, for messages.
      default: what counts where nothing is said.
      token_area: pixels of a visual token, if `max_image_tokens` may stand for the greatest area, too.

    Raises CheckpointError for values that are no areas, or contradict each other.
    """
    size = settings.get("size")
    size = size if isinstance(size, dict) else {}
    tokens = settings.get("max_image_tokens") if token_area is not None else None
    least = _one(settings, size, source, "shortest_edge", "min_pixels", default[0])
    most = _one(settings, size, source, "longest_edge", "max_pixels", default[1], tokens, token_area or 1)
    if least > most:
        raise CheckpointError(f"{source}: images would need at least {least} pixels and at most {most}: correct one")
    return least, most


def _one(
    settings: Mapping[str, Any],
    size: Mapping[str, Any],
    source: str,
    edge: str,
    name: str,
    default: int,
    tokens: Any = None,
    token_area: int = 1,
) -> int:
    given = {
        f"size.{edge}": (size.get(edge), 1),
        f"size.{name}": (size.get(name), 1),
        name: (settings.get(name), 1),
        "max_image_tokens": (tokens, token_area),
    }
    found = {}
    for label, (value, unit) in given.items():
        if value is None:
            continue
        if type(value) is not int or value * unit not in _PIXELS:
            what = "a number of pixels" if unit == 1 else "a number of visual tokens"
            raise CheckpointError(f"{source}: {label} = {shorten(value)} is not supported: expected {what}")
        found[label] = value * unit
    if len(set(found.values())) > 1:
        listed = " and ".join(f"{label} = {given[label][0]}" for label in found)
        raise CheckpointError(
            f"{source}: {listed} are the same limit of an image's pixels, with different values: leave all but one out"
        )
    return next(iter(found.values()), default)
