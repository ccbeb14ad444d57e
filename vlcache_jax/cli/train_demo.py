"""`vlcache-jax train-demo`: trains the demo's checkpoint."""

import argparse
import os
from pathlib import Path
from typing import Any

from vlcache_jax.cli.runtime import use_compilation_cache
from vlcache_jax.errors import InputError
from vlcache_jax.writing import make_folder

_LEFT_BEHIND = ("state.safetensors", "vision.safetensors")  # by an earlier run


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    for name in ("minutes", "steps"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise InputError(f"{name}={value} trains nothing: give --{name} a number above 0")
    folder = Path(arguments.output)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {arguments.output!r} is a file: give a folder")
    earlier = any((folder / name).exists() for name in _LEFT_BEHIND)
    if earlier and not arguments.resume:
        raise InputError(f"{folder} holds an earlier run: add --resume to go on with it, or choose another --output")
    if arguments.resume and not earlier:
        raise InputError(f"{folder} holds no run to go on with: leave --resume out, or correct --output")
    make_folder(folder)
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output {arguments.output!r} cannot be written: choose another folder")

    from vlcache_jax.training.demo import train_demo

    use_compilation_cache(not arguments.no_compilation_cache)
    options: dict[str, Any] = {"minutes": arguments.minutes, "steps": arguments.steps, "resume": arguments.resume}
    train_demo(folder, **options)
