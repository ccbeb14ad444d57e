"""Prompts of many requests, in batches of one size for each bucket: for passes that decode nothing."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from vlcache_jax.engine.buckets import Bucket
from vlcache_jax.engine.engine import PREFILL_TOKENS
from vlcache_jax.engine.preparing import Preparer, Read
from vlcache_jax.engine.programs import stacked
from vlcache_jax.engine.requests import Request
from vlcache_jax.errors import InputError
from vlcache_jax.inputs import Batch
from vlcache_jax.parallel.mesh import rows_over

_AHEAD = 64
"""Requests that are read before their turn."""


def read_all(preparer: Preparer, requests: Iterable[Request]) -> Iterator[Read]:
    """Requests, read ahead on threads, in their order. Raises InputError for one that cannot be read."""
    left, ahead = iter(enumerate(requests)), deque[Future[Read]]()
    with ThreadPoolExecutor() as pool:
        while True:
            ahead.extend(pool.submit(preparer.read, *item) for item in islice(left, _AHEAD - len(ahead)))
            if not ahead:
                return
            found = ahead.popleft().result()
            if found.reason is not None:
                raise InputError(found.complaint)
            yield found


def in_batches(
    preparer: Preparer, params: object, requests: Iterable[Request], buckets: Sequence[Bucket]
) -> Iterator[tuple[list[Read], Batch]]:
    """What was read, as rows of batches whose size depends on their bucket alone; the first row fills the last ones.

    Args:
      preparer: what requests are held to.
      params: of the model, for the mesh over which rows are split.
      requests: read as far ahead as needed.
      buckets: that hold them.

    Raises:
      InputError: a request that cannot be read, or fits in no bucket.
    """
    waiting: dict[Bucket, list[Read]] = {}

    def batch(bucket: Bucket) -> tuple[list[Read], Batch]:
        own = waiting.pop(bucket)
        return own, stacked([read.batch for read in own if read.batch is not None], size(bucket))

    def size(bucket: Bucket) -> int:
        return rows_over(params) * max(1, PREFILL_TOKENS // bucket.tokens)

    for read in read_all(preparer, requests):
        found = preparer.padded(read, buckets)
        if found.reason is not None:
            raise InputError(found.complaint)
        waiting.setdefault(found.bucket, []).append(found)
        if len(waiting[found.bucket]) == size(found.bucket):
            yield batch(found.bucket)
    for bucket in sorted(waiting):
        yield batch(bucket)
