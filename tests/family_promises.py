"""The promises of the cache (`test_promises.py`) over a checkpoint of any family, from its pictures on: what its
positions, windows, blocks of images, deepstack and buckets of patches might break."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from stub_model import kept_sets

import vlcache_jax as vlc
from vlcache_jax.models.processor import Processor

NEW = 6
POLICY = vlc.VLCache(budget=0.4)


class Programs:
    """Prefill and decoding of one policy, which count how often they are traced."""

    def __init__(self, model, policy=POLICY):
        self.traced = []

        def start(params, batch):
            self.traced.append("prefill")
            return vlc.prefill(model, params, batch, policy).start(NEW)

        def answer(params, logits, state):
            self.traced.append("decode")
            return vlc.decode(model, params, logits, state, NEW, eos_token_ids=[])[0]

        self.start, self.answer = jax.jit(start), jax.jit(answer)

    def run(self, params, batch):
        """(what each row keeps, its answer, logits, state)."""
        logits, state = self.start(params, batch)
        kept = np.asarray(kept_sets(state), object).swapaxes(0, 1)  # [rows, layers, heads], of lists
        return kept.tolist(), np.asarray(self.answer(params, logits, state)), logits, state


def batches(processor: Processor, images, texts, *orders):
    """Batches of some of the prompts, in different orders, of one shape."""
    sizes = processor.measure(images, texts)
    rooms = {"pad_to": max(s.bucket[0] for s in sizes), "pad_tiles_to": max(s.bucket[1] for s in sizes)}
    return [processor(images=[images[i] for i in order], text=[texts[i] for i in order], **rooms) for order in orders]


def check(vlm, images, texts):
    """One program for each half; a row does the same beside other rows; free slots are never read.

    Prompt 1 has several images, prompt 2 none.
    """
    programs = Programs(vlm.model)
    one, other = batches(vlm.processor, images, texts, (1, 2, 0), (3, 1, 2))
    kept, answers, logits, state = programs.run(vlm.params, one)
    kept_there, answers_there, *_ = programs.run(vlm.params, other)
    for row, row_there in ((0, 1), (1, 2)):
        assert kept[row] == kept_there[row_there]
        np.testing.assert_array_equal(answers[row], answers_there[row_there])
    assert len({tuple(map(tuple, x)) for x in kept[0]}) > 1  # layers keep different tokens

    free = (state.context.positions < 0)[..., None]
    assert bool(jnp.any(free))
    keys, values = (jnp.where(free, jnp.nan, x) for x in (state.context.keys, state.context.values))
    poisoned = dataclasses.replace(
        state,
        context=dataclasses.replace(state.context, keys=keys, values=values),
        tail=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if x.ndim == 4 else x, state.tail),
    )
    np.testing.assert_array_equal(programs.answer(vlm.params, logits, poisoned), answers)
    assert programs.traced == ["prefill", "decode"]


def check_rows_alone_and_budget_one(vlm, images, texts):
    """A prompt in a batch of one, in the smallest buckets that hold it, too; a budget of 1 is no compression."""
    programs = Programs(vlm.model)
    (batch,) = batches(vlm.processor, images, texts, range(len(texts)))
    kept, answers, *_ = programs.run(vlm.params, batch)
    for row, (of_row, text) in enumerate(zip(images, texts)):
        for alone in (batches(vlm.processor, images, texts, (row,))[0], vlm.processor([of_row], [text])):
            kept_alone, answer, *_ = programs.run(vlm.params, alone)
            assert kept_alone[0] == kept[row]
            np.testing.assert_array_equal(answer[0], answers[row])
    whole, full = (
        Programs(vlm.model, policy).run(vlm.params, batch)
        for policy in (dataclasses.replace(POLICY, budget=1.0), vlc.FullCache())
    )
    assert whole[0] == full[0]
    jax.tree.map(np.testing.assert_array_equal, whole[1:], full[1:])
