"""`vlcache-jax plan --train` and `--rollouts`: what a train step and its rollouts need on a TPU slice."""

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vlcache_jax.cli.options import mesh_axes
from vlcache_jax.cli.process import emit
from vlcache_jax.errors import InputError
from vlcache_jax.inference.recipe import recipe_by_name
from vlcache_jax.models.coding import weight_coding
from vlcache_jax.models.families.family import FamilyModel
from vlcache_jax.models.families.registry import family_of
from vlcache_jax.planning.placement import default_axes
from vlcache_jax.planning.plan import model_config
from vlcache_jax.planning.programs import Program
from vlcache_jax.planning.topologies import tpu_devices
from vlcache_jax.planning.training import TrainPlan, plan_rollouts, plan_training
from vlcache_jax.policies.budget import policy_text
from vlcache_jax.terminal import words
from vlcache_jax.terminal.progress import Progress
from vlcache_jax.terminal.table import gib, table
from vlcache_jax.training.lora import Lora

_REMAT = {"none": False, "projections": "projections", "layers": "layers"}


def run(arguments: argparse.Namespace, model: Any, progress: Progress) -> None:
    """Runs the command for this model, or the folder of one."""
    if arguments.train is not None and arguments.rollouts is not None:
        raise InputError("--train and --rollouts are two programs: plan one after the other")
    if arguments.remat not in _REMAT:
        raise InputError(f"--remat {words.shown(arguments.remat)} is not known: use {', '.join(_REMAT)}")
    recipes = [recipe_by_name(text) for text in (arguments.policy, *arguments.compare)]
    if any(recipe.prefill or recipe.pruning for recipe in recipes):
        raise InputError("patterns and pruning are not planned with --train or --rollouts: give policies alone")
    policies = [recipe.policy for recipe in recipes]
    what = None if arguments.train is None else _trained(arguments.train)
    config, name = model_config(model)
    jax.config.update("jax_platforms", "cpu")  # nothing runs: leave a TPU or GPU to others
    progress.step("starting the TPU's compiler")
    devices = len(tpu_devices(arguments.topology))
    usual = {"fsdp": devices} if what is not None else default_axes(devices, config.decoder.num_kv_heads)
    mesh = usual if arguments.mesh is None else mesh_axes(arguments.mesh)
    family = family_of(config)
    built: FamilyModel = family.model(
        config, jnp.dtype(arguments.dtype), weights=weight_coding(arguments.weights), remat=_REMAT[arguments.remat]
    )
    where: dict[str, Any] = {"batch": arguments.batch, "images": arguments.images * family.image_tiles(config)}
    progress.step("compiling")
    if what is not None:
        accumulate = arguments.accumulate
        step, _ = plan_training(
            built, arguments.topology, mesh, length=arguments.prompt, accumulate=accumulate, **what, **where
        )
        found: Any = step.as_dict()
        sizes = f"{arguments.prompt} tokens each, remat {arguments.remat}, accumulate {accumulate}"
        head, cells = f"a train step of {arguments.train}, {sizes}", _of_step(step)
        available, programs = step.available_bytes, [step.step]
    else:
        asked = {"prompt": arguments.prompt, "new_tokens": arguments.new, "samples": arguments.rollouts}
        plans = [plan_rollouts(built, arguments.topology, mesh, policy=x, **asked, **where) for x in policies]
        found = [plan.as_dict() for plan in plans]
        head = f"{arguments.rollouts} answers of {arguments.new} tokens to each prompt of {arguments.prompt}"
        cells = [
            ["", *(policy_text(plan.policy, plan.budget) for plan in plans)],
            ["weights", *(gib(plan.weight_bytes) for plan in plans)],
            *_of_programs([plan.program for plan in plans]),
            ["fits", *("yes" if plan.fits else "no" for plan in plans)],
        ]
        available, programs = plans[0].available_bytes, [plan.program for plan in plans]
    progress.close()
    if arguments.json:
        emit(json.dumps(found, indent=2))
        return
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(family.model(config, jnp.float32).abstract_params()))
    axes = " x ".join(f"{name} {size}" for name, size in mesh.items())
    lines = [
        f"{name}, {parameters:,} parameters in {arguments.dtype}, on {arguments.topology} ({axes})",
        f"{head}, batch {arguments.batch}; GiB per device, of which a program may use {gib(available)}",
        "",
        table(cells),
        *(f"!  the compiler: {program.refused}" for program in programs if program.refused),
    ]
    emit("\n".join(lines))


def _trained(text: str) -> dict[str, Any]:
    """Options of `plan_training` from lora:RANK, all, or paths with commas between them."""
    kind, colon, rank = text.partition(":")
    if kind == "lora":
        if colon and not (rank.isdecimal() and len(rank) < 6):
            raise InputError(f"--train {words.shown(text)} is not of the form lora:RANK, such as lora:16")
        return {"lora": Lora(rank=int(rank)) if colon else Lora()}
    return {"trainable": None if text == "all" else tuple(part.strip() for part in text.split(","))}


def _of_step(plan: TrainPlan) -> list[list[str]]:
    return [
        ["frozen parameters", gib(plan.frozen_bytes)],
        ["trained ones, optimizer", gib(plan.state_bytes)],
        *_of_programs([plan.step]),
        ["fits", "yes" if plan.fits else "no"],
    ]


def _of_programs(programs: Sequence[Program]) -> list[list[str]]:
    return [
        ["temporaries", *(gib(program.temporary_bytes) for program in programs)],
        ["peak", *(gib(program.peak_bytes) for program in programs)],
        ["compile seconds", *(f"{program.compile_seconds:.0f}" for program in programs)],
    ]
