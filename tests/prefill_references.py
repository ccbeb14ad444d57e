"""Patterns of sparse prefill from their formulas, in plain numpy, of one head of one prompt without padding.

Each takes (query [n, d], key [n, d], vision [n], block, head) and its options, and returns a map of blocks, bool
[blocks, blocks], of which what lies behind the diagonal means nothing, and single columns.
"""

import numpy as np


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def last_attention(query, key, rows, end=None):
    """[rows, n]: of the last rows before `end`, causal."""
    end = len(query) if end is None else end
    rows = min(rows, end)
    logits = query[end - rows : end].astype(np.float64) @ key.astype(np.float64).T * query.shape[1] ** -0.5
    behind = np.arange(len(key)) > np.arange(end - rows, end)[:, None]
    return softmax(np.where(behind, -np.inf, logits))


def a_shape(x, sinks, window):
    query, _, _, block, _ = x
    n = len(query)
    blocks = -(-n // block)
    t, j = np.indices((blocks * block, blocks * block))
    seen = (j < sinks) | ((j <= t) & (t - j < window))
    return of_tokens(seen, block), []


def of_tokens(seen, block):
    blocks = len(seen) // block
    return seen.reshape(blocks, block, blocks, block).any(axis=(1, 3))


def tri_shape(x, sinks, window, last):
    keep, _ = a_shape(x, sinks, window)
    first = max(len(x[0]) - last, 0)
    keep[first // x[3] :] = True
    return keep, []


def x_attention(x, threshold, stride):
    query, key, _, block, _ = x
    n, d = query.shape
    blocks = -(-n // block)
    q, k = (np.zeros((blocks * block, d)) for _ in range(2))
    q[:n], k[:n] = query, key
    tiles, per = -(-n // stride), block // stride
    logits = np.full((tiles, tiles), -np.inf)
    for i in range(tiles):
        for j in range(i + 1):
            pairs = [q[i * stride + stride - 1 - s] @ k[j * stride + s] for s in range(stride)]
            logits[i, j] = sum(pairs) / (np.sqrt(d) * stride)
    weights = np.zeros((blocks * per, blocks * per))
    weights[:tiles, :tiles] = softmax(logits)
    scores = weights.reshape(blocks, per, blocks, per).sum(axis=(1, 3))
    keep = np.zeros((blocks, blocks), bool)
    for r in range(blocks):
        keep[r, [0, r]] = True
        mass, wanted = scores[r][keep[r]].sum(), threshold * scores[r].sum()
        for c in np.argsort(-np.where(keep[r], -1, scores[r])):
            if mass >= wanted or keep[r, c]:
                break
            keep[r, c] = True
            mass += scores[r, c]
    return keep, []


def flex_prefill(x, gamma, tau, min_budget):
    query, key, _, block, _ = x
    n, d = query.shape
    blocks, fewest = -(-n // block), -(-min_budget // block)
    attention = last_attention(query, key, block)
    rows = len(attention)
    vertical, slash = attention.mean(axis=0), np.zeros(n)
    for i in range(rows):
        t = n - rows + i
        slash[: t + 1] += attention[i, t::-1] / rows

    def number(x):
        cover = (np.cumsum(np.sort(x)[::-1]) <= gamma).sum() + 1
        return min(max(min(cover, n) // block + 1, fewest), max(fewest, blocks))

    def pooled(x):
        return np.pad(x, (0, blocks * block - n)).reshape(blocks, block).sum(axis=1)

    numbers = [number(vertical), number(slash)]
    vertical, slash = pooled(vertical), pooled(slash)
    q, k = (np.stack([part[i : i + block].mean(axis=0) for i in range(0, n, block)]) for part in (query, key))
    one = softmax(query[n - rows :].mean(axis=0).astype(np.float64) @ k.T * d**-0.5)
    middle = (one + vertical) / 2
    divergence = 0.5 * sum((p * np.log(np.where(p > 0, p / middle, 1))).sum() for p in (one, vertical))
    by_query = np.sqrt(divergence) < tau
    if by_query:
        numbers = [fewest, fewest]
    keep = np.zeros((blocks, blocks), bool)
    for values, count, is_slash in ((vertical, numbers[0], False), (slash, numbers[1], True)):
        values = values.copy()
        values[0] = np.inf
        for c in np.argsort(-values)[:count]:
            if is_slash:
                keep |= np.eye(blocks, k=-c, dtype=bool)
            else:
                keep[:, c] = True
    if by_query:
        causal = np.tril(np.ones((blocks, blocks), bool))
        flat = softmax(np.where(causal, q.astype(np.float64) @ k.T * d**-0.5, -np.inf)).ravel()
        order = np.argsort(-flat, kind="stable")
        keep.ravel()[order[np.cumsum(flat[order]) <= gamma * blocks]] = True
    return keep, []


class MInference:
    """A function, and its form for several heads that share a list."""

    def __call__(self, x, table):
        query, key, _, block, head = x
        return self.group([(query, table[head])], key, block)

    def group(self, heads, key, block):
        n = len(key)
        blocks = -(-n // block)
        keep, columns = np.zeros((blocks, blocks), bool), []
        vertical, slash, most = np.zeros(n), np.zeros(n), []
        for query, (kind, v, s) in heads:
            if kind == "stream_llm":
                keep |= a_shape((query, key, None, block, 0), v, s)[0]
            elif kind == "block_sparse":
                keep |= self.block_sparse(query, key, block)
            else:
                attention = last_attention(query, key, 64)
                rows = len(attention)
                vertical += attention.sum(axis=0)
                for i in range(rows):
                    slash[: n - rows + i + 1] += attention[i, n - rows + i :: -1]
                most.append((max(v, 30), max(s, 50)))
        if most:
            v, s = np.minimum(np.max(most, axis=0), n)
            vertical[:30], slash[:100] = np.inf, np.inf
            columns = np.sort(np.argsort(-vertical, kind="stable")[:v])
            distances = np.argsort(-slash, kind="stable")[:s]
            t, j = np.indices((blocks * block, blocks * block))
            keep |= of_tokens(np.isin(t - j, distances), block)
        return keep, columns

    def block_sparse(self, query, key, block):
        n, d = query.shape
        pool = min(64, block)
        count = -(-n // pool)
        means = []
        for part in (query, key):
            padded = np.zeros((count * pool, d))
            padded[:n] = part
            means.append(padded.reshape(count, pool, d).mean(axis=1))
        logits = means[0] @ means[1].T
        keep = np.zeros((count, count), bool)
        for r in range(count):
            keep[r, np.argsort(-logits[r, : r + 1])[:100]] = True
        blocks, ratio = -(-n // block), block // pool
        whole = np.zeros((blocks * ratio, blocks * ratio), bool)
        whole[:count, :count] = keep
        return whole.reshape(blocks, ratio, blocks, ratio).any(axis=(1, 3))


m_inference = MInference()


def moved_grid(x, window, boundary, strides):
    """Which keys each query sees, bool [n, n]: near blocks, and those of tokens moved by their phase."""
    query, key, vision, block, _ = x
    n = len(query)
    visual = np.flatnonzero(vision)
    end = visual[-1] + 1 if boundary == "query" and len(visual) else n
    received = last_attention(query, key, 64, end).sum(axis=0)
    best, kind = -1, np.zeros(n, int)  # of each token: text is 0
    line = 0
    for stride in strides if len(visual) else ():
        phases = (visual - visual[0]) % stride
        for phase in range(stride):
            mine = visual[phases == phase]
            if received[mine].sum() > best:
                best, line = received[mine].sum(), 1 + phase
                kind[visual] = 1 + phases
    order = sorted(range(n), key=lambda j: (kind[j], j))
    block_of = {j: place // block for place, j in enumerate(order)}
    kinds = [{int(kind[j]) for j in order[i : i + block]} for i in range(0, n, block)]
    near, _ = a_shape(x, 0, window)
    seen = np.zeros((n, n), bool)
    for t in range(n):
        for j in range(t + 1):
            r, c = block_of[t], block_of[j]
            own = c <= r and kinds[r] & kinds[c]
            seen[t, j] = near[t // block, j // block] or own or line in kinds[c] or 0 in kinds[c] or 0 in kinds[r]
    return seen
