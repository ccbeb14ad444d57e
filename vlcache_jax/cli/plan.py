"""`vlcache-jax plan`: what a run needs on a TPU slice."""

import argparse
import json

import jax

from vlcache_jax.cli import plan_training
from vlcache_jax.cli.options import mesh_axes
from vlcache_jax.cli.process import emit
from vlcache_jax.inference.recipe import recipe_by_name
from vlcache_jax.models.io.files import CheckpointFolder
from vlcache_jax.models.io.hub import find_checkpoint
from vlcache_jax.planning import Limit, Plan, PolicyPlan, Program, plan
from vlcache_jax.terminal.progress import Progress
from vlcache_jax.terminal.table import gib, table


def run(arguments: argparse.Namespace, progress: Progress) -> None:
    """Runs the command."""
    if arguments.train is not None or arguments.rollouts is not None:
        plan_training.run(arguments, _model(arguments), progress)
        return
    recipe = recipe_by_name(arguments.policy)
    compare = [recipe_by_name(text) for text in arguments.compare]
    mesh = None if arguments.mesh is None else mesh_axes(arguments.mesh)
    jax.config.update("jax_platforms", "cpu")  # nothing runs: leave a TPU or GPU to others
    found = plan(
        _model(arguments),
        arguments.topology,
        batch=arguments.batch,
        prompt=arguments.prompt,
        new_tokens=arguments.new,
        images=arguments.images,
        max_image_tokens=arguments.max_image_tokens,
        policy=recipe,
        compare=compare,
        mesh=mesh,
        dtype=arguments.dtype,
        weights=arguments.weights,
        search=not arguments.no_search,
        max_compilations=arguments.max_compilations,
        progress=progress,
    )
    progress.close()
    emit(json.dumps(found.as_dict(), indent=2) if arguments.json else describe(found))


def _model(arguments: argparse.Namespace) -> str | CheckpointFolder:
    if arguments.revision is None and not arguments.allow_links:
        return arguments.model  # perhaps the name of a published model, which is no folder
    return find_checkpoint(
        arguments.model, revision=arguments.revision, allow_links=arguments.allow_links, weights=False
    )


def describe(found: Plan) -> str:
    """The plan as a page of text."""
    per = "chip" if found.devices_per_chip == 1 else f"device ({found.devices_per_chip} a chip)"
    mesh = " x ".join(f"{name} {size}" for name, size in found.mesh.items())
    coded = "" if found.weights == "float" else f", those of projections in {found.weights}"
    head = [
        f"{found.model}, {found.parameters:,} parameters in {found.dtype}{coded}, on {found.topology} ({mesh})",
        f"batch {found.batch}, prompt {found.prompt}, {found.new_tokens} new tokens, {found.tiles} image tiles each",
        f"GiB per {per}; {gib(found.hbm_bytes)} of memory, of which the compiler lets a program use "
        f"{gib(found.available_bytes)}",
    ]
    plans = found.policies
    rows: list[list[str]] = [["", *(p.recipe for p in plans)]]

    def add(label: str, cells: list[str]) -> None:
        rows.append([label, *cells])

    add("weights", [gib(found.weight_bytes)] * len(plans))
    add("KV state: prompt", [gib(p.context_bytes) for p in plans])
    add("KV state: new tokens", [gib(p.tail_bytes) for p in plans])
    for label, programs in (
        ("prefill", [p.prefill for p in plans]),
        ("decoding", [p.decode for p in plans]),
        ("one decode step", [p.decode_step for p in plans]),
    ):
        add(f"{label}: temporaries", [gib(p.temporary_bytes) for p in programs])
        add(f"{label}: peak", [gib(p.peak_bytes) for p in programs])
    add("fits", ["yes" if p.fits else "no" for p in plans])
    if any(p.largest_batch for p in plans):
        add("largest batch that fits", [_limit(p.largest_batch) for p in plans])
        add("longest prompt that fits", [_limit(p.longest_prompt) for p in plans])
    add("read by one step *", [gib(p.step_read_bytes) for p in plans])
    add("tokens/s at most **", [f"{p.bound_tokens_per_second:,.0f}" for p in plans])
    add("compile seconds", [_seconds(p) for p in plans])
    notes = [
        "*  weights of the decoder and KV state, once",
        f"** of the whole slice: that reading alone, at the published {found.hbm_bytes_per_second / 1e9:,.0f} GB/s",
    ]
    if any(limit is not None and limit.refused is None for p in plans for limit in (p.largest_batch, p.longest_prompt)):
        notes.append("+  nothing larger was tried: the ceiling of the search, or the end of its compilations")
    notes += [f"#  {note}" for note in dict.fromkeys(note for p in plans for note in p.replicated)]
    programs = [program for p in plans for program in (p.prefill, p.decode, p.decode_step)]
    declined = {found for program in programs for found in program.implementations if "<" in found}
    notes += [f"=  {found}" for found in sorted(declined)]
    reasons = sorted({program.refused for program in programs if program.refused})
    notes += [f"!  the compiler: {reason}" for reason in reasons]
    return "\n".join([*head, "", table(rows), "", *notes])


def _limit(limit: Limit | None) -> str:
    if limit is None:
        return "?"
    if limit.fits is None:
        return "none" if limit.refused is None else f"below {limit.refused}"
    return f"{limit.fits}{'+' if limit.refused is None else ''}"


def _seconds(plan: PolicyPlan) -> str:
    programs: list[Program] = [plan.prefill, plan.decode, plan.decode_step]
    return " + ".join(f"{program.compile_seconds:.0f}" for program in programs)
