"""The methods once more, in plain numpy and Python, written from their formulas and apart from the library's code.

Everything is float64 and of one prompt without padding. A method is a function from a `Prompt` and the slots of all
layers together to (slots of each layer, scores [layers, kv_heads, n]); `keep` then ranks.
"""

import math
from fractions import Fraction

import numpy as np
from reference_parts import (  # noqa: F401  (all of a reference in one name)
    Prompt,
    density,
    in_proportion,
    keep,
    merge,
    pool_grid,
    pool_sequence,
    softmax,
    uniform,
)


def effivlm(prompt, budget):
    """(window of every layer, slots of each layer) by the rule of EffiVLM-Bench's VL-Cache."""
    n, layers = prompt.n, prompt.layers
    weight = density(prompt) / density(prompt).sum()
    window = max(1, math.floor(Fraction(str(budget)) / 10 * n))
    others = [max(1, math.floor(min(max(w * budget * 0.9 * layers, 0.009), 1) * n + 1e-7)) for w in weight]
    return window, [min(n, window + o) for o in others]


def vl_cache(prompt, total, change=lambda prompt, scores: scores):
    slots = in_proportion(density(prompt), total, max(1, prompt.n // 100), prompt.n)
    return slots, change(prompt, prompt.received(prompt.question()))


def mask_sinks(prompt, scores):
    """Visual tokens above 5 times the mean score and below half the mean value norm score 0."""
    scores = scores.copy()
    visual = np.flatnonzero(prompt.visual)
    for layer in range(prompt.layers):
        for head in range(scores.shape[1]):
            norm = np.linalg.norm(prompt.value[layer, :, head], axis=-1)
            score = scores[layer, head]
            mean_score, mean_norm = (x[visual].mean() if len(visual) else 0 for x in (score, norm))
            for j in visual:
                if score[j] > 5 * mean_score and norm[j] < 0.5 * mean_norm:
                    scores[layer, head, j] = 0
    return scores


def streaming_llm(prompt, total):
    return uniform(prompt.layers, total), np.zeros((prompt.layers, prompt.key.shape[2], prompt.n))


def h2o(prompt, total, normalised=False):
    scores = prompt.received(range(prompt.n))
    return uniform(prompt.layers, total), scores / (prompt.n - np.arange(prompt.n)) if normalised else scores


def last_rows(prompt, count, shared=False):
    return prompt.received(range(max(0, prompt.n - count), prompt.n), shared)


def capped_window(count):
    """A window of `count` tokens that leaves the scores as many slots, or nine tenths; from the slots of all layers."""

    def tokens(prompt, total):
        mean = total // prompt.layers
        wanted = count if mean >= 2 * count else max(mean - count, math.floor(Fraction(mean, 10)))
        return max(1, min(count, wanted))

    return tokens


def snap_kv(prompt, total, window, size, kind="mean", skip=None, rows=None):
    window = window(prompt, total) if callable(window) else window
    votes = last_rows(prompt, rows or window)
    return uniform(prompt.layers, total), pool_sequence(votes, size, kind, window if skip is None else skip)


def pyramid_kv(prompt, total, window, size, beta=20, rows=None):
    layers, n = prompt.layers, prompt.n
    mean = total // layers
    rows, window = rows or window, window(prompt, total) if callable(window) else window
    window = max(1, min(window, mean))
    rest = mean - window
    low, high = rest // beta, 2 * rest - rest // beta
    if high > n - window:
        low, high = 2 * rest - (n - window), n - window
    slots = []
    for layer in range(layers):
        ideal = high - Fraction(layer * (high - low), layers - 1)
        whole = math.floor(ideal) if 2 * layer < layers - 1 else math.ceil(ideal)
        slots.append(window + (rest if n < 2 * rest or rest <= 0 else whole))
    left = total - layers * mean
    for layer in range(layers):
        if left and slots[layer] < n:
            slots[layer], left = slots[layer] + 1, left - 1
    return slots, snap_kv(prompt, total, window, size, rows=rows)[1]


def adaptive_heads(scores, slots, window, floor, lanes):
    """Slots [kv_heads] of one layer that has `slots` for each head; scores [kv_heads, n]."""
    heads, n = scores.shape
    window = max(1, min(window, slots))
    rest, group = slots - window, heads // lanes
    out = []
    for first in range(0, heads, group):
        mine = range(first, first + group)
        ranked = sorted((-scores[h, j], h, j) for h in mine for j in range(n - window))[: group * rest]
        found = [sum(h == head for _, h, _ in ranked) for head in mine]
        ideal = [(1 - Fraction(str(floor))) * f + Fraction(str(floor)) * rest for f in found]
        shares = [math.floor(x) for x in ideal]
        for head in sorted(range(group), key=lambda h: (shares[h] - ideal[h], h))[: group * rest - sum(shares)]:
            shares[head] += 1
        out += [window + share for share in shares]
    return out


def ada_kv(prompt, total, window, size, kind="max", floor=0.2, lanes=1, layers=None, rows=None):
    """layers: (prompt, total) -> slots of each layer, the same for all by default."""
    rows, window = rows or window, window(prompt, total) if callable(window) else window
    scores = pool_sequence(last_rows(prompt, rows), size, kind, window)
    slots = layers(prompt, total) if layers else uniform(prompt.layers, total)
    return [adaptive_heads(of_layer, s, window, floor, lanes) for of_layer, s in zip(scores, slots)], scores


def by_mass(prompt, total, method, share, window, sinks=0, text_first=False):
    """The slots that hold the share of each layer's scores, or the largest common share that `total` slots hold."""
    _, scores = method(prompt, total)
    kind = ~prompt.visual if text_first else None

    def held(scores, slots):
        """By `slots` slots; a window that grows with them counts for its last token only."""
        mean = scores.mean(axis=0)
        if slots == 0:
            return 0.0
        if isinstance(window, float):
            core = slots - max(1, math.floor(Fraction(str(window)) * slots)) + 1
            return mean[keep(mean, core, 0, sinks, kind)].sum() / mean.sum()
        return mean[keep(mean, slots, window, sinks, kind)].sum() / mean.sum()

    wanted = [(held(s, k), k, layer) for layer, s in enumerate(scores) for k in range(prompt.n)]
    taken = sorted(step for step in wanted if step[0] < share)[:total]
    return [sum(layer == mine for _, _, layer in taken) for mine in range(prompt.layers)], scores


def tova(prompt, total):
    return uniform(prompt.layers, total), last_rows(prompt, 1, shared=True)


def look_m(prompt, total):
    """As printed: the largest score of a head is added to text."""
    scores = prompt.received(range(prompt.n))
    return uniform(prompt.layers, total), scores + scores.max(axis=-1, keepdims=True) * ~prompt.visual


def prefix_kv(prompt, total):
    scores = prompt.received(range(prompt.n), shared=True)
    mass = [np.cumsum(np.sort(layer[0])[::-1]) / layer[0].sum() for layer in scores]

    def sizes(p):
        return [int(np.searchsorted(m, p)) + 1 if p < m[-1] else prompt.n for m in mass]

    small, large = 0.0, 1.0 + 1e-9
    for _ in range(100):
        middle = (small + large) / 2
        small, large = (middle, large) if sum(sizes(middle)) <= total else (small, middle)
    return sizes(small), scores


def air_cache(prompt, total, ratio):
    layers, n, heads = prompt.layers, prompt.n, prompt.query.shape[2]
    kv_heads, root = prompt.key.shape[2], math.sqrt(prompt.key.shape[-1])
    text = list(prompt.question())
    visual = prompt.visual if prompt.visual.any() else np.ones(n, bool)
    scores = np.zeros((layers, kv_heads, n))
    measured = []
    for layer in range(layers):
        key = np.repeat(prompt.key[layer], heads // kv_heads, axis=1)
        weight = np.mean([softmax(key[text, h] @ prompt.query[layer, n - 1, h] / root) for h in range(heads)], axis=0)
        elite = [j for j, w in zip(text, weight) if w >= ratio * weight.max()]
        for q in elite:
            seen = [j for j in range(q + 1) if visual[j] or j in elite]
            for h in range(heads):
                share = softmax(key[seen, h] @ prompt.query[layer, q, h] / root)
                scores[layer, h // (heads // kv_heads), seen] += share / len(elite) / (heads // kv_heads)
        s = scores[layer].mean(axis=0)[visual]
        deviation = s.std()
        measured.append((s.sum(), ((s - s.mean()) ** 3).mean() / deviation**3 if deviation > 1e-9 else 0))
    strength, skewness = np.array(measured).T
    skewness = np.maximum(skewness, 0)
    weight = (strength / strength.sum() + skewness / max(skewness.sum(), 1e-30)) / 2
    base = min(max(1, n - visual.sum()), total // layers)
    slots = in_proportion(weight, total - layers * base, 0, n - base)
    return [base + s for s in slots], scores


def key_norm(prompt, total):
    return uniform(prompt.layers, total), -np.linalg.norm(prompt.key, axis=-1).swapaxes(1, 2)


def cosine_with_mean(key):
    """key [n, d] -> (cosine of each key with the mean of the unit keys [n], squared length of that mean)."""
    unit = key / np.linalg.norm(key, axis=-1, keepdims=True)
    mean = unit.mean(axis=0)
    return unit @ mean / np.linalg.norm(mean), mean @ mean


def key_difference(prompt, total):
    heads = range(prompt.key.shape[2])
    scores = [[-cosine_with_mean(layer[:, head])[0] for head in heads] for layer in prompt.key]
    return uniform(prompt.layers, total), np.array(scores)


def mix_kv(prompt, total, window, size, rows=None):
    rows, window = rows or window, window(prompt, total) if callable(window) else window
    scores = snap_kv(prompt, total, window, size, rows=rows)[1].copy()
    end = prompt.n - window
    for layer in range(prompt.layers):
        for head in range(scores.shape[1]):
            if end < 1:
                continue
            vote = scores[layer, head, :end].copy()

            def scaled(x, vote=vote):
                unit = (x - x.min()) / (x.max() - x.min()) if x.max() > x.min() else np.zeros_like(x)
                return unit * vote.mean() / unit.mean() if unit.mean() > 0 else unit

            cosine, square = cosine_with_mean(prompt.key[layer, :, head])
            rho = min(max((prompt.n * square - 1) / max(prompt.n - 1, 1), 0), 1)
            norm = np.linalg.norm(prompt.value[layer, :end, head], axis=-1)
            scores[layer, head, :end] = rho * scaled(-cosine[:end]) + (1 - rho) * (vote + scaled(norm))
    return uniform(prompt.layers, total), scores


def coming_queries(prompt, layer, head, rotation, sinks, future):
    """(mean [d], covariance [d, d]) of the queries after the prompt; rotation(position) turns a column vector."""
    ahead, d = np.mean([rotation(prompt.n + t) for t in range(future)], axis=0), prompt.key.shape[-1]
    first = min(sinks, prompt.n - 1)
    plain = np.array([rotation(i).T @ prompt.query[layer, i, head] for i in range(first, prompt.n)])
    return ahead @ plain.mean(axis=0), ahead @ np.cov(plain.T, bias=True).reshape(d, d) @ ahead.T


def expected_logits(key, mean, spread):
    d = key.shape[-1]
    return key @ mean / math.sqrt(d) + np.einsum("sd,de,se->s", key, spread, key) / (2 * d)


def expected_attention(prompt, total, rotation, sinks, future, over_sinks=False):
    """over_sinks: whether the sinks take part in the softmax, which they do not."""
    heads, kv_heads = prompt.query.shape[2], prompt.key.shape[2]
    skip = 0 if over_sinks else min(sinks, prompt.n - 1)
    scores = np.zeros((prompt.layers, kv_heads, prompt.n))
    for layer in range(prompt.layers):
        for head in range(heads):
            mine = head // (heads // kv_heads)
            z = expected_logits(
                prompt.key[layer, :, mine], *coming_queries(prompt, layer, head, rotation, sinks, future)
            )
            scores[layer, mine, skip:] += softmax(z[skip:]) / (heads // kv_heads)
        scores[layer] *= np.linalg.norm(prompt.value[layer], axis=-1).T
    return uniform(prompt.layers, total), scores
