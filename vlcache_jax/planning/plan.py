"""`plan`: does it fit, what does it cost, how far can it go."""

import dataclasses
import importlib.metadata
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from vlcache_jax.errors import InputError, is_whole
from vlcache_jax.inference.recipe import Recipe, recipe_of
from vlcache_jax.models.coding import WeightCoding, weight_coding
from vlcache_jax.models.families.family import ModelConfig
from vlcache_jax.models.families.registry import family_of, preset, read_config
from vlcache_jax.models.io.hub import find_checkpoint
from vlcache_jax.parallel.replication import replicated
from vlcache_jax.planning.chips import CHIPS
from vlcache_jax.planning.placement import DATA_AXIS, check_axes, default_axes
from vlcache_jax.planning.programs import Program, Programs, Workload
from vlcache_jax.planning.search import Limit, largest
from vlcache_jax.planning.topologies import make_mesh, parse_topology, tpu_devices
from vlcache_jax.policies import Policy, VLCache
from vlcache_jax.policies.budget import Budget, budget_value
from vlcache_jax.terminal.progress import Progress

_LARGEST_BATCH = 1024
_PROMPT_STEP = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyPlan:
    """One policy on one slice; bytes are of one device.

    Attributes:
      recipe: which, for people.
      policy, budget: its policy.
      fits: whether prefill and decoding both compile within the device's memory.
      context_bytes: the compressed cache of the prompts.
      tail_bytes: the cache of generated tokens.
      peak_bytes: the larger peak of prefill and decoding; None if the compiler names none.
      prefill, decode, decode_step: what the compiler says. `decode` is the whole loop of `generate`; `decode_step` one
        step with the state donated.
      step_read_bytes: weights of the decoder and state, which every step reads once if the budget is used up.
      bound_tokens_per_second: of the whole slice, if that reading at the published bandwidth were all; an upper bound,
        not a prediction.
      replicated: what every device holds as a whole although the mesh could split it, with the remedy.
      largest_batch, longest_prompt: see `Limit`; None if not searched for, or if the compiler refuses the program for
        another reason than its size.
    """

    recipe: str
    policy: str
    budget: Budget
    fits: bool
    context_bytes: int
    tail_bytes: int
    peak_bytes: int | None
    prefill: Program
    decode: Program
    decode_step: Program
    step_read_bytes: int
    bound_tokens_per_second: float
    replicated: tuple[str, ...]
    largest_batch: Limit | None
    longest_prompt: Limit | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What `plan` found out; bytes are of one device (one chip, or half of one: see `devices_per_chip`).

    Attributes:
      model: preset or folder.
      parameters: of the model as it runs (vision layers behind the last one used are not loaded).
      topology, devices, devices_per_chip: the slice.
      mesh: size of each axis.
      dtype: of parameters and cache.
      weights: what the decoder's projections are kept as.
      batch, prompt, new_tokens, tiles: the workload; see `Workload`.
      hbm_bytes: published memory of a device.
      available_bytes: what the compiler lets a program use of it.
      hbm_bytes_per_second: published bandwidth of a device.
      weight_bytes: parameters on a device.
      policies: the one asked for, then those to compare with.
      versions: of jax and libtpu.
    """

    model: str
    parameters: int
    topology: str
    devices: int
    devices_per_chip: int
    mesh: dict[str, int]
    dtype: str
    weights: str
    batch: int
    prompt: int
    new_tokens: int
    tiles: int
    hbm_bytes: int
    available_bytes: int
    hbm_bytes_per_second: float
    weight_bytes: int
    policies: tuple[PolicyPlan, ...]
    versions: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings, for JSON."""
        policies = [dataclasses.asdict(p) | {"budget": budget_value(p.budget)} for p in self.policies]
        return dataclasses.asdict(self) | {"policies": policies}


