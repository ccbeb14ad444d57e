"""Arguments of the decode attention op and its formula in float64, for the tests of every implementation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.kernels import quantisation

BITS = {"int8": (8, 8), "int4": (4, 4), "int2": (2, 2), "int4/2": (4, 2)}  # of keys, of values
quantise_keys, quantise_values, dequantise_keys, dequantise_values = (
    jax.jit(getattr(quantisation, name), static_argnames="bits")
    for name in ("quantise_keys", "quantise_values", "dequantise_keys", "dequantise_values")
)


@dataclasses.dataclass(frozen=True)
class Case:
    """Static part of a call. `segments` of a row is 1 if its heads share a segment, else the number of KV heads."""

    batch: int
    heads: int
    segments: int
    lanes: int
    slots: int
    head_dim: int
    queries: int = 0  # 0: no axis for them
    causal: bool = False
    store: str = "float32"

    @property
    def kv_heads(self):
        return self.lanes if self.segments == 1 else self.segments

    @property
    def alignment(self):
        """Of the segments, so that every implementation serves them."""
        return max(map(quantisation.group_size, BITS[self.store])) if self.store in BITS else 16

    @property
    def bits(self):
        """The word that the op is called with."""
        return {"int4/2": "4/2", **{f"int{bits}": bits for bits in (8, 4, 2)}}.get(self.store)

    @property
    def dtype(self):
        return jnp.bfloat16 if self.store == "bfloat16" else jnp.float32

    def arguments(self, offsets, lengths, seed=0, outside=np.nan):
        """(positional, named) arguments; slots that are in no segment hold `outside`, codes anything."""
        rng = np.random.default_rng(seed)
        n = (self.queries,) if self.queries else ()
        query = rng.normal(size=(self.batch, *n, self.heads, self.head_dim))
        keys, values = rng.normal(size=(2, self.batch, self.lanes, self.slots, self.head_dim))
        inside = inside_segments(self, offsets, lengths)
        named = {}
        if self.store in BITS:
            of_keys, of_values = BITS[self.store]
            keys, named["key_scales"] = quantise_keys(jnp.asarray(keys, jnp.float32), bits=of_keys)
            values, value_scales = quantise_values(jnp.asarray(values, jnp.float32), bits=of_values)
            bad = quantisation.bits_of_scales(jnp.bfloat16(outside))
            named["value_scales"] = jnp.where(inside[:, :, None], value_scales, bad)
            used = inside.reshape(*inside.shape[:2], -1, quantisation.group_size(of_keys)).any(-1)[..., None, None]
            named["key_scales"] = jnp.where(used, named["key_scales"], bad)
        else:
            keys, values = (jnp.asarray(np.where(inside[..., None], x, outside), self.dtype) for x in (keys, values))
        return (jnp.asarray(query, self.dtype), keys, values, jnp.asarray(offsets), jnp.asarray(lengths)), named


def inside_segments(case, offsets, lengths):
    """bool [batch, lanes, slots]: slots of any segment."""
    mask = np.zeros((case.batch, case.lanes, case.slots), bool)
    for b in range(case.batch):
        for s in range(case.segments):
            lanes = slice(None) if case.segments == 1 else s * case.lanes // case.segments
            mask[b, lanes, offsets[b, s] : offsets[b, s] + lengths[b, s]] = True
    return mask


def expected(case, arguments, named, scale=None):
    """(out, lse) in float64, from the formula, one query at a time."""
    query, keys, values, offsets, lengths = arguments
    if case.store in BITS:
        of_keys, of_values = BITS[case.store]
        keys = dequantise_keys(keys, named["key_scales"], bits=of_keys)
        values = dequantise_values(values, named["value_scales"], bits=of_values)
    q, k, v = (np.asarray(x, np.float64) for x in (query, keys, values))
    q = q.reshape(case.batch, -1, case.heads, case.head_dim)
    offsets, lengths = np.asarray(offsets), np.asarray(lengths)
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    for b, i, h in np.ndindex(q.shape[:3]):
        kv_head = h * case.kv_heads // case.heads
        lane = kv_head * case.lanes // case.kv_heads
        segment = kv_head if case.segments > 1 else 0
        first, length = offsets[b, segment], lengths[b, segment]
        if case.causal:
            length -= q.shape[1] - 1 - i
        if length <= 0:
            continue
        logits = k[b, lane, first : first + length] @ q[b, i, h] * (scale or case.head_dim**-0.5)
        lse[b, i, h] = logits.max() + np.log(np.exp(logits - logits.max()).sum())
        out[b, i, h] = np.exp(logits - lse[b, i, h]) @ v[b, lane, first : first + length]
    return out.reshape(query.shape), lse.reshape(query.shape[:-1])


def ragged(case, seed=0):
    """Offsets and lengths that meet every edge: empty, 1, around tiles and blocks, the store's end, the whole store."""
    rng = np.random.default_rng(seed)
    edges = [0, 1, 15, 16, 17, 31, 33, 127, 128, 129, 255, 256, 257, case.slots]
    edges = rng.permutation([n for n in edges if n <= case.slots])
    lengths = np.resize(edges, (case.batch, case.segments)).astype(np.int32)
    last = (case.slots - lengths) // case.alignment
    offsets = np.where(rng.random(lengths.shape) < 0.5, last, rng.integers(0, last + 1)) * case.alignment
    return offsets.astype(np.int32), lengths
