"""The server process: a socket, an engine that is warm, and the loop that waits for clients."""

import ipaddress
import socket
from collections.abc import Callable

import uvicorn

from vlcache_jax.errors import InputError
from vlcache_jax.serving.app import ChatServer

_KEEP_ALIVE = 30  # seconds of a connection without a request


def bound(host: str, port: int) -> socket.socket:
    """A socket of an address, which nobody can connect to yet.

    Raises:
      InputError: the address is none of this machine's, or taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise InputError(f"--host {host} --port {port} cannot be listened on ({error}): choose another") from error
    return found


def is_loopback(sock: socket.socket) -> bool:
    """Whether only this machine can reach a socket."""
    return ipaddress.ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback


def url(sock: socket.socket) -> str:
    """Where clients find a server."""
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def uvicorn_server(server: ChatServer, grace: int, connections: int, ready: Callable[[], None]) -> uvicorn.Server:
    """What serves, by its `run(sockets=[...])`, until Ctrl-C or SIGTERM; then it ends what is being answered.

    Args:
      server: whose engine is warm.
      grace: seconds in which answers may still end.
      connections: at the same time; others are refused.
      ready: called once clients can connect.
    """
    config = uvicorn.Config(
        server.app,
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=connections,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=grace,
    )
    return _Server(config, ready)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()
