"""`vlcache-jax search-heads`: which pattern of a sparse prefill suits each head, on prompts of one's own."""

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from vlcache_jax.cli.checkpoint import keep_programs, open_asked
from vlcache_jax.cli.process import remark
from vlcache_jax.engine.engine import MOST_STOP_IDS
from vlcache_jax.engine.preparing import Preparer
from vlcache_jax.errors import InputError
from vlcache_jax.evaluation.head_search import search_heads
from vlcache_jax.evaluation.samples import find_files, read_samples
from vlcache_jax.evaluation.tasks import task_by_name
from vlcache_jax.files.writing import check_target, write_text
from vlcache_jax.inference.recipe import Recipe
from vlcache_jax.inputs import Batch
from vlcache_jax.models.io.loading import VLM
from vlcache_jax.terminal.progress import Progress
from vlcache_jax.terminal.table import percent


def run(arguments: argparse.Namespace, progress: Progress) -> None:
    """Runs the command; everything that can be checked is checked before weights are read."""
    task = task_by_name(arguments.task)
    files = find_files(arguments.data)
    target = Path(arguments.out)
    check_target(target)
    progress.step("opening the checkpoint")
    opened = open_asked(arguments)
    keep_programs(not arguments.no_compilation_cache, progress)
    progress.step("loading the weights")
    vlm = opened.load("stacked")
    progress.step("running the prompts", total=arguments.limit)
    lengths: list[int] = []

    def batches(vlm: VLM) -> Iterator[Batch]:
        preparer = Preparer(vlm.processor, vlm.model, Recipe(), sys.maxsize, 0, MOST_STOP_IDS)
        for number, sample in enumerate(islice(read_samples(files), arguments.limit)):
            request = dataclasses.replace(task.request(sample, vlm.processor), max_new_tokens=1)
            read = preparer.read(number, request)
            if read.batch is None:
                raise InputError(read.complaint)
            lengths.append(read.tokens)
            progress.note(f"{sample.id}: {read.tokens} tokens")
            yield read.batch
            progress.advance()

    found = search_heads(vlm.model, vlm.params, batches(vlm))
    write_text(target, json.dumps(found, indent=1) + "\n")
    progress.close()
    kinds = Counter(f"{kind} {v} {s}" for layer in found for kind, v, s, _ in layer.values())
    shares = [share for layer in found for *_, share in layer.values()]
    listed = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
    remark(f"{listed}; they keep {percent(sum(shares) / len(shares))} of the attention; {target}")
    if max(lengths) < 4096:
        remark(f"prompts had {max(lengths)} tokens at most, of which these patterns list nearly all: give longer ones")