def plan(
    model: str | os.PathLike[str] | ModelConfig,
    topology: str,
    *,
    batch: int = 1,
    prompt: int = 4096,
    new_tokens: int = 256,
    images: int = 1,
    max_image_tokens: int | None = None,
    policy: Policy | Recipe | None = None,
    compare: Sequence[Policy | Recipe] = (),
    mesh: Mapping[str, int] | None = None,
    dtype: str = "bfloat16",
    weights: str | WeightCoding | None = None,
    search: bool = True,
    max_compilations: int = 5,
    progress: Progress | None = None,
) -> Plan:
    """Compiles a run for a TPU slice and says what it needs. Neither a TPU nor weights are needed; nothing runs.

    Args:
      model: a preset (such as "llava-1.5-7b"), a folder with a `config.json`, or a configuration.
      topology: generation and chips, such as "v5e:2x4", "v6e:1x1" or "v5p:2x2x1".
      batch: prompts at once.
      prompt: padded prompt length in tokens, visual ones included.
      new_tokens: room for generated tokens.
      images: of each prompt; LLaVA-NeXT cuts one into 5 tiles.
      max_image_tokens: visual tokens of an image at most, of a model whose images may be of any size.
      policy: what to keep, `VLCache(budget=0.1)` by default; or a recipe, whose pruning has `rooms`: a plan has no
        prompts of which tokens could be counted.
      compare: other policies or recipes, such as `FullCache()`.
      mesh: sizes of the axes "data" (splits the batch) and "model" (splits heads and MLPs). By default "model" is the
        largest common divisor of devices and KV heads, and "data" takes the rest.
      dtype: of parameters and cache: "bfloat16", "float32" or "float16".
      weights: what the decoder's projections are kept as, "int8" or "int4", as in `load`; `dtype` by default.
      search: also look for the largest batch and the longest prompt that fit.
      max_compilations: prefills compiled for each of these searches.
      progress: shows every compilation (`vlcache_jax.terminal.progress.Progress()`); by default nothing is shown.

    Returns:
      The plan. A program that does not fit is not an error: see `PolicyPlan.fits`.

    Raises:
      CheckpointError: the folder's `config.json` is missing or not supported.
      InputError: an unknown model, topology or mesh, a workload that the model cannot serve, or libtpu is missing.

    Example:
      plan = vlc.plan("llava-v1.6-mistral-7b", "v5e:2x4", batch=16, prompt=8192, compare=[vlc.FullCache()])
      print(plan.policies[0].fits, plan.policies[0].peak_bytes)
    """
    config, name = model_config(model)
    if dtype not in ("bfloat16", "float32", "float16"):
        raise InputError(f"dtype={dtype!r} is not supported: use one of bfloat16, float32, float16")
    recipes = [recipe_of(VLCache(budget=0.1) if policy is None else policy), *map(recipe_of, compare)]
    for recipe in recipes:
        _check_rooms(recipe)
    tiles = _image_tiles(config, max_image_tokens)
    work = _workload(config, batch, prompt, new_tokens, images, tiles)
    progress = Progress(enabled=False) if progress is None else progress
    progress.step("starting the TPU's compiler")
    chip = CHIPS[parse_topology(topology)[0]]
    devices = tpu_devices(topology)
    kv_heads = config.decoder.num_kv_heads
    axes = check_axes(mesh or default_axes(len(devices), kv_heads), len(devices), kv_heads, batch)
    built = family_of(config).model(config, jnp.dtype(dtype), weights=weight_coding(weights))
    plain = dataclasses.replace(built, weights=None)
    programs = Programs(built, make_mesh(devices, axes))
    planner = _Planner(programs, work, chip.hbm_bytes_per_second / chip.devices, max_compilations, search, progress)
    return Plan(
        model=name,
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(plain.abstract_params())),
        topology=topology,
        devices=len(devices),
        devices_per_chip=chip.devices,
        mesh=axes,
        dtype=dtype,
        **{field.name: getattr(work, field.name) for field in dataclasses.fields(work)},
        weights=str(built.weights or "float"),
        hbm_bytes=chip.hbm_bytes // chip.devices,
        available_bytes=planner.available,
        hbm_bytes_per_second=planner.bandwidth,
        weight_bytes=planner.weights,
        policies=tuple(map(planner.plan, recipes)),
        versions={package: importlib.metadata.version(package) for package in ("jax", "libtpu")},
    )


