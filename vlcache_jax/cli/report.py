"""`vlcache-jax report`: the tables of evaluations."""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlcache_jax.cli.process import emit
from vlcache_jax.evaluation.report import Summary, markdown, rows, summarise
from vlcache_jax.evaluation.run_folder import RunFolder
from vlcache_jax.terminal.progress import Progress
from vlcache_jax.terminal.table import table


def run(arguments: argparse.Namespace, progress: Progress) -> None:
    """Runs the command."""
    folders = {path: RunFolder.open(Path(path)) for path in arguments.folders}
    found = {path: summarise(folder, compare=arguments.compare) for path, folder in folders.items()}
    progress.close()
    show(found, arguments)


def show(found: Mapping[str, Sequence[Summary]], arguments: argparse.Namespace) -> None:
    """Prints the summaries of each folder, as `--json` or `--markdown` says."""
    if arguments.json:
        emit(json.dumps({path: [dataclasses.asdict(x) for x in some] for path, some in found.items()}, indent=2))
        return
    for path, summaries in found.items():
        title = f"{path} ({summaries[0].metric})" if summaries else path
        emit(title + "\n\n" + (markdown(summaries) if arguments.markdown else table(rows(summaries))))
