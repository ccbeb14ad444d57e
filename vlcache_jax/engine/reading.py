"""Requests read ahead on threads of the host, each once."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from vlcache_jax.engine.preparing import Read
from vlcache_jax.engine.requests import Request


class Reader:
    """Reads requests ahead, at most so many at a time, and hands them out as they are ready.

    Args:
      requests: any iterable; a thread of its own waits for it, so that it may block.
      read: from (index, request) to what is ready; called on several threads. It raises nothing.
      threads: how many.
      ahead: requests that are being read, or are ready and were not `taken` yet.
    """

    def __init__(
        self, requests: Iterable[Request], read: Callable[[int, Request], Read], threads: int, ahead: int
    ) -> None:
        self._read, self._room, self._stop = read, threading.Semaphore(ahead), threading.Event()
        self._ahead, self._held = ahead, 0
        self._ready: queue.SimpleQueue[Read | None] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(threads, "vlcache-read")
        self._error: BaseException | None = None
        self._given = self._taken = 0
        self._all_given = False
        self._puller = threading.Thread(target=self._pull, args=(iter(requests),), name="vlcache-pull", daemon=True)
        self._puller.start()

    def _pull(self, requests: Iterator[Request]) -> None:
        try:
            for index, request in enumerate(requests):
                self._room.acquire()
                if self._stop.is_set():
                    return
                self._given += 1
                self._pool.submit(self._process, index, request)
        except BaseException as error:
            self._error = error
        finally:
            self._all_given = True
            self._ready.put(None)  # wakes whoever waits

    def _process(self, index: int, request: Request) -> None:
        self._ready.put(self._read(index, request))

    def take(self, wait: bool) -> list[Read]:
        """What is ready by now; waits for one if it is told to and something is to come."""
        found: list[Read] = []
        while True:
            try:
                item = self._ready.get(block=wait and not found and not self.ended)
            except queue.Empty:
                return found
            if item is not None:
                self._taken += 1
                self._held += 1
                found.append(item)

    def release(self, count: int) -> None:
        """So many of those taken have gone to the device, or failed: others may be read."""
        self._held -= count
        if count:
            self._room.release(count)

    @property
    def full(self) -> bool:
        """Whether as many were taken, and not released, as may be: no other comes before some are."""
        return self._held >= self._ahead

    @property
    def ended(self) -> bool:
        """Whether all were taken."""
        return self._all_given and self._given == self._taken

    def close(self) -> None:
        """Reads no further, and raises what the iterable raised."""
        self._stop.set()
        self._room.release(1)
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._error is not None:
            raise self._error