class _Planner:
    def __init__(
        self,
        programs: Programs,
        work: Workload,
        bandwidth: float,
        max_compilations: int,
        search: bool,
        progress: Progress,
    ) -> None:
        self.programs, self.work, self.bandwidth = programs, work, bandwidth
        self.max_compilations, self.search, self.progress = max_compilations, search, progress
        self.available = programs.available_bytes()
        self.weights = programs.bytes_of(programs.params)
        decoder = programs.params["decoder"]
        tied = programs.model.config.decoder.tie_embeddings
        used = {key: value for key, value in decoder.items() if tied or key != "embed_tokens"}
        self.decoder_weights = programs.bytes_of(used)

    def plan(self, recipe: Recipe) -> PolicyPlan:
        work, programs, policy = self.work, self.programs, recipe.policy
        state = programs.state(work, recipe)
        context, tail = programs.bytes_of(state.stores), programs.bytes_of(state.tail)
        kept = programs.bytes_of([(x.keys, x.values, x.key_scales, x.value_scales) for x in state.stores])
        prefill = self._compile("prefill", work, recipe)
        decode = self._compile("decoding", work, recipe)
        step = self._compile("decode step", work, recipe)
        peaks = [program.peak_bytes for program in (prefill, decode)]
        read = self.decoder_weights + kept + tail
        room = programs.model.spec.max_positions - work.new_tokens
        return PolicyPlan(
            recipe=recipe.title,
            policy=policy.name,
            budget=policy.budget,
            fits=self._fits(prefill) and self._fits(decode),
            context_bytes=context,
            tail_bytes=tail,
            peak_bytes=None if None in peaks else max(p for p in peaks if p is not None),
            prefill=prefill,
            decode=decode,
            decode_step=step,
            step_read_bytes=read,
            bound_tokens_per_second=work.batch * self.bandwidth / read,
            replicated=replicated(
                programs.mesh.shape,
                programs.model.spec,
                rows=work.batch,
                lanes=policy.shared_lanes,
                policy=policy.name,
            ),
            largest_batch=self._largest(
                recipe, prefill, "batch", programs.mesh.shape[DATA_AXIS], max(_LARGEST_BATCH, work.batch)
            ),
            longest_prompt=self._largest(recipe, prefill, "prompt", _PROMPT_STEP if room >= _PROMPT_STEP else 1, room),
        )

    def _largest(self, recipe: Recipe, prefill: Program, field: str, step: int, ceiling: int) -> Limit | None:
        if not self.search or (prefill.refused is not None and not prefill.out_of_memory):
            return None

        def peak(size: int) -> tuple[bool, int | None]:
            # Decoding is compiled only where the prefill, which needs more as a rule, fits.
            changed: dict[str, Any] = {field: size}
            work = dataclasses.replace(self.work, **changed)
            first = self._compile("prefill", work, recipe)
            if not self._fits(first):
                return False, first.peak_bytes
            second = self._compile("decoding", work, recipe)
            peaks = [p.peak_bytes for p in (first, second) if p.peak_bytes is not None]
            return self._fits(second), max(peaks, default=None)

        return largest(
            peak,
            getattr(self.work, field),
            known=(self._fits(prefill), prefill.peak_bytes),
            fixed_bytes=self.weights,
            available_bytes=self.available,
            step=step,
            ceiling=ceiling,
            max_compilations=self.max_compilations,
        )

    def _fits(self, program: Program) -> bool:
        return program.refused is None and program.peak_bytes is not None and program.peak_bytes <= self.available

    def _compile(self, name: str, work: Workload, recipe: Recipe) -> Program:
        what = f"{name}, {recipe.title}, batch {work.batch}, prompt {work.prompt}"
        self.progress.step(f"compiling: {what}")
        programs = self.programs
        compile_ = {"prefill": programs.prefill, "decoding": programs.decode, "decode step": programs.decode_step}[name]
        program = compile_(work, recipe)[0]
        verdict = f"peak {program.peak_bytes / 2**30:.2f} GiB" if program.peak_bytes else "peak unknown"
        if not self._fits(program):
            small = program.refused is not None and not program.out_of_memory
            verdict = f"refused ({program.refused})" if small else f"{verdict}, does not fit"
        self.progress.note(f"{what}: {verdict} (compiled in {program.compile_seconds:.1f} s)")
        return program


def model_config(model: str | os.PathLike[str] | ModelConfig) -> tuple[ModelConfig, str]:
    """The configuration of a preset, of a folder with a `config.json` or of what is one already, and its name."""
    if not isinstance(model, str | os.PathLike):
        return model, model.model_type
    name = os.fspath(model)
    if Path(name).is_dir() or os.sep in name or "/" in name:
        return read_config(find_checkpoint(model, weights=False)), name
    return preset(name), name


def _image_tiles(config: ModelConfig, max_image_tokens: int | None) -> int:
    """The most tiles or patches that an image becomes."""
    family = family_of(config)
    if max_image_tokens is None:
        return family.image_tiles(config)
    if not is_whole(max_image_tokens, 1):
        raise InputError(f"max_image_tokens={max_image_tokens!r} must be a whole number of at least 1")
    if family.token_patches is None:
        raise InputError(f"{config.model_type} resizes images to sizes of its own: leave max_image_tokens out")
    return max_image_tokens * family.token_patches(config)


def _workload(config: ModelConfig, batch: int, prompt: int, new_tokens: int, images: int, image_tiles: int) -> Workload:
    for field, value, least in (
        ("batch", batch, 1),
        ("prompt", prompt, 1),
        ("new_tokens", new_tokens, 1),
        ("images", images, 0),
    ):
        if not is_whole(value, least):
            raise InputError(f"{field}={value!r} must be a whole number of at least {least}")
    positions = config.decoder.extended_positions
    if prompt + new_tokens > positions:
        raise InputError(
            f"prompt={prompt} and new_tokens={new_tokens} need {prompt + new_tokens} positions but the model has "
            f"{positions}: lower one of them"
        )
    return Workload(batch=batch, prompt=prompt, new_tokens=new_tokens, tiles=images * image_tiles)


def _check_rooms(recipe: Recipe) -> None:
    if recipe.pruning is not None and recipe.pruning.rooms is None:
        raise InputError(
            f"pruning={recipe.pruning!r} has no rooms: say how many tokens of a prompt go on behind each cut, text "
            "included, such as rooms=(2048, 1024, 512)"
        )
