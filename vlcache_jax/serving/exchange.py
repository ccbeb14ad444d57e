"""One request in the engine, as a coroutine sees it."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable
from concurrent.futures import Future

from vlcache_jax.engine.engine import Engine
from vlcache_jax.engine.requests import Request, Result

Event = Result | list[Result] | BaseException
"""An answer so far; or all of them at the end; or what ended the engine."""


class Exchange:
    """Sends a request to the engine, and receives what comes of it.

    Args:
      engine: that answers.
      request: without a `follow`.
      stream: whether answers are wanted before they have ended.
      ended: called, in the event loop, when the engine is rid of the request, however that ended.
    """

    def __init__(self, engine: Engine, request: Request, stream: bool, ended: Callable[[], None]) -> None:
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        self._wanted, self._stream, self._told, self._when_ended = True, stream, False, ended
        engine.submit(dataclasses.replace(request, follow=self._follow)).add_done_callback(self._ended)

    async def next(self) -> Event:
        """What came next. The first of a stream comes when the prompt has been read on the host."""
        return await self._events.get()

    def give_up(self) -> None:
        """Nobody waits any more: frees its rows, or its place in the queue."""
        self._wanted = False

    def _follow(self, result: Result) -> bool:
        """Called by the engine's thread."""
        if self._wanted and self._stream and (len(result.tokens) or not self._told):
            self._told = True
            self._in_loop(self._events.put_nowait, result)
        return self._wanted

    def _ended(self, future: "Future[list[Result]]") -> None:
        self._in_loop(self._events.put_nowait, future.exception() or future.result())
        self._in_loop(self._when_ended)

    def _in_loop(self, function: Callable[..., None], *arguments: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits
            self._loop.call_soon_threadsafe(function, *arguments)
