"""`vlcache-jax serve`: OpenAI's chat API over a checkpoint."""

import argparse
import os
import socket
from pathlib import Path

from vlcache_jax.cli.checkpoint import OpenedCheckpoint, keep_programs, open_asked
from vlcache_jax.cli.options import device_mesh
from vlcache_jax.cli.process import SIGNALS, remark
from vlcache_jax.engine.buckets import check_buckets
from vlcache_jax.engine.engine import Engine
from vlcache_jax.errors import CheckpointError, InputError
from vlcache_jax.inference.recipe import recipe_by_name
from vlcache_jax.serving.limits import Limits
from vlcache_jax.serving.sizes import usual_sizes
from vlcache_jax.terminal import words
from vlcache_jax.terminal.progress import Progress

try:
    from vlcache_jax.serving.app import ChatServer
    from vlcache_jax.serving.server import bound, is_loopback, url, uvicorn_server
except ImportError as error:
    raise InputError(f"a server needs starlette and uvicorn ({error}): pip install 'vlcache-jax[serve]'") from error

KEY = "VLCACHE_JAX_API_KEY"
_LOOPBACK_NAMES = ["localhost", "127.0.0.1", "[::1]"]


def run(arguments: argparse.Namespace, progress: Progress) -> None:
    """Runs the command; everything that can be checked is checked before weights are read."""
    recipe = recipe_by_name(arguments.policy)
    given = check_buckets([_bucket(text) for text in arguments.bucket]) if arguments.bucket else None
    size = _size(arguments.image_size)
    mesh = None if arguments.mesh is None else device_mesh(arguments.mesh)
    with bound(arguments.host, arguments.port) as sock:
        progress.step("opening the checkpoint")
        opened = open_asked(arguments)
        if not opened.processor.has_chat_template:
            raise CheckpointError(f"{arguments.model} has no chat template, which a chat needs: take an instruct model")
        positions = opened.model.spec.max_positions
        buckets = given or usual_sizes(opened.processor, positions, arguments.images, size, arguments.text_tokens)
        keep_programs(not arguments.no_compilation_cache, progress)
        progress.step("loading the weights")
        engine = Engine(
            opened.load(mesh=mesh),
            recipe,
            rows="auto" if arguments.rows is None else arguments.rows,
            max_new_tokens=arguments.max_new_tokens,
            steps=arguments.steps,
            top_log_probabilities=arguments.top_logprobs,
            buckets=buckets,
        )
        progress.step(f"compiling for prompts of {', '.join(str(bucket[0]) for bucket in buckets)} tokens")
        engine.warmup()
        progress.close()
        _serve(arguments, opened, engine, sock)


def _serve(arguments: argparse.Namespace, opened: OpenedCheckpoint, engine: Engine, sock: socket.socket) -> None:
    folder = Path(arguments.model)
    name = arguments.name or (folder.resolve().name if folder.is_dir() else arguments.model)
    key, local, rows = os.environ.get(KEY) or None, is_loopback(sock), engine.stats().rows
    limits = Limits(
        requests=arguments.requests,
        seconds=arguments.timeout,
        body_bytes=arguments.body_megabytes * 2**20,
        images=max(arguments.images, Limits.images),
        pixels=arguments.megapixels * 1_000_000,
    )
    server = ChatServer(
        engine,
        opened.processor.tokenizer,
        name,
        arguments.max_new_tokens,
        limits=limits,
        key=key,
        hosts=_LOOPBACK_NAMES if local else None,
    )
    if not local and key is None:
        remark(f"anybody who reaches this address may ask: set {KEY} to a secret, which clients then send as their key")

    def ready() -> None:
        remark(f"serving {name} at {url(sock)} ({arguments.policy}, rows: {rows}); Ctrl-C ends it")

    with SIGNALS.left_to_others():
        uvicorn_server(server, arguments.grace, 4 * arguments.requests, ready).run(sockets=[sock])


def _bucket(text: str) -> tuple[int, int]:
    tokens, _, tiles = text.partition(":")
    if not (tokens.isdecimal() and tiles.isdecimal()):
        raise InputError(f"--bucket {words.shown(text)} is not of the form TOKENS:TILES, such as 2048:3")
    return int(tokens), int(tiles)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and 0 < int(width) <= 10_000 and 0 < int(height) <= 10_000):
        raise InputError(f"--image-size {words.shown(text)} is not of the form WIDTHxHEIGHT, such as 1024x768")
    return int(width), int(height)
