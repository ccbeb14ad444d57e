"""The routes of a server: OpenAI's chat API over one engine.

A request is admitted before its body is read, so that what waits is bounded in number and each in size. Its place is
free again when the engine is rid of it, whatever the client did meanwhile.
"""

import asyncio
import contextlib
import hmac
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from vlcache_jax.engine.engine import Engine
from vlcache_jax.engine.requests import Result
from vlcache_jax.models.text.tokenizer import Tokenizer
from vlcache_jax.serving.asked import Asked, read_chat
from vlcache_jax.serving.exchange import Event, Exchange
from vlcache_jax.serving.limits import Limits
from vlcache_jax.serving.refusal import Refusal
from vlcache_jax.serving.replies import Reply, model, models
from vlcache_jax.serving.text import Delta

_LONGEST_WAIT = 30  # seconds that a client is told to wait


class ChatServer:
    """Answers chat requests with an engine.

    Args:
      engine: warm, and used by nobody else.
      tokenizer: of its checkpoint.
      name: that clients call the model by.
      max_new_tokens: of the engine.
      limits: of what a client may ask.
      key: that clients must send as a bearer token; None: anybody may ask.
      hosts: names in the header Host that are answered; None: all. On a loopback address these names keep web pages
        from asking through a name of their own.

    Attributes:
      app: the ASGI application.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        name: str,
        max_new_tokens: int,
        *,
        limits: Limits | None = None,
        key: str | None = None,
        hosts: list[str] | None = None,
    ) -> None:
        self._engine, self._tokenizer, self._name, self._most = engine, tokenizer, name, max_new_tokens
        self._limits, self._key = limits or Limits(), None if key is None else key.encode()
        self._since, self._closing = int(time.time()), False
        self._exchanges: set[Exchange] = set()
        self._in_flight, self._usual_seconds = 0, 1.0
        routes = [
            Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/models/{name:path}", self._guarded(self._model)),
            Route("/health", self._health),
        ]
        middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)] if hosts else []
        handlers: dict[Any, Any] = {Refusal: _refused, HTTPException: _no_route, Exception: _fault}
        self.app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=self._life)

    @contextlib.asynccontextmanager
    async def _life(self, app: Starlette) -> AsyncIterator[None]:
        yield
        self._closing = True
        for exchange in list(self._exchanges):
            exchange.give_up()
        await asyncio.to_thread(self._engine.close)

    def _guarded(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            if self._key is not None:
                known = hmac.compare_digest(given.strip().encode(), self._key)
                if scheme.lower() != "bearer" or not known:
                    raise Refusal(
                        401, "this server wants its key as a bearer token: 'Authorization: Bearer ...'",
                        code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
                    )  # fmt: skip
            return await endpoint(request)

        return guarded

    async def _health(self, request: Request) -> Response:
        stats = self._engine.stats()
        state = {"status": "closing" if self._closing else "ok", "requests": self._in_flight, "rows": stats.rows}
        return JSONResponse(state | {"rows_in_flight": stats.rows_in_flight}, 503 if self._closing else 200)

    async def _models(self, request: Request) -> Response:
        return JSONResponse(models(self._name, self._since))

    async def _model(self, request: Request) -> Response:
        if request.path_params["name"] != self._name:
            raise Refusal(404, f"there is no such model: {self._name!r} is served", code="model_not_found")
        return JSONResponse(model(self._name, self._since))

    async def _chat(self, request: Request) -> Response:
        start = time.monotonic()
        self._admit()
        exchange = None
        try:
            body = await self._body(request)
            most, top = self._most, self._engine.top_log_probabilities
            asked = await asyncio.to_thread(read_chat, body, self._name, most, self._limits, top)
            exchange = Exchange(self._engine, asked.request, asked.stream, lambda: self._ended(exchange, start))
            self._exchanges.add(exchange)
        finally:
            if exchange is None:
                self._in_flight -= 1
        del body
        waiting = _Waiting(exchange, request, start + self._limits.seconds, self._limits.seconds)
        try:
            first = await waiting.next()
            reply = Reply(self._name, self._tokenizer)
            if asked.stream:
                checked = first if isinstance(first, Result) else _answers(first)
                return _EventStream(waiting, self._chunks(asked, reply, waiting, checked))
            content = reply.completion(_answers(first), asked.choices)
        except BaseException as error:
            waiting.close()
            if isinstance(error, ClientDisconnect):
                return Response(status_code=499)  # nobody reads it
            raise
        waiting.close()
        return JSONResponse(content)

    def _admit(self) -> None:
        if self._closing:
            raise Refusal(503, "the server is closing", headers={"Connection": "close"})
        if self._in_flight >= self._limits.requests:
            seconds = str(max(1, min(_LONGEST_WAIT, math.ceil(self._usual_seconds))))
            message = f"{self._in_flight} requests are being answered, as many as there may be: come back later"
            raise Refusal(429, message, code="rate_limit_exceeded", headers={"Retry-After": seconds})
        self._in_flight += 1

    def _ended(self, exchange: Exchange | None, start: float) -> None:
        self._in_flight -= 1
        self._usual_seconds += 0.1 * (time.monotonic() - start - self._usual_seconds)
        if exchange is not None:
            self._exchanges.discard(exchange)

    async def _body(self, request: Request) -> bytes:
        kind, most = request.headers.get("content-type", "").partition(";")[0].strip().lower(), self._limits.body_bytes
        if kind != "application/json":  # which a web page elsewhere cannot send unasked
            raise Refusal(415, "send JSON, as 'Content-Type: application/json'")
        length = request.headers.get("content-length", "")
        too_large = Refusal(413, f"the request has more than {most} bytes: send smaller images, or fewer")
        if length.isdecimal() and int(length[:20]) > most:
            raise too_large
        found, size = [], 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise too_large
                    found.append(part)
        except TimeoutError as error:
            raise Refusal(408, f"the request did not arrive within {self._limits.body_seconds:g} seconds") from error
        except ClientDisconnect as error:
            raise Refusal(400, "the request did not arrive") from error
        return b"".join(found)

    async def _chunks(
        self, asked: Asked, reply: Reply, waiting: "_Waiting", event: Result | list[Result]
    ) -> AsyncIterator[dict[str, Any]]:
        samples = asked.request.samples
        deltas = [Delta(self._tokenizer.decode_stream(), asked.request.stop) for _ in range(samples)]
        told = [0] * samples
        choices = {sample: range(sample * asked.choices, (sample + 1) * asked.choices) for sample in range(samples)}
        more = {"usage": None} if asked.usage else {}
        for index in range(samples * asked.choices):
            yield reply.chunk(index, {"role": "assistant", "content": ""}) | more
        while isinstance(event, Result):
            piece, logs = deltas[event.sample].push(event.tokens.tolist()), reply.logprobs(event, told[event.sample])
            told[event.sample] = len(event.tokens)
            for index in choices[event.sample] if piece or logs else ():
                yield reply.chunk(index, {"content": piece}, logs) | more
            following = await waiting.next()
            event = following if isinstance(following, Result) else _answers(following)
        for result in event:
            piece, logs = deltas[result.sample].finish(result.text or ""), reply.logprobs(result, told[result.sample])
            for index in choices[result.sample]:
                if piece or logs:
                    yield reply.chunk(index, {"content": piece}, logs) | more
                yield reply.chunk(index, {}, finish=result.finish) | more
        if asked.usage:
            yield reply.last(event, asked.choices)


class _Waiting:
    """Waits for an exchange as long as the client is there and its time has not run out."""

    def __init__(self, exchange: Exchange, request: Request, until: float, seconds: float) -> None:
        self._exchange, self._until, self._seconds = exchange, until, seconds
        self._gone = asyncio.create_task(_gone(request))

    async def next(self) -> Event:
        """What came next.

        Raises:
          ClientDisconnect: the client has left.
          Refusal: its time has run out.
        """
        event = asyncio.create_task(self._exchange.next())
        try:
            await asyncio.wait(
                {event, self._gone},
                timeout=max(0.0, self._until - time.monotonic()),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if event.done():
                return event.result()
            if self._gone.done():
                raise ClientDisconnect
            raise Refusal(504, f"there is no answer after {self._seconds:g} seconds", code="timeout")
        finally:
            event.cancel()

    def close(self) -> None:
        """Gives the exchange up, which does nothing if it has ended."""
        self._exchange.give_up()
        self._gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _EventStream(Response):
    """Server-sent events, and at last [DONE]; an error is an event of its own, behind which nothing comes."""

    media_type = "text/event-stream"

    def __init__(self, waiting: _Waiting, chunks: AsyncIterator[dict[str, Any]]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._waiting, self._chunks = waiting, chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""

        async def write(text: str) -> None:
            await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for chunk in self._chunks:
                    await write(json.dumps(chunk, ensure_ascii=False))
                await write("[DONE]")
            except Refusal as refusal:
                await write(json.dumps(refusal.body()))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (ClientDisconnect, OSError):
            pass
        finally:
            self._waiting.close()


def _answers(event: Event) -> list[Result]:
    """The answers of an exchange that has ended. Raises Refusal if there are none."""
    if not isinstance(event, list):
        raise Refusal(500, "the engine stopped while it answered: ask again", code="engine_stopped")
    for result in event:
        if result.finish == "cancelled":
            raise Refusal(503, "the server is closing")
        if not result.ok:
            text = (result.reason or "").removeprefix("InputError: ")
            raise Refusal(400, text, param="messages") if result.refused else Refusal(500, text)
    return event


async def _refused(request: Request, refusal: Refusal) -> Response:
    return JSONResponse(refusal.body(), refusal.status, refusal.headers)


async def _no_route(request: Request, error: HTTPException) -> Response:
    return JSONResponse(Refusal(error.status_code, error.detail).body(), error.status_code, error.headers)


async def _fault(request: Request, error: Exception) -> Response:
    return JSONResponse(Refusal(500, f"{type(error).__name__}: not expected here").body(), 500)
