"""All configurations in order: every task's prompts once, then every method at every budget on them."""

import dataclasses
import gc
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.demo.study.answers import answer_before, answer_known, answer_recipe, images_end
from vlcache_jax.demo.study.measure import Held, Stores, held, kept_tokens, store_bytes
from vlcache_jax.demo.study.methods import FULL, Method
from vlcache_jax.demo.study.oracle import answer_attention, with_answer_attention
from vlcache_jax.demo.study.recording import Recording, Replay, record
from vlcache_jax.demo.study.results import Key, Result, ResultFile
from vlcache_jax.demo.study.tasks import EXACT, TaskData, load_task, score
from vlcache_jax.errors import PolicyError
from vlcache_jax.inference.recipe import Recipe
from vlcache_jax.inputs import TEXT, Batch
from vlcache_jax.models.io.loading import VLM
from vlcache_jax.policies import FullCache
from vlcache_jax.terminal.progress import Progress

KNOWN, BEFORE = MODES = "known", "before"
"""Modes: the question is in the prompt that is compressed; or it comes when the images have been compressed."""

PICTURED = 0.1
"""Of this budget, or of the nearest one, the kept tokens of each task's first sample are written down."""

_WORKERS = 2  # configurations at once: compiling one keeps a single core busy, and running one hardly two
_GROUP = 16  # configurations after which compiled programs may be dropped
_MAPS = Path("/proc/self/maps")
_MOST_MAPS = 30_000  # every compiled program takes memory mappings, of which Linux allows a process 65,530


class Prompts(NamedTuple):
    """A batch of prompts, and what the full cache makes of it.

    Attributes:
      batch: without its pixels, which only what has prompts said twice needs any more.
      pixels: of the batch.
      recording: what the layers computed.
      tokens: i32 [batch, n], the answers with the full cache.
      attention: f32 [layers, batch, kv_heads, length], of `answer_attention`.
      full_bytes: of the uncompressed state, for one prompt.
    """

    batch: Batch
    pixels: Any
    recording: Recording
    tokens: jax.Array
    attention: jax.Array
    full_bytes: int


class Measured(NamedTuple):
    """Of some samples under one method; JAX's arrays, or NumPy's when they are joined.

    Attributes:
      tokens: i32 [samples, n], the answers.
      lengths: i32 [samples].
      agrees: bool [samples].
      held: see `measure.Held`.
      compressed: i32 [samples], tokens of each prompt that were compressed.
      density: f32 [samples, layers].
    """

    tokens: Any
    lengths: Any
    agrees: Any
    held: Held
    compressed: Any
    density: Any


