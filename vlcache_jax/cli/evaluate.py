"""`vlcache-jax evaluate`: a data set under some policies."""

import argparse

import jax

from vlcache_jax.cli.checkpoint import keep_programs, open_asked
from vlcache_jax.cli.options import device_mesh, output_folder
from vlcache_jax.cli.process import remark
from vlcache_jax.cli.report import show
from vlcache_jax.errors import InputError
from vlcache_jax.evaluation.evaluate import evaluate
from vlcache_jax.evaluation.report import summarise
from vlcache_jax.evaluation.run_folder import RunFolder
from vlcache_jax.evaluation.samples import find_files
from vlcache_jax.evaluation.tasks import task_by_name
from vlcache_jax.inference.recipe import recipe_by_name
from vlcache_jax.parallel.processes import join, leave
from vlcache_jax.terminal import defaults, words
from vlcache_jax.terminal.progress import Progress


def run(arguments: argparse.Namespace, progress: Progress) -> None:
    """Runs the command; everything that can be checked is checked before weights are read."""
    policies = arguments.policy or [defaults.POLICY]
    for text in [*policies, *([arguments.compare] if arguments.compare else [])]:
        recipe_by_name(text)
    if arguments.divergence and not arguments.compare:
        raise InputError("--divergence needs a policy to diverge from: give --compare full_cache")
    task_by_name(arguments.task, metric=arguments.metric)
    find_files(arguments.data)
    share = None if arguments.share is None else _share(arguments.share)
    joined = arguments.distributed is not None
    if joined:
        if share is not None:
            raise InputError("--distributed and --share both say which samples are whose: give one of them")
        progress.step("joining the other processes")
        join(*_place(arguments.distributed))
    mesh = None if arguments.mesh is None else device_mesh(arguments.mesh)
    progress.step("opening the checkpoint")
    opened = open_asked(arguments)
    folder = output_folder(arguments.out, "--out")
    keep_programs(not arguments.no_compilation_cache, progress)
    progress.step("loading the weights")
    summaries = evaluate(
        opened.load(mesh=mesh),
        arguments.data,
        policies,
        folder,
        task=arguments.task,
        compare=arguments.compare,
        divergence=arguments.divergence,
        limit=arguments.limit,
        max_new_tokens=arguments.max_new_tokens,
        suffix=arguments.suffix,
        metric=arguments.metric,
        name=str(arguments.model),
        share=share,
        progress=progress,
        **({} if arguments.rows is None else {"rows": arguments.rows}),
    )
    if joined:
        progress.step("waiting for the other processes")
        first = jax.process_index() == 0
        leave()
        if not first:  # that one tells
            return
        summaries = summarise(RunFolder.open(folder), [summary.policy for summary in summaries], arguments.compare)
    progress.close()
    show({str(folder): summaries}, arguments)
    remark(f"the answers are in {folder}")


def _place(text: str) -> tuple[str, int, int] | tuple[()]:
    """HOST:PORT, how many processes and which of them; nothing for "auto"."""
    if text == "auto":
        return ()
    address, comma, share = text.partition(",")
    if not (comma and address.rpartition(":")[2].isdecimal()):
        raise InputError(f"--distributed {words.shown(text)} is not of the form HOST:PORT,I/N, such as node0:4000,0/4")
    index, count = _share(share, "--distributed")
    return address, count, index


def _share(text: str, option: str = "--share") -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(f"{option} {words.shown(text)} is not of the form I/N, such as 0/4, with I below N")
    return int(index), int(count)
