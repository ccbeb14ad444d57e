"""The largest size that fits, with few compilations."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limit:
    """Result of a search.

    Attributes:
      fits: the largest size that was compiled and fits; None if none did.
      refused: the smallest size that was compiled and does not fit; None if none was (the search ended at its ceiling
        or ran out of compilations).
      compilations: sizes compiled for this search.
    """

    fits: int | None
    refused: int | None
    compilations: int


def largest(
    peak: Callable[[int], tuple[bool, int | None]],
    start: int,
    *,
    known: tuple[bool, int | None],
    fixed_bytes: int,
    available_bytes: int,
    step: int,
    ceiling: int,
    max_compilations: int,
) -> Limit:
    """Searches for the largest size that fits.

    Memory grows nearly linearly with the size, so a straight line through the two nearest measurements says where to
    look next. Where it says too much, and a refusal leaves no measurement, the next step back is twice the last one.
    Only what was compiled counts as fitting.

    Args:
      peak: compiles a size; (fits, peak bytes of a device or None where unknown).
      start: a size that was compiled already.
      known: its result.
      fixed_bytes: what is used whatever the size (the weights).
      available_bytes: of a device.
      step: sizes are multiples of it.
      ceiling: the largest size worth asking for.
      max_compilations: bound of the work.

    Returns:
      The limit, to within a step or a thirty-second of its value.

    Example:
      >>> largest(lambda n: (n <= 100, 10 * n), 8, known=(True, 80), fixed_bytes=0, available_bytes=1000, step=1,
      ...         ceiling=4096, max_compilations=8)
      Limit(fits=100, refused=103, compilations=2)
    """
    ceiling = ceiling // step * step
    low: int | None = start if known[0] else None
    high: int | None = None if known[0] else start
    points = {0: fixed_bytes} | ({start: known[1]} if known[1] is not None else {})
    count = refusals = 0
    while count < max_compilations:
        floor = 0 if low is None else low
        if high is None and floor >= ceiling:
            break
        precision = max(step, floor // 32 // step * step)
        if high is not None and high - floor <= precision:
            break
        size = _guess(points, floor, high, available_bytes)
        # Not closer to a known end than the precision: one more compilation there then ends the search.
        size = max(size // step * step, floor + precision)
        if high is None:
            size = min(size, ceiling)
        else:
            back = precision << max(0, refusals - 1)
            size = min(size, max(high - back, (floor + high) // 2 // step * step, floor + step))
        fits, bytes_needed = peak(size)
        count += 1
        if bytes_needed is not None:
            points[size] = bytes_needed
        low, high = (size, high) if fits else (low, size)
        refusals = 0 if fits else refusals + 1
    return Limit(fits=low, refused=high, compilations=count)


def _guess(points: dict[int, int], floor: int, high: int | None, available: int) -> int:
    """Where the line through two measurements meets the available memory."""
    known = sorted(points)
    # The ends of the bracket, as far as they were measured; else the last two.
    below = [n for n in known if n <= floor]
    above = [n for n in known if high is not None and n >= high]
    ends = [below[-1], above[0]] if below and above else known[-2:]
    if len(ends) < 2 or points[ends[1]] <= points[ends[0]]:
        return 2 * floor if high is None else (floor + high) // 2
    a, b = ends
    return a + (available - points[a]) * (b - a) // (points[b] - points[a])
