"""Requests per second of the engine at equal memory: a compressed cache against the full one, and transformers.

Rows and one micro-batch's prefill, its temporary memory included, may take the same bytes on both sides, weights aside;
each side has as many rows as fit (`rows="auto"`). By default the bytes are those with which the full cache has
`--full-rows` rows. Prompts of one image and random text are between three quarters of `--length` and all of it, and
every answer has `--new-tokens` tokens. transformers takes prompts sorted by length in batches of as many full caches as
fit into the same bytes, temporary memory not counted.

    python benchmarks/engine.py --shape demo --length 512 --requests 64
    python benchmarks/engine.py --shape 300m --length 2048 --requests 64 --transformers
"""

import functools
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np

import vlcache_jax as vlc
from vlcache_jax.engine.memory import need
from vlcache_jax.inference.report import full_cache_bytes
from vlcache_jax.models.decoder.layout import relaid
from vlcache_jax.models.families.llava.model import Llava

Tokens = dict[int, np.ndarray]


def prompts(config: Any, count: int, length: int) -> list[vlc.Batch]:
    """One row each, not padded, of lengths that differ."""
    lengths = np.random.default_rng(0).integers(length - length // 4, length + 1, count)
    batches = [harness.random_batch(config, 1, int(n), seed=i) for i, n in enumerate(lengths)]
    return [jax.tree.map(np.asarray, batch) for batch in batches]


def engine(vlm: Any, policy: vlc.Policy, args: Any, **options: Any) -> vlc.Engine:
    sizes = [args.length - args.length // 4 * i // args.buckets for i in range(args.buckets)]
    return vlc.Engine(
        vlm,
        policy,
        max_new_tokens=args.new_tokens,
        buckets=[(size, 1) for size in sizes],
        prefill_rows=args.prefill_rows,
        ahead=args.requests,
        most_rows=args.requests,
        **options,
    )


def ours(own: vlc.Engine, requests: Sequence[vlc.Request], tokens: Tokens) -> float:
    """Seconds of a run."""
    start = time.perf_counter()
    for result in own.run(requests):
        assert result.ok, result.reason
        tokens[result.index] = result.tokens
    return time.perf_counter() - start


def theirs(model: Any, batches: Sequence[vlc.Batch], rows: int, new_tokens: int, tokens: Tokens) -> float:
    """Seconds of `generate` over batches of `rows` prompts, sorted by length and padded on the left."""
    import torch

    order = sorted(range(len(batches)), key=lambda i: int(batches[i].lengths[0]))
    start = time.perf_counter()
    for first in range(0, len(order), rows):
        some = order[first : first + rows]
        longest = max(int(batches[i].lengths[0]) for i in some)
        ids, mask = np.zeros((len(some), longest), np.int64), np.zeros((len(some), longest), np.int64)
        for row, i in enumerate(some):
            n = int(batches[i].lengths[0])
            ids[row, longest - n :], mask[row, longest - n :] = batches[i].tokens[0, :n], 1
        pixels = np.concatenate([batches[i].pixels[:, 0] for i in some]).transpose(0, 3, 1, 2)
        inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": np.ascontiguousarray(pixels)}
        placed = {name: torch.from_numpy(x).to(model.device) for name, x in inputs.items()}
        placed["pixel_values"] = placed["pixel_values"].to(model.dtype)
        with torch.inference_mode():
            out = model.generate(**placed, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens)
        found = out[:, -new_tokens:].cpu().numpy()
        tokens.update({i: found[row] for row, i in enumerate(some)})
    return time.perf_counter() - start


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--shape", choices=harness.SHAPES, default="demo", help="a model with random weights")
    parser.add_argument("--length", type=int, default=512, help="tokens of the longest prompt, visual ones included")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--buckets", type=int, default=1, help="sizes that prompts are padded to")
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--prefill-rows", type=int, default=1)
    parser.add_argument("--full-rows", type=int, default=4, help="of the full cache: so many bytes there are")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--transformers", action="store_true", help="the third side")
    parser.add_argument("--device", default="cpu", help="of torch")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="count every run, for runs of minutes: all is compiled")
    args = parser.parse_args()

    config, dtype = harness.SHAPES[args.shape], jnp.dtype(args.dtype)
    stacked = Llava(config, dtype)
    weights = harness.random_params(stacked, dtype=dtype)
    model, params = relaid(weights, stacked, "apart" if jax.default_backend() in ("cpu", "gpu") else "stacked")
    vlm = types.SimpleNamespace(model=model, params=params, processor=None)
    batches = prompts(config, args.requests, args.length)
    requests = [vlc.Request(prompt=batch, eos_token_ids=[]) for batch in batches]

    policies = (vlc.FullCache(), vlc.VLCache(budget=args.budget))
    sized = [engine(vlm, policy, args, rows=1) for policy in policies]
    largest = max(sized[0].buckets)
    needed = [need(one._programs, largest, args.prefill_rows) for one in sized]
    bytes_ = max(one.prefill for one in needed) + args.full_rows * needed[0].row
    tokens: dict[str, Tokens] = {}
    engines: dict[str, vlc.Engine] = {}
    sides: dict[str, Callable[[], float]] = {}
    for policy in policies:
        name = f"engine, {policy.name} {policy.budget:g}"
        engines[name] = engine(vlm, policy, args, memory_bytes=bytes_)
        engines[name].warmup()
        sides[name] = functools.partial(ours, engines[name], requests, tokens.setdefault(name, {}))
    if args.transformers:
        import torch

        reference = harness.in_transformers(config, weights, args.threads).to(args.device, getattr(torch, args.dtype))
        rows = max(1, bytes_ // full_cache_bytes(model.spec, 1, largest.tokens + args.new_tokens))
        found = tokens.setdefault("transformers", {})
        sides["transformers"] = functools.partial(theirs, reference, batches, int(rows), args.new_tokens, found)

    timings = harness.alternate(sides, args.repeats, warm=not args.cold)
    base, *_ = timings
    records, lines = [], []
    for name, timing in timings.items():
        record: dict[str, Any] = {"name": name, "seconds": timing.record(), "requests": args.requests}
        record["speed_up"] = harness.ratio(timings[base], timing)
        same = [np.mean(tokens[name][i] == tokens[base][i]) for i in range(args.requests)]
        record["same_tokens"] = float(np.mean(same))
        if name in engines:
            stats = engines[name].stats()
            record |= {
                "rows": stats.rows,
                "padding_share": stats.padding_share,
                "idle_row_share": stats.idle_row_share,
                "idle_share": stats.idle_share,
                "programs": stats.programs,
                "compilations": stats.compilations,
            }
        else:
            record["rows"] = int(rows)
        records.append(record)
        shares = [f"{record[x]:.0%}" if x in record else "" for x in ("padding_share", "idle_row_share")]
        lines.append([
            name, str(record["rows"]), f"{args.requests / timing.median:.2f}", harness.spread(record["speed_up"]),
            f"{record['same_tokens']:.0%}", *shares,
        ])  # fmt: skip
    harness.table(["", "rows", "requests/s", "x the first", "same tokens", "padding", "idle rows"], lines)
    if args.transformers:
        best = list(engines)[-1]
        print(f"{best} x transformers: {harness.spread(harness.ratio(timings['transformers'], timings[best]))}")
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    settings |= {"bytes": bytes_, "parameters": harness.count_params(params)}
    harness.finish("engine", settings, records, args.json)


if __name__ == "__main__":
    main()
