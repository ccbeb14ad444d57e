"""Padded prompt lengths: few of them, so that few programs are compiled."""

from collections.abc import Iterable, Sequence

import numpy as np

from vlcache_jax.errors import InputError

_LADDER = ((512, 64), (4096, 256))  # (up to, multiples of); beyond that, multiples of 1024
_LAST_STEP = 1024


def check_buckets(buckets: Sequence[int]) -> tuple[int, ...]:
    """`buckets` sorted, without repetitions. Raises InputError unless they are positive whole numbers."""
    sizes = list(buckets) if isinstance(buckets, Iterable) and not isinstance(buckets, str) else []
    if not sizes or not all(
        isinstance(size, (int, np.integer)) and type(size) is not bool and size > 0 for size in sizes
    ):
        raise InputError(f"buckets={buckets!r}: give one or more positive whole numbers, such as (512, 1024, 2048)")
    return tuple(sorted({int(size) for size in sizes}))


def bucket_length(length: int, buckets: Sequence[int] | None = None) -> int:
    """The smallest bucket that holds `length` tokens.

    Without `buckets`: multiples of 64 up to 512, of 256 up to 4096, then of 1024, so that padding wastes at
    most about a quarter beyond 256 tokens. Raises InputError if `length` exceeds the largest of the given
    `buckets`.
    """
    if buckets is None:
        step = next((step for limit, step in _LADDER if length <= limit), _LAST_STEP)
        return -(-length // step) * step
    for size in sorted(buckets):
        if length <= size:
            return size
    raise InputError(
        f"a prompt of {length} tokens (visual tokens included) exceeds the largest bucket, {max(buckets)}: "
        "shorten it or give the processor a larger bucket"
    )
