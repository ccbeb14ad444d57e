"""Scores of a model's heads for `vlc.SparseMM`: how often a head looks at what is being written.

Pages of the demo with their right answers are run through the demo checkpoint. Where a token of an answer is predicted
that is printed in one place of the page, every query head whose largest attention lies on a patch of that place scores
1 over the number of those patches (arXiv 2506.05344, section 3.1); the scores are means over pages.

    python benchmarks/head_scores.py --output heads.json
    vlcache-jax demo --policy sparse_mm:0.1,scores=heads.json

For another model, call `hits` with its prompts, and the places that you know.
"""

import argparse
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vlcache_jax as vlc
from vlcache_jax.demo.assets import MODEL, demo_assets
from vlcache_jax.demo.data.labels import WORDS
from vlcache_jax.demo.data.samples import make_sample
from vlcache_jax.demo.data.tokenizer import prompt
from vlcache_jax.files.writing import write_text
from vlcache_jax.parallel import ops
from vlcache_jax.training.examples import add_answers


def looked_at(model: Any, params: Any, batch: vlc.Batch) -> np.ndarray:
    """The column of each row's largest attention: i32 [layers, batch, heads, length]."""

    @jax.jit
    def run(params: Any, batch: vlc.Batch) -> jax.Array:
        def attend(query, key, value, carry, _):
            out, _ = ops.attention(vlc.Kernels(), query, key, value, jnp.asarray(batch.lengths), with_lse=False)
            group = query.shape[2] // key.shape[2]
            logits = jnp.einsum("bthd,bshd->bhts", query, jnp.repeat(key, group, axis=2))
            seen = jnp.tril(jnp.ones(logits.shape[-2:], bool))[None, None]
            return out, carry, jnp.argmax(jnp.where(seen, logits, -jnp.inf), axis=-1)

        embedded = model.apply({"params": params}, batch, method="embed")
        return model.apply({"params": params}, embedded.hidden, embedded.positions, attend, method="decode")[2]

    return np.asarray(run(params, batch))


def hits(model: Any, params: Any, batch: vlc.Batch, places: list[dict[int, list[int]]]) -> np.ndarray:
    """What the heads score, f64 [layers, heads].

    Args:
      model, params: as everywhere.
      batch: prompts with their answers behind them, as `vlcache_jax.training.examples.add_answers` makes them.
      places: for each row, columns of visual tokens by the row of the prompt that predicts what they show.
    """
    found = looked_at(model, params, batch)
    scores = np.zeros((found.shape[0], found.shape[2]))
    for number, of_prompt in enumerate(places):
        for row, columns in of_prompt.items():
            scores += np.isin(found[:, number, :, row], columns) / len(columns)
    return scores / len(places)


def demo_pages(vlm: Any, first: int, count: int) -> tuple[vlc.Batch, list[dict[int, list[int]]]]:
    """Pages of the demo with the name and the value of a field as the answer, and where these are printed."""
    samples = [make_sample("documents", 0, first + i, max_questions=1) for i in range(count)]
    asked = [prompt(sample.questions[0][0], 1) for sample in samples]
    answers = [sample.questions[0][1] for sample in samples]
    prompts = vlm.processor(images=[list(sample.images) for sample in samples], text=asked)
    encode = vlm.processor.tokenizer.encode
    longest = max(len(encode(answer, False)) for answer in answers)
    batch = add_answers(vlm.processor, prompts, answers, prompts.length + longest + 1).batch
    places = []
    for row, (sample, answer) in enumerate(zip(samples, answers)):
        name = answer.split()[0]
        labels, word = sample.labels, WORDS.index(name)
        printed = [np.flatnonzero((labels.word[0] > 0) & ((labels.word[0] - 1) // 2 == word))]
        printed.append(np.flatnonzero(labels.owner[0] == 1 + word))
        column = {int(patch): at for at, patch in enumerate(prompts.vision_index[row]) if patch >= 0}
        of_row, start, of_name = {}, int(prompts.lengths[row]) - 1, len(encode(name, False))
        for token in range(len(encode(answer, False))):
            of_row[start + token] = [column[int(patch)] for patch in printed[token >= of_name]]
        places.append(of_row)
    return batch, places


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256, help="pages")
    parser.add_argument("--batch", type=int, default=32, help="pages at once")
    parser.add_argument(
        "--output", required=True, help="a file of JSON: for each layer a list of its query heads' scores"
    )
    args = parser.parse_args()
    vlm, parts = vlc.load(demo_assets(None) / MODEL, dtype="float32"), []
    for first in range(0, args.samples, args.batch):
        count = min(args.batch, args.samples - first)
        parts.append(count * hits(vlm.model, vlm.params, *demo_pages(vlm, first, count)))
    scores = np.sum(parts, axis=0) / args.samples
    write_text(args.output, json.dumps(np.round(scores, 6).tolist()) + "\n")
    for layer, heads in enumerate(scores):
        print(f"layer {layer}: " + " ".join(f"{head:.3f}" for head in heads))


if __name__ == "__main__":
    main()
