"""All configurations in order: every task's prompts once, then every method at every budget on them."""

import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.batch import TEXT, Batch
from vlcache_jax.errors import PolicyError
from vlcache_jax.generation import decode
from vlcache_jax.loading import VLM
from vlcache_jax.models.cpu_layout import cpu_layout
from vlcache_jax.policies import FullCache, Policy
from vlcache_jax.prefill import prefill
from vlcache_jax.state import KVState
from vlcache_jax.study.measure import Held, held, kept_tokens, state_bytes
from vlcache_jax.study.methods import FULL, Method
from vlcache_jax.study.oracle import answer_attention, with_answer_attention
from vlcache_jax.study.recording import Recording, Replay, record
from vlcache_jax.study.results import Key, Result, ResultFile
from vlcache_jax.study.tasks import EXACT, TaskData, load_task, score

KNOWN = "known"  # mode: the question is in the prompt that is compressed

PICTURED = 0.1
"""Of this budget, or of the nearest one, the kept tokens of each task's first sample are written down."""

_MAPS = Path("/proc/self/maps")
_MOST_MAPS = 30_000  # every compiled program takes memory mappings, of which Linux allows a process 65,530


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A batch of prompts, and what the full cache makes of it.

    Attributes:
      batch: without its pixels, which nothing needs any more.
      recording: what the layers computed.
      tokens: i32 [batch, n], the answers with the full cache.
      token_lengths: i32 [batch].
      attention: f32 [layers, batch, kv_heads, length], of `answer_attention`.
      full: the uncompressed state.
    """

    batch: Batch
    recording: Recording
    tokens: jax.Array
    token_lengths: jax.Array
    attention: jax.Array
    full: KVState


@dataclasses.dataclass(frozen=True)
class Answers:
    """What `VLM.processor.decode` takes: tokens i32 [batch, n], lengths i32 [batch]."""

    tokens: jax.Array
    lengths: jax.Array


class Study:
    """Answers of one checkpoint under any policy.

    Attributes:
      vlm: the checkpoint.
      params: of `Replay`, but for the recording.
    """

    def __init__(self, vlm: VLM) -> None:
        on_cpu = jax.default_backend() == "cpu"
        self.vlm = vlm
        self.model = Replay(vlm.model)
        self.params = cpu_layout(vlm.params) if on_cpu else vlm.params

    @property
    def grid_side(self) -> int:
        """Patches along a side of an image."""
        return self.vlm.config.vision.grid_size

    def prepare(self, batch: Batch, max_new_tokens: int) -> Prompts:
        """Runs a batch of prompts once, and answers it with the full cache."""
        recording = record(self.vlm.model, self.params, batch)
        batch = dataclasses.replace(batch, pixels=np.asarray(batch.pixels)[:, :0])
        tokens, lengths, state = self.answer_known(batch, recording, FullCache(), max_new_tokens)
        attention = answer_attention(
            self.vlm.model, self.params, recording, jnp.asarray(batch.lengths), tokens, lengths
        )
        return Prompts(batch, recording, tokens, lengths, attention, state)

    def answer_known(
        self, batch: Batch, recording: Recording, policy: Policy, max_new_tokens: int
    ) -> tuple[jax.Array, jax.Array, KVState]:
        """Answers with a cache that was compressed with the question in the prompt.

        Returns:
          (tokens i32 [batch, max_new_tokens], lengths i32 [batch], the state as prefill returned it); the tokens are
          those of `generate`.
        """
        params = {"model": self.params, "recording": recording}
        logits, state = prefill(self.model, params, batch, policy, max_new_tokens)
        tokens, lengths = decode(self.model, params, logits, state, max_new_tokens)
        return tokens, lengths, state

    def measure(self, data: TaskData, prompts: Sequence[Prompts], method: Method, budget: float) -> "Measured":
        """Answers of all samples under a method.

        Raises:
          PolicyError: the method does not know such a budget.
        """
        policy = method.policy(budget, self.grid_side)
        parts = []
        for some in prompts:
            recording = some.recording
            if method.needs_answer:
                recording = with_answer_attention(recording, some.attention)
            tokens, lengths, state = self.answer_known(some.batch, recording, policy, data.max_new_tokens)
            agrees = jnp.all(tokens == some.tokens, axis=1)
            parts.append((tokens, lengths, agrees, held(state, some.attention), state))
        return Measured.join(self.vlm, data, prompts, parts)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of all samples of a task under one method; arrays [samples].

    Attributes:
      texts: the answers.
      agrees: bool.
      held: see `measure.Held`, as NumPy arrays.
      lengths: of the prompts.
      density: f32 [samples, layers].
      bytes: of the state, for one prompt.
      first: the state of the first batch.
    """

    texts: list[str]
    agrees: np.ndarray
    held: Held
    lengths: np.ndarray
    density: np.ndarray
    bytes: int
    first: KVState

    @classmethod
    def join(cls, vlm: VLM, data: TaskData, prompts: Sequence[Prompts], parts: list[tuple[Any, ...]]) -> "Measured":
        """Joins batches and drops what fills up the last one."""
        texts = [text for tokens, lengths, *_ in parts for text in vlm.processor.decode(Answers(tokens, lengths))]
        n = data.samples

        def joined(arrays: list[Any]) -> np.ndarray:
            return np.concatenate([np.asarray(x) for x in arrays])[:n]

        first = parts[0][4]
        return cls(
            texts=texts[:n],
            agrees=joined([part[2] for part in parts]),
            held=Held(*(joined([getattr(part[3], name) for part in parts]) for name in ("mass", "hits", "kept"))),
            lengths=joined([some.batch.lengths for some in prompts]),
            density=joined([part[4].allocation.density for part in parts]),
            bytes=state_bytes(first) // len(np.asarray(prompts[0].batch.lengths)),
            first=first,
        )


