"""Every pruning method in plain NumPy, a row at a time, from its formula: which tokens stay, and what they become."""

from fractions import Fraction
from math import floor

import numpy as np


def part(count, value):
    """floor(value * count) of a decimal."""
    return floor(count * Fraction(str(value)))


def best(scores, among, count):
    """The `count` best of some tokens; of equal ones the first."""
    return sorted(sorted(among, key=lambda i: (-scores[i], i))[:count])


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def pyramid_drop(method, row, cut):
    scores = row.attention_of([row.n - 1], 4, row.hidden)[:, 0].mean(axis=0)
    return best(scores, row.visual, part(row.count, method.keep[cut])), {}


def fast_v(method, row, cut):
    scores = row.attention_of([row.n - 1], 3, row.entered)[:, 0].mean(axis=0)
    return best(scores, row.visual, floor(row.count * Fraction(str(method.keep)) + Fraction(1, 2))), {}


def feather(method, row, cut):
    if not row.visual:
        return [], {}
    scores = row.attention_of([row.n - 1], 3, row.entered, row.visual, rotated=False)[:, 0].mean(axis=0)
    kept = best(scores, row.visual, part(len(row.visual), method.keep[cut]))
    if cut == 0 and method.stride:
        kept += [i for i in row.visual if row.index[i] >= 0 and not any(row.grid[:, i] % method.stride)]
    return sorted(set(kept)), {}


def vision_zip(method, row, cut):
    kept = part(row.count, method.keep)
    targets = part(kept, method.contextual)
    dominant = best(row.attention, row.visual, kept - targets)
    rest = [i for i in row.visual if i not in dominant and row.index[i] >= 0]
    if not targets:
        return dominant, {}
    step = max(1, len(rest) // targets)
    chosen = rest[::step][:targets]
    cosine, parts = unit(row.keys), {i: [] for i in chosen}
    for i in set(rest) - set(chosen):
        parts[max(chosen, key=lambda j: cosine[i] @ cosine[j])].append(row.features[i])
    new = {i: row.features[i] + (np.mean(x, axis=0) if x else 0) for i, x in parts.items()}
    return sorted(dominant + chosen), {i: x @ row.stub.projector for i, x in new.items()}


def cd_pruner(method, row, cut):
    if not row.visual:
        return [], {}
    x, text = unit(row.hidden), [i for i in row.text if i > row.visual[-1]] or row.text
    if row.index[-1] != -1:
        text = row.text
    s = np.array([np.mean([x[i] @ x[t] for t in text]) for i in row.visual])
    r = (s - s.min() + 1e-6) / (s.max() - s.min())
    if method.relevance is not None:
        r = np.exp(method.relevance / (2 * (1 - method.relevance)) * r)
    kernel = r[:, None] * (x[row.visual] @ x[row.visual].T) * r
    chosen = []
    for _ in range(part(row.count, method.keep)):  # the determinant itself, of every set with one more

        def gain(j):
            return np.linalg.slogdet(kernel[np.ix_([*chosen, j], [*chosen, j])])[1]

        chosen.append(max((j for j in range(len(row.visual)) if j not in chosen), key=gain))
    return sorted(row.visual[j] for j in chosen), {}
