"""The programs of a run, compiled from shapes: the ones that `generate` runs, not models of them."""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vlcache_jax.cache.state import KVState
from vlcache_jax.inference.decode import decode
from vlcache_jax.inference.decode_step import decode_step
from vlcache_jax.inference.prefill import prefill
from vlcache_jax.inference.recipe import Recipe
from vlcache_jax.inputs import Batch
from vlcache_jax.kernels.dispatch import implementations
from vlcache_jax.models.coding import CODED
from vlcache_jax.models.families.family import FamilyModel
from vlcache_jax.planning.compiling import abstract, compile_on
from vlcache_jax.planning.placement import place, place_params
from vlcache_jax.policies.policy import Policy
from vlcache_jax.typing import Params

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What is asked of a model.

    Attributes:
      batch: prompts at once.
      prompt: their padded length, visual tokens included.
      new_tokens: room for generated tokens.
      tiles: image tiles of each prompt that go through the vision tower.
    """

    batch: int
    prompt: int
    new_tokens: int
    tiles: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What the compiler says about one program, in bytes of one device.

    Attributes:
      argument_bytes: its arguments: parameters and batch, or parameters and state.
      output_bytes: its results; those that take the memory of an argument count in `alias_bytes` too.
      alias_bytes: results that take the memory of a donated argument.
      temporary_bytes: everything else it needs while it runs.
      peak_bytes: the most memory in use at any moment, arguments included.
      compile_seconds: of tracing, lowering and compiling.
      implementations: how each op runs, and why not by a better implementation: "append=pallas_tpu",
        "attention=xla_wide <splash_tpu: the reason>".
      refused: None, or the compiler's reason for not compiling it: then the other numbers are None, except the peak
        where the reason names it.
    """

    argument_bytes: int | None = None
    output_bytes: int | None = None
    alias_bytes: int | None = None
    temporary_bytes: int | None = None
    peak_bytes: int | None = None
    compile_seconds: float
    implementations: tuple[str, ...] = ()
    refused: str | None = None

    @property
    def out_of_memory(self) -> bool:
        """Whether it was refused because it does not fit in a device's memory."""
        return self.refused is not None and self.refused.startswith("RESOURCE_EXHAUSTED")


class Programs:
    """The programs of one model on one mesh.

    Args:
      model: the model; no parameters are made.
      mesh: of described devices, with the axes "data" and "model".
    """

    def __init__(self, model: FamilyModel, mesh: Mesh) -> None:
        self.model, self.mesh = model, mesh

        def stored(path: Any, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return x if path[-1].key in CODED else jax.ShapeDtypeStruct(x.shape, model.dtype)

        self.params: Params = place_params(jax.tree_util.tree_map_with_path(stored, model.abstract_params()), mesh)

    def prefill(self, work: Workload, policy: Policy | Recipe) -> tuple[Program, Any]:
        """`prefill` and room for answers, the state split over devices; with the compiled program."""
        run = self._prefill(work, policy)
        state = self.state(work, policy)
        shardings = (None, jax.tree.map(lambda x: x.sharding, state))
        return self.compile(run, self.params, self._batch(work), out_shardings=shardings)

    def decode_step(self, work: Workload, policy: Policy | Recipe) -> tuple[Program, Any]:
        """`vlcache_jax.decode_step`, with the state donated."""
        tokens = place(jax.ShapeDtypeStruct((work.batch,), jnp.int32), self.mesh)
        state = self.state(work, policy)

        def step(params: Params, tokens: jax.Array, state: KVState) -> Any:
            return decode_step(self.model, params, tokens, state)

        shardings = (None, jax.tree.map(lambda x: x.sharding, state))
        return self.compile(step, self.params, tokens, state, donate=(2,), out_shardings=shardings)

    def decode(self, work: Workload, policy: Policy | Recipe) -> tuple[Program, Any]:
        """`vlcache_jax.decode`: the whole loop of `generate`, greedy. The state stays valid, so its tail is copied."""
        logits, _ = self._outputs(work, policy)

        def loop(params: Params, logits: jax.Array, state: KVState) -> Any:
            return decode(self.model, params, logits, state, work.new_tokens)

        return self.compile(loop, self.params, place(logits, self.mesh), self.state(work, policy))

    def state(self, work: Workload, policy: Policy | Recipe) -> KVState:
        """The abstract state that the prefill makes."""
        return place(self._outputs(work, policy)[1], self.mesh)

    def bytes_of(self, tree: Any) -> int:
        """Bytes of arrays on one device, in the compiler's layouts (tiles may be padded)."""
        compiled = compile_on(self.mesh, lambda _: jnp.int32(0), tree, keep_unused=True)
        return compiled.memory_analysis().argument_size_in_bytes

    def available_bytes(self) -> int:
        """Memory of one device that programs may use: what the compiler names when it refuses one that is too large."""
        too_large = abstract(jax.ShapeDtypeStruct((2**13, 2**30), jnp.int8), self.mesh)
        program, _ = self.compile(lambda x: x + 1, too_large)
        found = re.search(r"available HBM \(([\d.]+)([KMGT]?)\)|of ([\d.]+)([KMGT]?) hbm", program.refused or "")
        if found is None:
            raise RuntimeError(f"the TPU compiler does not name the memory of a device: {program.refused!r}")
        return _bytes(*[group for group in found.groups() if group is not None])

    def _prefill(self, work: Workload, policy: Policy | Recipe) -> Callable[..., Any]:
        def run(params: Params, batch: Batch) -> Any:
            return prefill(self.model, params, batch, policy).start(work.new_tokens)

        return run

    def _outputs(self, work: Workload, policy: Policy | Recipe) -> tuple[jax.ShapeDtypeStruct, KVState]:
        with jax.set_mesh(self.mesh):
            return jax.eval_shape(self._prefill(work, policy), self.params, self._batch(work))

    def _batch(self, work: Workload) -> Batch:
        return place(self.model.abstract_batch(work.batch, work.prompt, work.tiles), self.mesh)

    def compile(self, function: Callable[..., Any], *args: Any, **options: Any) -> tuple[Program, Any]:
        """(what the compiler says of a program of abstract arrays, the program or None); options of `compile_on`."""
        start = time.monotonic()
        try:
            # Decoding uses no vision tower, yet it stays where it is.
            compiled = compile_on(self.mesh, function, *args, keep_unused=True, **options)
        except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
            message, seconds = str(error), time.monotonic() - start
            refused = message.strip().splitlines()[0]
            return Program(compile_seconds=seconds, refused=refused, peak_bytes=_needed(message)), None
        memory = compiled.memory_analysis()
        program = Program(
            argument_bytes=memory.argument_size_in_bytes,
            output_bytes=memory.output_size_in_bytes,
            alias_bytes=memory.alias_size_in_bytes,
            temporary_bytes=memory.temp_size_in_bytes,
            peak_bytes=memory.peak_memory_in_bytes,
            compile_seconds=time.monotonic() - start,
            implementations=implementations(compiled.as_text()),
        )
        return program, compiled


def _needed(message: str) -> int | None:
    """The memory a program would have needed, where the compiler's message names it."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of", message)
    return _bytes(*found.groups()) if found else None


def _bytes(number: str, unit: str = "") -> int:
    return math.floor(float(number) * _UNITS[unit])