def run_study(
    vlm: VLM,
    file: ResultFile,
    *,
    tasks: Sequence[str],
    methods: Sequence[Method],
    budgets: Sequence[float],
    samples: int,
    batch_size: int = 50,
    log: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
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
      log: gets a line for each configuration.
    """
    study = Study(vlm)
    grid = [(method, budget) for budget in budgets if budget < 1 for method in methods]
    pictured = min((b for b in budgets if b < 1), key=lambda b: abs(b - PICTURED), default=None)
    progress = _Progress(log)
    pending = {task: _pending(file, task, grid) for task in tasks}
    progress.left = sum(map(len, pending.values()))
    for task in tasks:
        if not pending[task]:
            log(f"{task}: done before")
            continue
        start = time.monotonic()
        data = load_task(vlm, task, samples, batch_size)
        drawn = time.monotonic()
        prompts = [study.prepare(batch, data.max_new_tokens) for batch in data.batches]
        log(f"{task}: {samples} samples drawn in {drawn - start:.0f} s, run in {time.monotonic() - drawn:.0f} s")
        for method, budget in pending[task]:
            begun = time.monotonic()
            try:
                measured = study.measure(data, prompts, method, budget)
            except PolicyError as error:
                progress.skip(f"{task} {method.name} {budget:g}: left out, {error}")
                continue
            key = Key(task, method.name, budget, KNOWN)
            result = _result(key, data, measured, state_bytes(prompts[0].full) // prompts[0].batch.size, begun)
            file.add(result)
            if budget == pictured:
                _picture(file, key, measured, prompts[0])
            progress.step(result)
            _free_programs()
        del prompts


def _pending(file: ResultFile, task: str, grid: list[tuple[Method, float]]) -> list[tuple[Method, float]]:
    wanted = [(Method(FULL), 1.0), *grid]
    return [(method, budget) for method, budget in wanted if Key(task, method.name, budget, KNOWN) not in file.results]


def _result(key: Key, data: TaskData, measured: Measured, full_bytes: int, begun: float) -> Result:
    kept = measured.held.kept / measured.lengths[:, None]
    return Result(
        key=key,
        exact=EXACT(measured.texts, data.answers),
        score=score(data.name, measured.texts, data.answers),
        agrees=measured.agrees.astype(np.float64),
        mass=np.asarray(measured.held.mass),
        hits=np.asarray(measured.held.hits),
        kept=kept.mean(axis=1),
        layers=kept.mean(axis=0),
        density=measured.density.mean(axis=0),
        state_bytes=measured.bytes,
        full_bytes=full_bytes,
        seconds=time.monotonic() - begun,
    )


def _picture(file: ResultFile, key: Key, measured: Measured, prompts: Prompts) -> None:
    """Writes down which visual tokens the first sample kept: for each layer a digit for every one of them, 9 for all
    KV heads and 0 for none."""
    _, _, kv_heads, length = prompts.attention.shape
    kept = np.asarray(kept_tokens(measured.first, length, kv_heads))[:, 0]  # [layers, kv_heads, length]
    visual = np.asarray(prompts.batch.vision_index)[0] != TEXT
    digits = np.round(9 * kept[..., visual].mean(axis=1)).astype(int)
    file.add_kept(
        key.task,
        key.method,
        key.budget,
        layers=["".join(map(str, layer)) for layer in digits],
        text=[round(float(x), 2) for x in kept[..., ~visual].sum(axis=2).mean(axis=1)],
        answer=measured.texts[0],
    )


def _free_programs() -> None:
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()
        gc.collect()


class _Progress:
    """One line for each configuration, with the time that is left."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self.log, self.left, self.done = log, 0, 0
        self._start = time.monotonic()

    def step(self, result: Result) -> None:
        """A configuration has been measured."""
        self.left -= 1
        self.done += 1
        key, seconds = result.key, (time.monotonic() - self._start) / self.done * self.left
        self.log(
            f"{key.task} {key.method} {key.budget:g}: exact match {result.exact.mean():.3f}, "
            f"score {result.score.mean():.3f}, agrees {result.agrees.mean():.3f}, {result.seconds:.1f} s; "
            f"{self.left} to go, about {seconds / 60:.0f} min"
        )

    def skip(self, text: str) -> None:
        """A configuration cannot be measured."""
        self.left -= 1
        self.log(text)
