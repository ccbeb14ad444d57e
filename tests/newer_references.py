"""References of newer methods, like those of `method_references.py`: numpy, float64, from the formulas."""

import math
from fractions import Fraction

import numpy as np
from reference_parts import Prompt, in_proportion, pool_sequence, softmax, uniform


def tgv_kv(prompt, total, sinks=4):
    attention = prompt.attention().mean(axis=1)  # [layers, n, n]
    text = list(prompt.question())
    scores = np.zeros((prompt.layers, prompt.key.shape[2], prompt.n))
    mass = []
    for layer, of_layer in enumerate(attention):
        mass.append(of_layer[text][:, prompt.visual].sum() if prompt.visual.any() else 1)
        for i in text:
            seen_by = [q for q in text if q >= i]
            weight = sum(of_layer[q, i] for q in seen_by) / len(seen_by)
            scores[layer] += weight * of_layer[i]
    return in_proportion(mass, total, min(sinks + 1, prompt.n), prompt.n), scores


def left_to_scores(prompt, total, window, sinks=0):
    """(slots that an average layer leaves to the scores, the tokens that compete for them)."""
    mean = total // prompt.layers
    wanted = math.floor(window * mean) if isinstance(window, Fraction) else window
    latest, first = max(1, min(wanted, mean - sinks)), min(sinks, mean - 1)
    return max(0, mean - latest - first), range(first, prompt.n - latest)


def one_after_the_other(first, second, count, places):
    """Scores of one head: the `count` best by `first` come before all others."""
    best = sorted((j for j in places if first[j] > 0), key=lambda j: (-first[j], j))[:count]
    out = second.copy()
    out[best] = second.max() + 1 + first[best]
    return out


def csp(prompt, total, window, cross):
    group = prompt.query.shape[2] // prompt.key.shape[2]
    key = np.repeat(prompt.key, group, axis=2)
    logits = np.einsum("lthd,lshd->lhts", prompt.query, key) / math.sqrt(key.shape[-1])
    weights = np.exp(logits) * np.tril(np.ones((prompt.n, prompt.n)))
    attention = weights / (1 + weights.sum(axis=-1, keepdims=True))
    rows = range(max(0, prompt.n - window), prompt.n)
    slots, places = left_to_scores(prompt, total, window)
    own_slots = slots - math.floor(Fraction(str(cross)) * slots)
    scores = np.zeros((prompt.layers, prompt.key.shape[2], prompt.n))
    for layer, head in np.ndindex(scores.shape[:2]):
        mine = attention[layer, head * group : (head + 1) * group].mean(axis=0)
        own, other = np.zeros(prompt.n), np.zeros(prompt.n)
        for q in rows:
            same = prompt.visual == prompt.visual[q]
            own += mine[q] * same
            other += mine[q] * ~same
        scores[layer, head] = one_after_the_other(own, other, own_slots, places)
    return uniform(prompt.layers, total), scores


def lag_kv(prompt, total, sinks, lag):
    n, full = prompt.n, max(0, prompt.n - sinks) // lag
    scores = np.zeros((prompt.layers, prompt.key.shape[2], n))
    for layer, head in np.ndindex(scores.shape[:2]):
        for block in range(full - 1):
            here, there = (slice(sinks + b * lag, sinks + (b + 1) * lag) for b in (block, block + 1))
            spread = 0
            for x in (prompt.key[layer, :, head], prompt.value[layer, :, head]):
                low, high = x[there].min(axis=0), x[there].max(axis=0)
                spread = spread + softmax(((x[here] - low) / (high - low)).std(axis=-1, ddof=1))
            scores[layer, head, here] = spread.argsort().argsort() / lag
        start = sinks + max(0, full - 1) * lag
        scores[layer, head, start:] = 1 + np.arange(max(0, n - start))
    return uniform(prompt.layers, total), scores


def leverage(keys, sketch):
    """keys [n, d], not rotated -> how far each lies outside of the others' span [n]."""
    x = keys - keys.mean(axis=0)
    if sketch < keys.shape[1]:
        x = x @ np.random.RandomState(0).standard_normal((keys.shape[1], sketch)) / math.sqrt(sketch)
    gram = x.T @ x
    ridge = 0.01 + 1e-5 * gram.diagonal().max()
    return np.einsum("nd,de,ne->n", x, np.linalg.inv(gram + ridge * np.eye(len(gram))), x)


