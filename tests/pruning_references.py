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
        kept += [i for i in row.visual if row.index[i] >= 0 and not any(row.grid[1:, i] % method.stride)]
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


def div_prune(method, row, cut):
    if not row.visual:
        return [], {}
    distance = 1 - unit(row.hidden) @ unit(row.hidden).T
    others = {i: min([distance[i, j] for j in row.visual if j != i], default=np.inf) for i in row.visual}
    chosen = []
    for _ in range(part(row.count, method.keep)):
        far = {i: min(distance[i, j] for j in chosen) for i in row.visual} if chosen else others
        chosen.append(max((i for i in row.visual if i not in chosen), key=lambda i: far[i]))
    return sorted(chosen), {}


def todre(method, row, cut):
    if cut:
        visual = [i for i in range(row.n) if row.index[i] != -1]
        if not visual:
            return [], {}
        weights = causal(row, 4)
        behind = [i for i in row.text if i > visual[0]]
        shares = [
            weights[:, rows][:, :, columns].sum(axis=-1) for rows, columns in ((behind, visual), (visual, row.text))
        ]
        return ([] if all(np.mean(x) < method.late for x in shares if x.size) else row.visual), {}
    cosine, chosen = unit(row.hidden) @ unit(row.hidden).T, []
    for _ in range(part(row.count, method.keep)):
        near = {i: cosine[i, chosen].sum() if chosen else -row.attention[i] for i in row.visual}
        chosen.append(min((i for i in row.visual if i not in chosen), key=lambda i: near[i]))
    return sorted(chosen), {}


def causal(row, layer, hidden=None, temperature=1.0):
    """The causal attention [heads, n, n] of a layer."""
    query, key = row.heads(layer, row.hidden if hidden is None else hidden)
    logits = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(query.shape[-1]) / temperature
    weights = np.tril(np.exp(logits - logits.max(axis=-1, keepdims=True)))
    return weights / weights.sum(axis=-1, keepdims=True)


def tile_of(row, i):
    return row.grid[0, i]


def closest(x, i, among, row):
    """The token with the largest cosine, of the same tile if there is one."""
    return max(among, key=lambda j: (tile_of(row, i) == tile_of(row, j), x[i] @ x[j], -j))


