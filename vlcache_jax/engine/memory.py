"""How many rows fit: what the compiler says of an engine's own programs, and what the device says of its memory."""

import dataclasses
import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vlcache_jax.engine.buckets import Bucket
from vlcache_jax.engine.programs import Programs, ask, read_prompts
from vlcache_jax.errors import InputError
from vlcache_jax.inference.rows import Prompt, free_rows
from vlcache_jax.inputs import Batch
from vlcache_jax.parallel.mesh import on_mesh_of
from vlcache_jax.parallel.placing import placed
from vlcache_jax.typing import Params

_SPARE = 0.9  # of the memory: allocators leave gaps
_LOGITS = 4  # arrays as large as the logits of a step, of float32
_SAMPLE = 16  # rows; a mesh splits as many over its devices as it will split more


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes of one device, parameters aside.

    Attributes:
      prefill: the most that reading a micro-batch takes, its results included.
      row: of a row of the decode batch: what was kept, room for the answer, and the logits of a step.
    """

    prefill: int
    row: int

    def rows(self, available: int) -> int:
        """How many fit; may be 0."""
        return max(0, (available - self.prefill) // self.row)


def need(programs: Programs, bucket: Bucket, prefill_rows: int) -> Need:
    """What an engine needs whose largest bucket this is. Compiles its prefill, and a state of a few rows."""
    model, params = programs.model, programs.params
    batch = placed(programs.nothing(bucket, prefill_rows), params)
    options = placed(programs.options(_SAMPLE), params)
    with on_mesh_of(params):
        prefill = _memory(read_prompts.lower(model, params, batch, programs.recipe, programs.kernels))
        prompt = jax.eval_shape(partial(_asked, programs), params, batch)
        empty = _memory(free_rows.lower(model, prompt, options, _SAMPLE, programs.room, programs.top_count))
    images = sum(x.nbytes for x in jax.tree.leaves(batch))
    peak = images + prefill.temp_size_in_bytes + prefill.output_size_in_bytes
    row = empty.output_size_in_bytes // _SAMPLE
    peak += prefill_rows * row if programs.question_tokens else 0  # a copy, with questions
    return Need(peak, row + _LOGITS * 4 * prompt.logits.shape[1])


def _asked(programs: Programs, params: Params, batch: Batch) -> Prompt:
    """What rows begin with."""
    model, kernels = programs.model, programs.kernels
    prompt, _ = read_prompts(model, params, batch, programs.recipe, kernels)
    if not programs.question_tokens:
        return prompt
    of = jnp.zeros((len(prompt.logits),), jnp.int32)
    tokens = jnp.zeros((len(of), programs.question_tokens), jnp.int32)
    return ask(model, params, prompt, of, tokens, of, kernels)


def _memory(lowered: Any) -> Any:
    found = lowered.compile().memory_analysis()
    if found is None:
        raise InputError("the compiler of this platform does not tell what a program takes: give rows=")
    return found


def usual_rows() -> int:
    """The most that are taken where nobody says how many: on a CPU idle rows take as long as others."""
    return 32 if jax.default_backend() == "cpu" else 256


def available(params: object) -> int:
    """Bytes that are free on each device of the parameters; of a CPU half of what the system calls free.

    Raises:
      InputError: a device does not tell.
    """
    devices = {device for x in jax.tree.leaves(params) if isinstance(x, jax.Array) for device in x.devices()}
    devices = {device for device in devices or jax.local_devices()[:1] if device.process_index == jax.process_index()}
    found = []
    for device in devices:
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            found.append(int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0)))
        elif device.platform == "cpu" and hasattr(os, "sysconf"):
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            found.append(free // 2 // len(devices))
        else:
            raise InputError(f"{device} does not tell how much memory it has: give rows=, or memory_bytes=")
    return int(_SPARE * min(found))
