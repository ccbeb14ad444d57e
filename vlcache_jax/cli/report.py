"""`vlcache-jax report`: the tables of evaluations."""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlcache_jax.cli.options import output_folder
from vlcache_jax.cli.process import emit, remark
from vlcache_jax.evaluation.plots import write_plots
from vlcache_jax.evaluation.report import Summary, rows, summarise
from vlcache_jax.evaluation.run_folder import RunFolder
from vlcache_jax.evaluation.speed import Speed, speed, speed_rows
from vlcache_jax.terminal.progress import Progress
from vlcache_jax.terminal.table import markdown, table


def run(arguments: argparse.Namespace, progress: Progress) -> None:
    """Runs the command."""
    folders = {path: RunFolder.open(Path(path)) for path in arguments.folders}
    found = {path: summarise(folder, compare=arguments.compare) for path, folder in folders.items()}
    speeds = {
        path: [one for one in (speed(folders[path], summary.policy) for summary in some) if one is not None]
        for path, some in found.items()
    }
    files = [] if arguments.plots is None else write_plots(found, speeds, output_folder(arguments.plots, "--plots"))
    progress.close()
    show(found, arguments, speeds if arguments.speed else {})
    for file in files:
        remark(f"wrote {file}")


def show(
    found: Mapping[str, Sequence[Summary]],
    arguments: argparse.Namespace,
    speeds: Mapping[str, Sequence[Speed]] | None = None,
) -> None:
    """Prints the summaries of each folder, and how fast they ran, as `--json` or `--markdown` says."""
    speeds = speeds or {}
    if arguments.json:
        emit(json.dumps({path: _json(some, speeds.get(path, ())) for path, some in found.items()}, indent=2))
        return
    for path, summaries in found.items():
        title = f"{path} ({summaries[0].metric})" if summaries else path
        tables = [rows(summaries), *([speed_rows(speeds[path])] if speeds.get(path) else [])]
        write = markdown if arguments.markdown else table
        emit("\n\n".join([title, *(write(cells) for cells in tables)]))


def _json(summaries: Sequence[Summary], speeds: Sequence[Speed]) -> list[dict[str, Any]]:
    fast = {one.policy: {"speed": dataclasses.asdict(one)} for one in speeds}
    return [dataclasses.asdict(one) | fast.get(one.policy, {}) for one in summaries]
