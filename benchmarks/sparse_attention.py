"""Sparse prefill attention against dense attention on this machine, at the head shapes of a real model.

Two sparse sides with the same number of listed blocks: lists that are given (random ones), and lists that XAttention
estimates, estimate included. Heads are independent of each other, so that a few of them (`--kv-heads`) tell the ratio.

    python benchmarks/sparse_attention.py --model llava-1.5-7b --tokens 16384 --kv-heads 4
"""

from functools import partial

import harness
import jax
import jax.numpy as jnp
import numpy as np

import vlcache_jax as vlc
from vlcache_jax.kernels.attention import attention
from vlcache_jax.kernels.shapes import SHAPES
from vlcache_jax.kernels.sparse_attention import Lists, sparse_attention
from vlcache_jax.patterns.listing import lists_of
from vlcache_jax.patterns.pattern import PatternInputs


def random_lists(blocks: int, heads: int, share: float) -> Lists:
    """Of each block of queries its own keys, and `share` of those before, at random."""
    rng = np.random.default_rng(0)
    counts = np.maximum(1, np.round(share * np.arange(1, blocks + 1))).astype(np.int32)
    ids = np.zeros((1, heads, blocks, counts.max()), np.int32)
    for h, i in np.ndindex(heads, blocks):
        ids[0, h, i, : counts[i]] = np.sort([*rng.permutation(i)[: counts[i] - 1], i])
    return Lists(jnp.asarray(ids), jnp.broadcast_to(jnp.asarray(counts), (1, heads, blocks)))


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--model", choices=SHAPES, default="llava-1.5-7b")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--kv-heads", type=int, default=4, help="so many of the model's KV heads, with their queries")
    parser.add_argument("--share", type=float, default=0.125, help="of the blocks of causal attention")
    parser.add_argument("--stride", type=int, default=16, help="of XAttention")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    shape, blocks = SHAPES[args.model], -(-args.tokens // 128)
    kv_heads = min(args.kv_heads, shape.kv_heads)
    heads = kv_heads * shape.heads // shape.kv_heads
    rng = np.random.default_rng(1)
    sizes = heads, kv_heads, kv_heads
    arrays = [jnp.asarray(rng.normal(size=(1, args.tokens, n, shape.head_dim)), args.dtype) for n in sizes]
    lists = random_lists(blocks, kv_heads, args.share)
    # Every list has as many blocks: so many that all of them have the wanted share of the triangle.
    wanted = int(lists.counts[0, 0].sum())
    most = min(range(1, blocks + 1), key=lambda c: abs(sum(min(i, c) for i in range(1, blocks + 1)) - wanted))
    pattern = vlc.XAttention(1.0, args.stride, capacity=most / blocks)

    def estimated(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        inputs = PatternInputs(
            query=query, key=key, lengths=jnp.array([args.tokens]), vision=jnp.zeros((1, args.tokens), bool),
            layer=jnp.int32(0), heads=jnp.arange(heads), grid=None, block=128,
        )  # fmt: skip
        found, told = lists_of(pattern, inputs, pattern.choose(inputs))
        return sparse_attention(query, key, value, found)[0], told.density

    dense = jax.jit(lambda *x: attention(*x, with_lse=False)[0])
    given, whole = jax.jit(lambda *x: sparse_attention(*x, lists)[0]), jax.jit(estimated)
    share = float(np.sum(lists.counts)) / (kv_heads * blocks * (blocks + 1) / 2)
    shares = {"dense": 1.0, "lists": share, f"XAttention, stride {args.stride}": float(np.mean(whole(*arrays)[1]))}
    runs = (dense, given, whole)
    sides = {name: partial(harness.timed, partial(run, *arrays)) for name, run in zip(shares, runs)}
    timings = harness.alternate(sides, args.repeats)
    rows, lines = [], []
    for name, timing in timings.items():
        ratio = harness.ratio(timing, timings["dense"])
        rows.append({"attention": name, "share": shares[name], "seconds": timing.record(), "ratio": ratio})
        cells = [harness.spread(timing.record(), digits=3), harness.spread(ratio, digits=3)]
        lines.append([name, f"{shares[name]:.3f}", *cells])
    harness.table(["attention", "blocks", "seconds", "x dense"], lines)
    settings = {"model": args.model, "tokens": args.tokens, "heads": heads, "kv_heads": kv_heads, "dtype": args.dtype,
                "stride": args.stride, "repeats": args.repeats}  # fmt: skip
    harness.finish("sparse_attention", settings, rows, args.json)


if __name__ == "__main__":
    main()
