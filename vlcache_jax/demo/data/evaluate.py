"""How well a checkpoint answers the demo's held-out questions under a cache policy."""

from typing import NamedTuple

from vlcache_jax.demo.data.samples import FULL_GRID, make_sample
from vlcache_jax.demo.data.tokenizer import prompt
from vlcache_jax.evaluation.metrics import anls, exact_match
from vlcache_jax.inference.generate import generate
from vlcache_jax.models.io.loading import VLM
from vlcache_jax.policies import Policy

HELD_OUT_SEED = 1_000_003
"""Of the samples that evaluation draws; training never uses it."""


class Score(NamedTuple):
    """Means over samples, in [0, 1], and how many there were."""

    exact_match: float
    anls: float
    samples: int


def evaluate_demo(
    vlm: VLM,
    task: str,
    policy: Policy,
    *,
    samples: int = 256,
    batch_size: int = 32,
    grid: int = FULL_GRID,
    max_new_tokens: int = 24,
    seed: int = HELD_OUT_SEED,
) -> Score:
    """Greedy answers to the first question of `samples` held-out samples of a task.

    Args:
      vlm: a loaded checkpoint that takes images of `grid` patches.
      task: see `vlcache_jax.demo.data.samples.TASKS`.
      policy: what the cache keeps.
      samples: how many.
      batch_size: prompts answered together.
      grid: patches along a side of the images.
      max_new_tokens: the longest answer.
      seed: of the data set.
    """
    exact = similar = 0.0
    for start in range(0, samples, batch_size):
        rows = [
            make_sample(task, seed, start + i, grid, max_questions=1) for i in range(min(batch_size, samples - start))
        ]
        batch = vlm.processor(
            images=[list(row.images) for row in rows],
            text=[prompt(row.questions[0][0], len(row.images)) for row in rows],
        )
        texts = vlm.processor.decode(generate(vlm.model, vlm.params, batch, policy, max_new_tokens))
        for row, text in zip(rows, texts, strict=True):
            answer = row.questions[0][1]
            exact += exact_match(text, answer)
            # These answers start with the name asked for, which is no merit: only what follows counts here.
            skip = 1 if task in ("documents", "document_pairs", "places") else 0
            similar += anls(" ".join(text.split()[skip:]), " ".join(answer.split()[skip:]))
    return Score(exact / samples, similar / samples, samples)