class Study:
    """Answers of one checkpoint under any policy.

    Attributes:
      vlm: the checkpoint.
      model: its model, with the prompts replayed.
    """

    def __init__(self, vlm: VLM) -> None:
        self.vlm, self.model = vlm, Replay(vlm.model)

    def prepare(self, batch: Batch, max_new_tokens: int) -> Prompts:
        """Runs a batch of prompts once, and answers it with the full cache."""
        model, params = self.vlm.model, self.vlm.params
        recording = record(model, params, batch)
        pixels = np.asarray(batch.pixels)
        batch = dataclasses.replace(batch, pixels=pixels[:, :0])
        tokens, lengths, stores, _ = answer_known(self.model, params, batch, recording, FullCache(), max_new_tokens)
        attention = answer_attention(model, params, recording, jnp.asarray(batch.lengths), tokens, lengths)
        return Prompts(batch, pixels, recording, tokens, attention, store_bytes(stores) // batch.size)

    def measure(
        self, data: TaskData, prompts: Sequence[Prompts], method: Method, budget: float, mode: str = KNOWN
    ) -> tuple[Measured, Stores]:
        """Answers of all samples under a method, and the stores of the first batch.

        Raises:
          PolicyError: the method does not know such a budget.
        """
        recipe = method.recipe(budget, self.vlm.model.spec.vision_grid or 0, data.batches[0].length)
        parts = [
            self._of_batch(some, batch, method, recipe, mode, data.max_new_tokens)
            for some, batch in zip(prompts, data.batches, strict=True)
        ]
        joined = jax.tree.map(
            lambda *x: np.concatenate(list(map(np.asarray, x)))[: data.samples], *(p for p, _ in parts)
        )
        return joined, parts[0][1]

    def _of_batch(
        self, some: Prompts, whole: Batch, method: Method, recipe: Recipe, mode: str, max_new_tokens: int
    ) -> tuple[Measured, Stores]:
        batch, attention, policy = some.batch, some.attention, recipe.policy
        shown = with_answer_attention(some.recording, attention) if method.needs_answer else some.recording
        ask: Any = answer_known
        if policy.repeats:
            batch = dataclasses.replace(batch, pixels=some.pixels)
        compressed = np.asarray(batch.lengths)
        if mode == BEFORE:
            end = images_end(batch)
            ask, compressed, attention = answer_before, np.full(batch.size, end), attention[..., :end]
        if method.replays:
            answers = ask(self.model, self.vlm.params, batch, shown, policy, max_new_tokens)
        else:
            answers = answer_recipe(self.vlm.model, self.vlm.params, whole, recipe, max_new_tokens)
        tokens, lengths, stores, density = answers
        agrees = jnp.all(tokens == some.tokens, axis=1)
        return Measured(tokens, lengths, agrees, held(stores, compressed, attention), compressed, density), stores


def run_study(
    vlm: VLM,
    file: ResultFile,
    *,
    tasks: Sequence[str],
    methods: Sequence[Method],
    budgets: Sequence[float],
    samples: int,
    batch_size: int,
    modes: Sequence[str],
    progress: Progress,
) -> None:
    """Measures every configuration that the file does not hold yet.

    Args:
      vlm: the checkpoint.
      file: results are appended to it as they come.
      tasks: of the demo.
      methods: besides the full cache, which is always measured.
      budgets: fractions. At 1 every method is the full cache, which is measured once.
      samples: of each task.
      batch_size: prompts answered together at most.
      modes: with the question `KNOWN` when the prompt is compressed, or compressed `BEFORE` it is known.
      progress: gets a line for each configuration.
    """
    study = Study(vlm)
    grid = [
        (method, budget, mode)
        for mode in modes
        for method in methods
        if mode == KNOWN or method.before
        for budget in budgets  # last, so that workers do not compile the same decoding program at once
        if budget < 1
    ]
    pictured = min((b for b in budgets if b < 1), key=lambda b: abs(b - PICTURED), default=None)
    pending = {task: _pending(file, task, grid) for task in tasks}
    left = sum(map(len, pending.values()))
    for task in tasks:
        if not pending[task]:
            progress.note(f"{task}: measured before")
            continue
        progress.step(f"{task}: drawing {samples} samples")
        data = load_task(vlm, task, samples, batch_size)
        progress.step(f"{task}: running the prompts through the model")
        prompts = [study.prepare(batch, data.max_new_tokens) for batch in data.batches]
        progress.step(f"{task}: measuring methods and budgets", total=len(pending[task]))
        measure = partial(_measured, study, data, prompts)
        with ThreadPoolExecutor(_WORKERS) as pool:
            for some in (pending[task][i : i + _GROUP] for i in range(0, len(pending[task]), _GROUP)):
                for (method, budget, mode), outcome in zip(some, pool.map(measure, some)):
                    left -= 1
                    progress.advance()
                    if isinstance(outcome, PolicyError):
                        progress.note(f"{task} {method.name} {budget:g}: left out, {outcome}")
                        continue
                    result, kept = outcome
                    if budget == pictured and mode == KNOWN:
                        file.add_kept(task, method.name, budget, **kept)
                    file.add(result)  # last: a configuration without its result is measured again
                    progress.note(f"{_line(result)}; {left} to go")
                _free_programs()
        del prompts


Configuration = tuple[Method, float, str]  # method, budget, mode


def _pending(file: ResultFile, task: str, grid: list[Configuration]) -> list[Configuration]:
    wanted = [(Method(FULL), 1.0, KNOWN), *grid]
    return [item for item in wanted if Key(task, item[0].name, item[1], item[2]) not in file.results]


def _measured(
    study: Study, data: TaskData, prompts: Sequence[Prompts], item: Configuration
) -> tuple[Result, dict[str, Any]] | PolicyError:
    """A configuration's result and what its first sample kept; or why there is none."""
    method, budget, mode = item
    begun = time.monotonic()
    try:
        measured, stores = study.measure(data, prompts, method, budget, mode)
    except PolicyError as error:
        return error
    kept, texts = measured.held.kept / measured.compressed[:, None], study.vlm.processor.decode(measured)
    result = Result(
        key=Key(data.name, method.name, budget, mode),
        exact=EXACT(texts, data.answers),
        score=score(data.name, texts, data.answers),
        agrees=measured.agrees.astype(np.float64),
        mass=np.asarray(measured.held.mass),
        hits=np.asarray(measured.held.hits),
        kept=np.asarray(kept.mean(axis=1)),
        layers=np.asarray(kept.mean(axis=0)),
        density=measured.density.mean(axis=0),
        state_bytes=store_bytes(stores) // prompts[0].batch.size,
        full_bytes=prompts[0].full_bytes,
        seconds=time.monotonic() - begun,
    )
    return result, _first_kept(stores, prompts[0]) | {"answer": texts[0]}


def _first_kept(stores: Stores, prompts: Prompts) -> dict[str, Any]:
    """Which visual tokens the first sample kept: for each layer a digit for every one of them, 9 where all KV heads
    kept it and 0 where none did; and the number of text tokens."""
    _, _, kv_heads, length = prompts.attention.shape
    kept = np.asarray(kept_tokens(stores, length, kv_heads))[:, 0]  # [layers, kv_heads, length]
    visual = np.asarray(prompts.batch.vision_index)[0] != TEXT
    digits = np.round(9 * kept[..., visual].mean(axis=1)).astype(int)
    return {
        "layers": ["".join(map(str, layer)) for layer in digits],
        "text": [round(float(x), 2) for x in kept[..., ~visual].sum(axis=2).mean(axis=1)],
    }


def _line(result: Result) -> str:
    key = result.key
    return (
        f"{key.task} {key.method} {key.budget:g}{'' if key.mode == KNOWN else f' {key.mode}'}: exact match "
        f"{result.exact.mean():.3f}, score {result.score.mean():.3f}, agrees {result.agrees.mean():.3f}, "
        f"{result.seconds:.1f} s"
    )


def _free_programs() -> None:
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()
        gc.collect()
