"""Requests from many threads, answered by one that runs the engine."""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from vlcache_jax.engine.requests import Request, Result


class Service:
    """A thread that runs an engine on what is submitted.

    Args:
      run: `Engine.run`.
    """

    def __init__(self, run: Callable[[Iterator[Request]], Iterator[Result]]) -> None:
        self._run, self._lock, self.ended = run, threading.Lock(), False
        self._queue: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._waiting: dict[int, tuple[list[Result], Future[list[Result]]]] = {}
        self._count = 0
        self._thread = threading.Thread(target=self._serve, name="vlcache-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> "Future[list[Result]]":
        """The future of the request's results; to cancel it frees the rows of its answers."""
        future: Future[list[Result]] = Future()
        follow = getattr(request, "follow", None)

        def asked_for(result: Result) -> bool:
            return not future.cancelled() and (follow is None or follow(result) is not False)

        if isinstance(request, Request):
            request = dataclasses.replace(request, follow=asked_for)
        with self._lock:
            if self.ended:
                raise RuntimeError("the engine's thread has ended: close the engine, and submit again")
            self._waiting[self._count] = ([], future)
            self._count += 1
            self._queue.put(request)
        return future

    def close(self) -> None:
        """Waits for all that was submitted."""
        self._queue.put(None)
        self._thread.join()

    def _serve(self) -> None:
        error: BaseException = RuntimeError("the engine was closed")
        try:
            for result in self._run(iter(self._queue.get, None)):
                results, future = self._waiting[result.index]
                results.append(result)
                if len(results) == result.answers:
                    del self._waiting[result.index]
                    if future.set_running_or_notify_cancel():
                        future.set_result(sorted(results, key=lambda result: (result.question, result.sample)))
        except BaseException as raised:
            error = raised
        with self._lock:
            self.ended = True
        for _, future in self._waiting.values():
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
