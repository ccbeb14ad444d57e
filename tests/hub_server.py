"""A small Hugging Face Hub on 127.0.0.1: as much of its interface as downloading a model takes."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_the_tests"


class Hub:
    """What is there, and what was asked.

    Attributes:
      models: folders by id.
      private: ids that a token is needed for; gated: ids whose terms nobody has accepted.
      requests: (method, path, token) in order.
    """

    def __init__(self) -> None:
        self.models: dict[str, Path] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.broken = False
        self.requests: list[tuple[str, str, str | None]] = []
        self.url = ""

    def downloaded(self) -> set[str]:
        """Names of the files whose contents were sent."""
        paths = [path.split("/resolve/") for method, path, _ in self.requests if method == "GET"]
        return {pair[1].split("/", 1)[1] for pair in paths if len(pair) == 2}


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """Runs a hub until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(True)

        def do_HEAD(self) -> None:
            self._answer(False)

        def _answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            authorization = self.headers.get("Authorization", "")
            token = authorization.removeprefix("Bearer ") or None
            hub.requests.append((self.command, path, token))
            parts = path.removeprefix("api/models/").split("/")
            model, rest = "/".join(parts[:2]), parts[2:]
            folder = hub.models.get(model)
            if hub.broken:
                return self._send(500, b"", body)
            if folder is None or (model in hub.private and token != TOKEN):
                return self._fail(401, "RepoNotFound", "Repository not found", body)
            if model in hub.gated and token != TOKEN:
                return self._fail(403, "GatedRepo", f"Access to model {model} is restricted", body)
            if path.startswith("api/") and (not rest or rest[0] == "revision"):
                if rest[1:] and rest[1] not in ("main", "v1", COMMIT):
                    return self._fail(404, "RevisionNotFound", "Invalid rev id", body)
                files = [{"rfilename": name} for name in _names(folder)]
                return self._send_json({"id": model, "sha": COMMIT, "siblings": files}, body)
            if path.startswith("api/") and rest[0] == "tree":
                files = [
                    {"type": "file", "path": name, "oid": _sha(folder / name), "size": (folder / name).stat().st_size}
                    for name in _names(folder)
                ]
                return self._send_json(files, body)
            if rest[0] == "resolve":
                file = folder / "/".join(rest[2:])
                if not file.is_file():
                    return self._fail(404, "EntryNotFound", "Entry not found", body)
                headers = {"ETag": f'"{_sha(file)}"', "X-Repo-Commit": COMMIT}
                return self._send(200, file.read_bytes(), body, headers)
            return self._fail(404, "EntryNotFound", "no such address", body)

        def _send_json(self, value: object, body: bool) -> None:
            self._send(200, json.dumps(value).encode(), body, {"Content-Type": "application/json"})

        def _fail(self, status: int, code: str, message: str, body: bool) -> None:
            self._send(status, b"", body, {"X-Error-Code": code, "X-Error-Message": message})

        def _send(self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _sha(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
