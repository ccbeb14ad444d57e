"""What the references of the methods are made of: attention, selection, merging, slots of each layer, pooling.

In plain numpy and Python, float64, of one prompt without padding; written apart from the library's code.
"""

import dataclasses
import math
from fractions import Fraction

import numpy as np


@dataclasses.dataclass
class Prompt:
    """One row of a batch, cut to its true length n."""

    query: np.ndarray  # [layers, n, heads, d]
    key: np.ndarray  # [layers, n, kv_heads, d]
    value: np.ndarray  # like key
    index: np.ndarray  # [n], feature of a visual token, -1 for text

    @property
    def n(self):
        return len(self.index)

    @property
    def layers(self):
        return len(self.key)

    @property
    def visual(self):
        return self.index != -1

    def attention(self):
        """[layers, heads, n, n], causal."""
        group = self.query.shape[2] // self.key.shape[2]
        key = np.repeat(self.key, group, axis=2)
        logits = np.einsum("lthd,lshd->lhts", self.query, key) / math.sqrt(key.shape[-1])
        return softmax(np.where(np.tril(np.ones((self.n, self.n), bool)), logits, -np.inf))

    def received(self, rows, shared=False):
        """Attention received from `rows`, [layers, kv_heads, n]: the mean over a KV head's query heads, or over all."""
        total = self.attention()[:, :, list(rows)].sum(axis=2)
        layers, heads, n = total.shape
        kv_heads = self.key.shape[2]
        if shared:
            return np.repeat(total.mean(axis=1, keepdims=True), kv_heads, axis=1)
        return total.reshape(layers, kv_heads, heads // kv_heads, n).mean(axis=2)

    def question(self):
        """Rows after the last visual token; the last 32 if there are none."""
        places = np.flatnonzero(self.visual)
        first = places[-1] + 1 if len(places) and places[-1] + 1 < self.n else max(0, self.n - 32)
        return range(first, self.n)


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


# Selection


def keep(scores, slots, window=Fraction(1, 10), sinks=0, first_kind=None):
    """Ascending kept positions of one head. window: a Fraction of the slots, or a number of tokens."""
    n = len(scores)
    wanted = math.floor(window * slots) if isinstance(window, Fraction) else window
    latest = max(1, min(wanted, slots - sinks))
    forced = set(range(n - latest, n)) | set(range(min(sinks, slots - 1)))
    kind = np.zeros(n, bool) if first_kind is None else first_kind
    others = sorted(set(range(n)) - forced, key=lambda j: (not kind[j], -scores[j], j))
    return sorted(forced | set(others[: slots - len(forced)]))


# Merging


def merge(key, value, kept, kind):
    """key, value [n, d] of one head, ascending kept positions -> what is stored for them (LOOK-M, section 3.3)."""
    norm = np.maximum(np.linalg.norm(key, axis=-1), 1e-30)
    members = {j: [] for j in kept}
    for j in sorted(set(range(len(key))) - set(kept)):
        cosine = key[kept] @ key[j] / norm[kept] / norm[j]
        best = int(np.argmax(np.round(cosine, 12)))  # ties, to the rounding of float64, go to the lower position
        members[kept[best]].append((j, cosine[best]))

    def stored(x, j):
        if kind == "pivotal":
            return sum(((x[i] + x[j]) / 2 for i, _ in members[j]), x[j]) / (len(members[j]) + 1)
        return sum((x[i] * (c if kind == "weighted" else 1) for i, c in members[j]), x[j]) / (len(members[j]) + 1)

    return tuple(np.array([stored(x, j) for j in kept]) for x in (key, value))


# Slots of each layer


def uniform(layers, total):
    return [total // layers + (layer < total % layers) for layer in range(layers)]


def in_proportion(weight, total, low, high):
    """Slots in proportion to the weights within bounds, by bisection on the common factor; largest remainders."""
    layers = len(weight)
    low = min(low, total // layers)
    weight = np.maximum(np.asarray(weight, np.float64), 1e-30) / np.sum(weight)
    small, large = 0.0, 1e12
    for _ in range(300):
        middle = (small + large) / 2
        small, large = (middle, large) if np.clip(middle * weight, low, high).sum() < total else (small, middle)
    ideal = np.clip(large * weight, low, high)
    slots = np.floor(ideal + 1e-7).astype(int)
    held = (ideal <= low) | (ideal >= high)
    order = sorted(range(layers), key=lambda i: (slots[i] >= high, held[i], -(ideal[i] - slots[i]), i))
    for layer in order[: total - slots.sum()]:
        slots[layer] += 1
    return slots.tolist()


def density(prompt, threshold=0.01):
    rows = prompt.question()
    chosen = prompt.attention()[:, :, list(rows)]
    causal = np.arange(prompt.n) <= np.array(rows)[:, None]
    large = (chosen >= threshold * chosen.max(axis=-1, keepdims=True)) & causal
    return large.sum(axis=(2, 3)).mean(axis=1) / causal.sum()


# Pooling


def pool_sequence(scores, size, kind, skip=0):
    out = scores.copy()
    end = scores.shape[-1] - skip
    for j in range(end):
        near = scores[..., max(0, j - size // 2) : min(end, j + size // 2 + 1)]
        # Of tokens with the same maximum those with the larger own score go first.
        own = 1e-9 * scores[..., j]
        out[..., j] = near.sum(axis=-1) / size if kind == "mean" else near.max(axis=-1) + own
    return out


def pool_grid(scores, index, size, kind, side):
    place = {int(i): j for j, i in enumerate(index) if i >= 0}
    out = scores.copy()
    for i, j in place.items():
        tile, row, column = i // side**2, i % side**2 // side, i % side
        reach = range(-(size // 2), size // 2 + 1)
        around = [(row + a, column + b) for a in reach for b in reach]
        features = [tile * side**2 + r * side + c for r, c in around if 0 <= r < side and 0 <= c < side]
        near = scores[..., [place[f] for f in features if f in place]]
        out[..., j] = near.mean(axis=-1) if kind == "mean" else near.max(axis=-1) + 1e-9 * scores[..., j]
    return out