def compactor(prompt, total, rotation, sketch, chunk, sinks, recent, blend=None):
    n, layers, kv_heads = prompt.n, prompt.layers, prompt.key.shape[2]
    group = prompt.query.shape[2] // kv_heads
    places = range(sinks, n - recent)
    scores = np.zeros((layers, kv_heads, n))
    if len(places) == 0:
        return uniform(layers, total), scores
    plain = np.array([[[rotation(i).T @ k for k in prompt.key[layer, i]] for i in range(n)] for layer in range(layers)])

    def standard(x):
        deviation = x.std(ddof=1) if x.size > 1 else 0
        return (x - x.mean()) / max(deviation, 1e-6)

    for layer in range(layers):
        outside = np.array([leverage(plain[layer, places, head], sketch) for head in range(kv_heads)])
        near = np.zeros((kv_heads, n))
        for start in range(sinks, n - recent, chunk):
            span = range(start, min(start + chunk, n - recent))
            for head in range(kv_heads * group):
                key = prompt.key[layer, span, head // group]
                shares = softmax(prompt.query[layer, span, head] @ key.T).sum(axis=0) / group
                near[head // group, span] += shares * np.linalg.norm(prompt.value[layer, span, head // group], axis=-1)
        near = np.pad(near[:, places], ((0, 0), (1, 1)))
        near = (near[:, :-2] + near[:, 1:-1] + near[:, 2:]) / 3
        weight = 1 - (total // layers) / n if blend is None else blend
        scores[layer][:, places] = weight * standard(outside) + standard(near)
        scores[layer] = np.where(np.isin(np.arange(n), places), scores[layer], scores[layer][:, places].max())
    return uniform(layers, total), scores


def critical_kv(prompt, total, output, votes, window, first=0.5, epsilon=1e-4):
    """votes: (prompt, total) -> (slots, scores), summed over the window's rows; output [layers, heads, d, hidden]."""
    slots, scores = votes(prompt, total)
    group = prompt.query.shape[2] // prompt.key.shape[2]
    left, places = left_to_scores(prompt, total, window)
    found = np.zeros(scores.shape)
    for layer, head in np.ndindex(scores.shape[:2]):
        share = scores[layer, head] / min(window, prompt.n)
        added = [abs(prompt.value[layer, :, head] @ output[layer, head * group + g]).sum(axis=1) for g in range(group)]
        weights = (share + epsilon) * np.mean(added, axis=0)
        found[layer, head] = one_after_the_other(share, weights, math.floor(Fraction(str(first)) * left), places)
    return slots, found


def kv_zip(prompt, total, sinks):
    """The stub's prompts are the same both times."""
    twice = [np.concatenate([x, x], axis=1) for x in (prompt.query, prompt.key, prompt.value)]
    return kv_zip_of(*twice, prompt.index, total, sinks)


def kv_zip_of(query, key, value, index, total, sinks):
    """Of a prompt said twice, [layers, 2 n, heads, d]; index [n]."""
    attention = Prompt(query, key, value, np.concatenate([index, index])).attention()
    n, layers, kv_heads = len(index), len(key), key.shape[2]
    found = attention[:, :, n:, :n].max(axis=2)  # [layers, heads, n]
    scores = found.reshape(layers, kv_heads, -1, n).max(axis=2)
    ranked = scores.copy()
    ranked[..., [*range(min(sinks, total // layers - 1)), n - 1]] = np.inf
    places = sorted(np.ndindex(ranked.shape), key=lambda at: (-ranked[at], at))[: kv_heads * total]
    return [[sum(at[:2] == (i, head) for at in places) for head in range(kv_heads)] for i in range(layers)], scores


def sparse_mm(prompt, total, scores, window, size, part):
    """scores [layers, query heads], from outside."""
    layers, kv_heads, n = prompt.layers, prompt.key.shape[2], prompt.n
    mean = total // layers
    latest = max(1, min(window, mean))
    least = latest + math.floor(Fraction(str(part)) * (mean - latest))
    weight = np.reshape(scores, (layers * kv_heads, -1)).sum(axis=1)
    shares = in_proportion(weight, kv_heads * (total - layers * least), 0, n - least)
    return [[least + shares[i * kv_heads + head] for head in range(kv_heads)] for i in range(layers)], pool_sequence(
        prompt.received(range(max(0, n - window), n)), size, "mean", window
    )
