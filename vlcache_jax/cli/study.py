"""`vlcache-jax study`: every cache method at every budget on the demo checkpoint, with tables and pictures."""

import argparse
import datetime
import warnings

from vlcache_jax.cli.checkpoint import keep_programs, open_checkpoint
from vlcache_jax.cli.options import output_folder
from vlcache_jax.cli.process import emit, remark
from vlcache_jax.cli.runtime import describe_runtime
from vlcache_jax.demo.assets import MODEL, checksum, demo_assets
from vlcache_jax.demo.data.samples import FULL_GRID, HELD_OUT_SEED, TASKS
from vlcache_jax.demo.study.methods import choose, choose_budgets, choose_methods
from vlcache_jax.demo.study.pages import write_pages
from vlcache_jax.demo.study.results import ResultFile
from vlcache_jax.demo.study.run import MODES, run_study
from vlcache_jax.demo.study.tasks import DEFAULT_TASKS
from vlcache_jax.errors import InputError, PolicyWarning
from vlcache_jax.terminal.progress import Progress


def run(arguments: argparse.Namespace, progress: Progress) -> None:
    """Runs the command; everything that can be checked is checked before weights are read."""
    methods = choose_methods(arguments.methods)
    tasks = choose("tasks", arguments.tasks or DEFAULT_TASKS, TASKS)
    modes = choose("modes", arguments.modes, MODES)
    budgets = choose_budgets(arguments.budgets)
    progress.step("opening the checkpoint")
    assets = demo_assets(arguments.assets)
    opened = open_checkpoint(assets / MODEL, None)
    side = opened.model.spec.vision_grid
    if side != FULL_GRID:
        raise InputError(
            f"the checkpoint in {assets / MODEL} takes images of {side} patches a side, the study draws {FULL_GRID}: "
            "give the --assets of a checkpoint made by `vlcache-jax train-demo`"
        )
    study = {
        "model": opened.model.config.model_type,
        "checkpoint": checksum(assets / MODEL),
        "dtype": opened.dtype,
        "samples": arguments.samples,
        "seed": HELD_OUT_SEED,
    }
    keep_programs(not arguments.no_compilation_cache, progress)
    folder = output_folder(arguments.output, "--output")
    warnings.simplefilter("ignore", PolicyWarning)  # every method meets budgets that are too small for it
    file = ResultFile(folder, study)
    file.add_run({"date": datetime.date.today().isoformat(), **describe_runtime()})
    run_study(
        opened.load(),
        file,
        tasks=tasks,
        methods=methods,
        budgets=budgets,
        samples=arguments.samples,
        batch_size=arguments.batch,
        modes=modes,
        progress=progress,
    )
    progress.step("drawing tables and pictures")
    paths = write_pages(file, folder)
    progress.close()
    for path in paths:
        emit(str(path))
    remark(f"{len(file.results)} results in {file.path}")
