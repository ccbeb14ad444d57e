"""`vlcache-jax train-demo`: trains the demo's checkpoint."""

import argparse

from vlcache_jax.cli.checkpoint import keep_programs
from vlcache_jax.cli.options import output_folder
from vlcache_jax.demo.recipe.train import train_demo
from vlcache_jax.errors import InputError
from vlcache_jax.terminal.progress import Progress
from vlcache_jax.training.checkpoint import has_state

_LEFT_BEHIND = ("state", "vision")  # by an earlier run

_MOST_MINUTES = 10**6


def run(arguments: argparse.Namespace, progress: Progress) -> None:
    """Runs the command."""
    minutes = arguments.minutes
    if minutes is not None and not 0 < minutes < _MOST_MINUTES:
        raise InputError(f"minutes={minutes:g} is out of range: give --minutes above 0 and below {_MOST_MINUTES}")
    folder = output_folder(arguments.output, "--output")
    earlier = any(has_state(folder / name) for name in _LEFT_BEHIND)
    if earlier and not arguments.resume:
        raise InputError(f"{folder} holds an earlier run: add --resume to go on with it, or choose another --output")
    if arguments.resume and not earlier:
        raise InputError(f"{folder} holds no run to go on with: leave --resume out, or correct --output")
    keep_programs(not arguments.no_compilation_cache, progress)
    train_demo(folder, minutes=minutes, steps=arguments.steps, resume=arguments.resume, progress=progress)
