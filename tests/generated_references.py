"""Decoding with the rules of `policies/generated.py`, once more in plain numpy and Python, from their definitions.

A cache is a list of positions for every layer and KV head; a step attends to the listed tokens, in float64.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import method_references as reference
import numpy as np
from stub_model import HEAD_DIM, HEADS, KV_HEADS, LAYERS, StubModel, stub_batch

import vlcache_jax as vlc

GROUP = HEADS // KV_HEADS


@dataclasses.dataclass(frozen=True)
class ScriptedModel(StubModel):
    """The queries, keys and values of answers, too, are its parameters: those at a token's position.

    Its parameters are [layers, batch, prompt and answer, heads, d], without gaps for padding: a row's answer starts at
    its own length. Its logits are the attention outputs of all layers, [batch, layers * heads * d].
    """

    windows: tuple[int | None, ...] = ()

    @property
    def spec(self):
        return dataclasses.replace(super().spec, windows=self.windows)

    def embed_tokens(self, params, tokens):
        return jnp.zeros((*tokens.shape, 1))

    def decode(self, params, hidden, positions, attend, carry=None, xs=None):
        def layer(carry, item):
            qkv, x = item
            query, key, value = (jnp.take_along_axis(y, positions[..., None, None], axis=1) for y in qkv)
            out, carry, ys = attend(query, key, value, carry, x)
            return carry, (out, ys)

        xs = ((params["query"], params["key"], params["value"]), xs)
        carry, (out, ys) = jax.lax.scan(layer, carry, xs)
        return jnp.moveaxis(out, 0, 2).reshape(*positions.shape, -1), carry, ys  # layers, heads, d

    def unembed(self, params, hidden):
        return hidden.astype(jnp.float32)


def scripted_params(batch, steps, seed=0, dtype="float32"):
    """Random queries, keys and values; layers differ in sharpness, keys in norm, so that scores are far apart."""
    rng = np.random.default_rng(seed)
    sharp = np.array([0.4, 0.8, 1.6])[:, None, None, None, None]

    def draw(heads):
        return rng.normal(size=(LAYERS, batch.size, batch.length + steps, heads, HEAD_DIM))

    key = draw(KV_HEADS) * rng.uniform(0.5, 2, size=(LAYERS, batch.size, batch.length + steps, KV_HEADS, 1))
    return {k: v.astype(dtype) for k, v in {"query": sharp * draw(HEADS), "key": key, "value": draw(KV_HEADS)}.items()}


@functools.cache
def program(policy, steps, windows=()):
    """(params, batch, poison=False) -> (logits [steps, batch, ...], state after prefill, last state), compiled once.

    `poison` fills all free slots with NaN.
    """
    model = ScriptedModel(windows=windows)

    @jax.jit
    def run(params, batch, poison=False):
        _, first = vlc.prefill(model, params, batch, policy).start(steps)
        bad = jnp.where(poison, jnp.nan, 0)
        free = (first.context.positions < 0)[..., None]
        context = {x: jnp.where(free, bad, getattr(first.context, x)) for x in ("keys", "values")}
        tail = {x: jnp.full_like(getattr(first.tail, x), bad) for x in ("keys", "values")}
        first = dataclasses.replace(
            first,
            context=dataclasses.replace(first.context, **context),
            tail=dataclasses.replace(first.tail, **tail),
        )

        def step(state, _):
            logits, state = vlc.decode_step(model, params, jnp.zeros(batch.size, jnp.int32), state)
            return state, logits

        last, out = jax.lax.scan(step, first, length=steps)
        return out, first, last

    return run


def ragged(length=40, seed=0):
    """`stub_batch` without the row of three tokens."""
    batch = stub_batch(length, seed)
    return jax.tree.map(lambda x: x[:4], batch)


class Row:
    """One row of a batch: what it knows of itself."""

    def __init__(self, batch, params, row):
        self.n = int(batch.lengths[row])
        self.q, self.k, self.v = (np.asarray(params[x][:, row], np.float64) for x in ("query", "key", "value"))
        cut = {x: np.asarray(params[x][:, row, : self.n], np.float64) for x in ("query", "key", "value")}
        self.prompt = reference.Prompt(**cut, index=batch.vision_index[row, : self.n])

    def attend(self, layer, head, position, cache):
        """(probabilities [group, len(cache)], outputs [group, d]) of the token at `position` over a list of tokens."""
        query = self.q[layer, position, head * GROUP : (head + 1) * GROUP]
        weights = reference.softmax(query @ self.k[layer, cache, head].T / np.sqrt(HEAD_DIM))
        return weights, weights @ self.v[layer, cache, head]


@dataclasses.dataclass
class Simulation:
    """Outputs [steps, layers * heads * d] and the caches [layer][head] after every step, as sorted lists."""

    out: Any
    caches: list


def _run(row, caches, steps, step):
    outs, kept = [], []
    for t in range(steps):
        out = np.zeros((LAYERS, HEADS, HEAD_DIM))
        for layer in range(LAYERS):
            step(caches, layer, row.n + t, out)
        outs.append(out.ravel())
        kept.append([[sorted(head) for head in layer] for layer in caches])
    return Simulation(np.stack(outs), kept)


def window(row, caches, steps, tokens):
    """Prompt caches [layer][head] that stay, and the last `tokens` generated tokens."""

    def step(caches, layer, position, out):
        recent = [p for p in range(row.n, position + 1) if p > position - tokens]
        for head in range(KV_HEADS):
            out[layer, head * GROUP : (head + 1) * GROUP] = row.attend(
                layer, head, position, caches[layer][head] + recent
            )[1]

    return _run(row, caches, steps, step)


def evict(row, caches, scores, steps, sizes, *, last=False, shared=False, latest=0, sinks=0):
    """caches [layer][head] and scores [layer][head] {position: score}; sizes [layer].

    Append, attend to everything, weigh, and drop the weakest until `sizes[layer]` are left.
    """

    def step(caches, layer, position, out):
        received = []
        for head in range(KV_HEADS):
            caches[layer][head].append(position)
            weights, out[layer, head * GROUP : (head + 1) * GROUP] = row.attend(
                layer, head, position, caches[layer][head]
            )
            received.append(dict(zip(caches[layer][head], weights.mean(axis=0), strict=True)))
        if shared:
            mean = {p: np.mean([r[p] for r in received]) for p in received[0]}
            received = [mean] * KV_HEADS
        for head in range(KV_HEADS):
            cache, score = caches[layer][head], scores[layer][head]
            for p in cache:
                score[p] = received[head][p] + (0 if last else score.get(p, 0))
            while len(cache) > sizes[layer]:
                sinks_ = min(sinks, sizes[layer] - 1)
                window = max(1, min(latest(sizes[layer]), sizes[layer] - sinks))
                free = [p for p in cache if p <= position - window and p >= sinks_]
                weakest = min(free, key=lambda p: (score[p], -p))
                cache.remove(weakest)

    return _run(row, caches, steps, step)


def recompress(row, caches, steps, every, rows, *, latest, sinks=0):
    """Before a step with `every` tokens in the tail: the best of context and tail by the last `rows` attention rows."""
    tails = [[[] for _ in range(KV_HEADS)] for _ in range(LAYERS)]
    noted = [[[] for _ in range(KV_HEADS)] for _ in range(LAYERS)]  # {position: mean probability} of each step

    def step(caches, layer, position, out):
        for head in range(KV_HEADS):
            cache, tail = caches[layer][head], tails[layer][head]
            if len(tail) == every:
                score = {p: sum(r.get(p, 0) for r in noted[layer][head][-rows:]) for p in cache + tail}
                size = len(cache)
                window = max(1, min(latest(size), size - sinks))
                forced = [p for p in cache + tail if p >= position - window or p < min(sinks, size - 1)]
                others = sorted(set(cache + tail) - set(forced), key=lambda p: (-score[p], p))
                cache[:] = sorted(forced + others[: size - len(forced)])
                tail.clear()
            tail.append(position)
            weights, out[layer, head * GROUP : (head + 1) * GROUP] = row.attend(layer, head, position, cache + tail)
            noted[layer][head].append(dict(zip(cache + tail, weights.mean(axis=0), strict=True)))

    return _run(row, caches, steps, step)