def aim(method, row, cut):
    keep = part(row.count, method.keep)
    if cut or method.keep == 1:
        steps = method.last - method.first + 1
        weights, x = causal(row, 4, temperature=0.1), np.full(row.n, 1 / row.n)
        x = np.tile(x, (len(weights), 1))
        for _ in range(5):
            x = np.einsum("hi,hij->hj", x, weights)
        count = floor(keep * (1 - Fraction(cut + (method.keep == 1), steps)))
        return best(np.sqrt((x**2).mean(axis=0)), row.visual, count), {}
    alive, hidden, new = row.visual, row.hidden.copy(), {}
    while len(alive) > max(keep, 1):
        x, goes = unit(hidden), min(len(alive) - keep, len(alive) // 2)
        to = {i: closest(x, i, alive[1::2], row) for i in alive[::2]} if len(alive) > 1 else {}
        order = sorted(to, key=lambda i: (tile_of(row, i) != tile_of(row, to[i]), -x[i] @ x[to[i]]))[:goes]
        came = {j: [hidden[i] for i in order if to[i] == j] for j in alive[1::2]}
        for j, parts in came.items():
            if parts:
                new[j] = hidden[j] = np.mean([hidden[j], *parts], axis=0)
        alive = [i for i in alive if i not in order]
    return alive if keep else [], new


def pi_to_me(method, row, cut):
    alive, hidden, new = row.visual, row.hidden.copy(), {}
    size, keep = np.ones(row.n), part(row.count, method.keep)
    while len(alive) > max(keep, 1):
        x, goes = unit(hidden), min(len(alive) - keep, len(alive) // 2)

        def energy(i):
            s = np.array([x[i] @ x[j] for j in alive if tile_of(row, i) == tile_of(row, j)]) - method.margin  # noqa: B023
            return np.where(s > 0, s, np.exp(s) - 1).mean()

        order = sorted(alive, key=lambda i: -energy(i))[: 2 * goes]
        to = {i: closest(x, i, order[1::2], row) for i in order[::2]}
        for j in order[1::2]:
            parts = [i for i in to if to[i] == j]
            if parts:
                members = [j, *parts]
                hidden[j] = np.average(hidden[members], axis=0, weights=size[members])
                size[j], new[j] = size[members].sum(), hidden[j]
        alive = [i for i in alive if i not in to]
    return alive if keep else [], new


def token_correlation(method, row, cut):
    visual = [i for i in row.visual if row.index[i] >= 0]
    cosine, ranks = unit(row.keys) @ unit(row.keys).T, {}
    for tile in {tile_of(row, i) for i in visual}:
        mine = [i for i in visual if tile_of(row, i) == tile]
        partners = {i: sum(cosine[i, j] > method.threshold for j in mine if j != i) for i in mine}
        order = sorted(mine, key=lambda i: -row.attention[i])
        ranks |= {i: rank for rank, i in enumerate(order[: sum(n < method.partners for n in partners.values())])}
    return sorted(sorted(sorted(ranks), key=lambda i: ranks[i])[: part(row.count, method.keep)]), {}


def keep_curve(method, row, cut):
    scores = row.attention_of([row.n - 1], 3, row.entered)[:, 0].mean(axis=0)
    falls = [x for x, before in zip(method.keep[1:], method.keep) if x < before]
    return best(scores, row.visual, part(row.count, falls[cut])), {}


def sparse_vlm(method, row, cut):
    prompt = row.stub.prompt_row(row.number)
    if not row.visual:
        return [], {}
    logits = prompt.hidden[prompt.visual] @ prompt.hidden[prompt.text].T
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    rating = (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0)
    raters = prompt.places[prompt.text][rating > rating.mean()]
    rows = [i for i in range(row.n) if row.places[i] in raters]
    scores = causal(row, 3, row.entered)[:, rows].mean(axis=(0, 1))
    kept = best(scores, row.visual, part(row.count, method.keep[cut]))
    rest = [i for i in row.visual if i not in kept]
    some = best(scores, rest, part(len(rest), method.recycle))
    if not some:
        return kept, {}
    x = row.hidden[some]
    distance = np.sqrt(((x[:, None] - x) ** 2).mean(axis=-1))
    density = np.exp(-(np.sort(distance, axis=1)[:, :5] ** 2).mean(axis=1))
    delta = [
        min([d for d, r in zip(ds, density) if r > mine], default=distance.max()) for ds, mine in zip(distance, density)
    ]
    centres = sorted(np.argsort(-density * delta, kind="stable")[: len(some) // 10 + 1].tolist())
    goes = [i if i in centres else min(centres, key=lambda c: distance[i, c]) for i in range(len(some))]
    new = {some[c]: x[[i for i, to in enumerate(goes) if to == c]].mean(axis=0) for c in centres}
    return sorted(kept + list(new)), new


def core_matching(method, row, cut):
    fires = row.entered @ row.stub.gate[3].astype(np.float64) > 0
    shared = (fires & fires[max(row.n - method.reference, 0)]).sum(axis=1)
    curve = sorted(shared[row.visual], reverse=True)
    if not curve:
        return [], {}
    line = np.linspace(curve[0], curve[-1], len(curve))  # the distance from it grows with the height above or below
    knee = curve[int(np.argmax(np.round(np.abs(curve - line), 9)))]
    return best(shared, [i for i in row.visual if shared[i] > knee], part(row.count, method.keep)), {}


def v_flow_opt(method, row, cut):
    layers, first = 6, 1.25 * method.keep if method.first is None else method.first
    starts = (0, 2, 4)  # 9 and 18 of 28, of six
    sizes = [2, 2, 2]
    parts = [first, first * method.second]
    parts.append((method.keep * layers - sum(x * n for x, n in zip(parts, sizes))) / sizes[2])
    assert method.cuts(layers) == starts
    if cut:
        importance = row.attention_of([row.n - 1], 4, row.hidden)[:, 0].mean(axis=0)
    else:
        patch = row.index >= 0
        shares = np.where(patch, np.exp(row.entropy), 0)
        importance = row.attention / max(row.attention.sum(), 1e-9)
        importance = np.where(patch, importance + method.entropy * shares / max(shares.sum(), 1e-9), 0)
    count = min(part(row.count, round(parts[cut], 6)), len(row.visual))
    runs = min(method.merge, count // 2)
    kept = best(importance, row.visual, count - runs)
    rest = [i for i in row.visual if i not in kept]
    new = {}
    for run in range(runs):
        members = [i for rank, i in enumerate(rest) if rank * runs // len(rest) == run]
        new[members[0]] = row.hidden[members].mean(axis=0)
    return sorted(kept + list(new)), new
