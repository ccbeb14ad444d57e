"""What a train step and its rollouts need on a TPU slice, from the TPU's own compiler."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from vlcache_jax.errors import InputError
from vlcache_jax.inputs import Batch
from vlcache_jax.models.families.family import FamilyModel
from vlcache_jax.parallel.mesh import MODEL_AXIS
from vlcache_jax.parallel.params import param_shardings
from vlcache_jax.planning.compiling import abstract
from vlcache_jax.planning.placement import place, place_params
from vlcache_jax.planning.programs import Program, Programs
from vlcache_jax.planning.topologies import make_mesh, tpu_devices
from vlcache_jax.policies.budget import Budget, budget_value
from vlcache_jax.policies.policy import Policy
from vlcache_jax.training.batch import TrainBatch
from vlcache_jax.training.lora import Lora
from vlcache_jax.training.loss import answer_loss
from vlcache_jax.training.parts import split
from vlcache_jax.training.rollouts import rollout
from vlcache_jax.training.state import Params, init_state, make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """What `plan_training` found out; bytes are of one device.

    Attributes:
      step: the train step, as the compiler sees it.
      frozen_bytes: parameters that are not trained.
      state_bytes: those that are, and the optimizer's numbers.
      available_bytes: what the compiler lets a program use of a device's memory.
    """

    step: Program
    frozen_bytes: int
    state_bytes: int
    available_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the step runs within the memory of a device."""
        return _fits(self.step, self.available_bytes)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self) | {"fits": self.fits}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutPlan:
    """What `plan_rollouts` found out; bytes are of one device.

    Attributes:
      policy, budget: with which answers are drawn.
      program: all of `rollout`.
      weight_bytes: parameters.
      available_bytes: what the compiler lets a program use of a device's memory.
    """

    policy: str
    budget: Budget
    program: Program
    weight_bytes: int
    available_bytes: int

    @property
    def fits(self) -> bool:
        """Whether it runs within the memory of a device."""
        return _fits(self.program, self.available_bytes)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self) | {"budget": budget_value(self.budget), "fits": self.fits}


def plan_training(
    model: FamilyModel,
    topology: str,
    mesh: Mapping[str, int],
    *,
    batch: int,
    length: int,
    images: int = 1,
    lora: Lora | None = None,
    trainable: Sequence[str] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    accumulate: int = 1,
) -> tuple[TrainPlan, Any]:
    """Compiles a train step for a TPU slice. Neither a TPU nor weights are needed; nothing runs.

    Args:
      model: with the `dtype` and `remat` of the run; what is frozen has that dtype, what is trained is float32.
      topology: such as "v5e:2x4".
      mesh: sizes of the axes, {"data": 2, "fsdp": 2, "model": 2}; their product is the slice.
      batch, length: rows of a batch and their padded length.
      images: tiles of a row.
      lora: adapters that are trained alone, or
      trainable: prefixes of the parameters that are; None for all.
      optimizer: AdamW by default.
      accumulate: as in `make_train_step`.

    Returns:
      (the plan, the compiled program or None).

    Raises:
      InputError: axes that do not make up the slice, or over which the rows cannot be split.

    Example:
      model = Llava(preset("llava-1.5-7b"), jnp.dtype("bfloat16"), remat="projections")
      found, _ = plan_training(model, "v5e:2x4", {"fsdp": 8}, batch=8, length=1024, lora=Lora())
    """
    programs = _programs(model, topology, mesh, batch)
    optimizer = optax.adamw(1e-4) if optimizer is None else optimizer
    loss = answer_loss(model)  # type: ignore[arg-type]
    if lora is not None:
        base, loss = programs.params, lora.loss(loss)
        tuned = jax.eval_shape(lambda: lora.init(model, base))
    else:
        tuned, base = split(programs.params, trainable)
        tuned = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), tuned)
    state = _placed_state(tuned, optimizer, programs.mesh)
    prompts = model.abstract_batch(batch, length, images)
    ids, weights = (jax.ShapeDtypeStruct((batch, length), dtype) for dtype in (jnp.int32, jnp.float32))
    rows = place(TrainBatch(prompts, ids, weights), programs.mesh)  # type: ignore[arg-type]
    step = make_train_step(loss, optimizer, accumulate=accumulate)
    program, compiled = programs.compile(step, state, rows, base, donate=(0,))
    plan = TrainPlan(
        step=program,
        frozen_bytes=programs.bytes_of(base),
        state_bytes=programs.bytes_of(state),
        available_bytes=programs.available_bytes(),
    )
    return plan, compiled


def plan_rollouts(
    model: FamilyModel,
    topology: str,
    mesh: Mapping[str, int],
    *,
    batch: int,
    prompt: int,
    new_tokens: int,
    samples: int,
    policy: Policy,
    images: int = 1,
    full: bool = True,
) -> RolloutPlan:
    """Compiles `training.rollout` as one program for a TPU slice; arguments and errors as there and in `plan_training`.

    Example:
      found = plan_rollouts(model, "v5e:2x4", {"data": 8}, batch=8, prompt=1024, new_tokens=256, samples=8,
                            policy=vlc.VLCache(0.1))
    """
    programs = _programs(model, topology, mesh, batch)

    def run(params: Params, prompts: Batch) -> Any:
        return rollout(model, params, prompts, policy, new_tokens, samples=samples, full=full)

    rows = place(model.abstract_batch(batch, prompt, images), programs.mesh)
    return RolloutPlan(
        policy=policy.name,
        budget=policy.budget,
        program=programs.compile(run, programs.params, rows)[0],
        weight_bytes=programs.bytes_of(programs.params),
        available_bytes=programs.available_bytes(),
    )


def _fits(program: Program, available: int) -> bool:
    return program.refused is None and (program.peak_bytes or 0) <= available


def _programs(model: FamilyModel, topology: str, mesh: Mapping[str, int], batch: int) -> Programs:
    devices = tpu_devices(topology)
    if math.prod(mesh.values()) != len(devices):
        raise InputError(f"mesh {dict(mesh)} does not make up the {len(devices)} devices of {topology}: choose others")
    if batch % (over := math.prod(size for name, size in mesh.items() if name != MODEL_AXIS)):
        raise InputError(f"batch={batch} cannot be split over {over} devices (mesh {dict(mesh)}): give a multiple")
    return Programs(model, make_mesh(devices, dict(mesh)))


def _placed_state(tuned: Params, optimizer: optax.GradientTransformation, mesh: Any) -> Any:
    """The abstract train state; the optimizer's numbers lie as the parameters that they belong to."""
    tuned = place_params(tuned, mesh)
    state = jax.eval_shape(lambda params: init_state(params, optimizer), tuned)
    of_params: Any = jax.tree.structure(tuned)
    places, whole = param_shardings(tuned, mesh), NamedSharding(mesh, PartitionSpec())

    def is_like(x: Any) -> bool:
        return jax.tree.structure(x) == of_params

    return jax.tree.map(lambda x: abstract(x, mesh, places if is_like(x) else whole), state, is_leaf=is_like)
