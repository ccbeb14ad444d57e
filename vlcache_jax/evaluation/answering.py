"""Answering a batch in two timed steps, prefill and decoding."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from PIL.Image import Image

from vlcache_jax.evaluation.stopwatch import Stopwatch
from vlcache_jax.explain.pictures import Kept, explain, kept_by_layer
from vlcache_jax.inference.decode import decode, stream_decode
from vlcache_jax.inference.prefill import prefill
from vlcache_jax.inference.recipe import Recipe, recipe_of
from vlcache_jax.inference.report import Report
from vlcache_jax.inference.sampling import Sampling
from vlcache_jax.inputs import Batch
from vlcache_jax.models.io.loading import VLM
from vlcache_jax.models.text.arguments import Visual
from vlcache_jax.policies import Policy
from vlcache_jax.terminal.progress import Progress


@dataclasses.dataclass(frozen=True)
class Answers:
    """The answers of a batch.

    Attributes:
      tokens: i32 [rows, max_new_tokens].
      lengths: i32 [rows].
      report: what was kept, and what it cost.
      kept: for each row what `kept_by_layer` returns.
      seconds: "compile" (of everything), "prefill" and "decode".
    """

    tokens: np.ndarray
    lengths: np.ndarray
    report: Report
    kept: list[Kept]
    seconds: dict[str, float]

    def picture(self, vlm: VLM, images: Sequence[Visual], batch: Batch, question: str, answer: str) -> Image:
        """See `explain`; of the first row, whose images, question and answer these are."""
        kept, layout = self.kept[0], vlm.processor.layout
        return explain(images, batch, kept, self.report, layout, question=question, answer=answer)

    def costs(self) -> dict[str, Any]:
        """Bytes of the buffers, and seconds."""
        report = self.report
        return {
            "state_bytes": report.state_bytes,
            "tail_bytes": report.tail_bytes,
            "held_bytes": report.held_bytes,
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
        }


def answer(
    vlm: VLM,
    batch: Batch,
    recipe: Policy | Recipe,
    max_new_tokens: int,
    progress: Progress,
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    on_token: Callable[[int], None] | None = None,
) -> Answers:
    """Answers a batch as `generate` does, and keeps what a picture needs.

    Args:
      vlm: the loaded checkpoint.
      batch: prompts.
      recipe: what to keep, to look at and to drop.
      max_new_tokens: answers are cut there.
      progress: gets two steps.
      sampling: None for greedy decoding.
      seed: of the sampling.
      on_token: called with each token as it comes; for a batch of one row.
    """
    model, params, name = vlm.model, vlm.params, recipe_of(recipe).title
    prompts = "1 prompt" if batch.size == 1 else f"{batch.size} prompts"
    progress.step(f"{name}: reading {prompts} of {batch.length} tokens (compiled in the first run)")
    with Stopwatch() as of_prefill:
        ctx = prefill(model, params, batch, recipe)
        logits, state = jax.block_until_ready(ctx.start(max_new_tokens))
    report = ctx.report.of_answers(state)
    kept = [kept_by_layer(ctx, row) for row in range(batch.size)]
    progress.step(f"{name}: answering")
    if on_token is not None:
        progress.close()  # tokens are printed as they come
    with Stopwatch() as of_decode:
        if on_token is None:
            decoded = decode(model, params, logits, state, max_new_tokens, sampling=sampling, seeds=seed)
            tokens, lengths = map(np.asarray, decoded)
        else:
            ids = []
            for step in stream_decode(model, params, logits, state, max_new_tokens, sampling=sampling, seeds=seed):
                ids.append(int(step[0]))
                on_token(ids[-1])
            tokens, lengths = np.asarray([ids], np.int32), np.asarray([len(ids)], np.int32)
    seconds = {"compile": of_prefill.compile + of_decode.compile, "prefill": of_prefill.run, "decode": of_decode.run}
    return Answers(tokens, lengths, report, kept, seconds)
