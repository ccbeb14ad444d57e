"""Where the time of a prefill and of a decode step goes: every kernel of the GPU, and what the host adds.

    python benchmarks/gpu/kernels.py --shapes 1x2048 8x8192

A random model; the times are those that JAX's profiler notes.
"""

import collections
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData

sys.path.insert(0, str(Path(__file__).parent.parent))
import harness

import vlcache_jax as vlc
from vlcache_jax.models.decoder.layout import LAYOUTS
from vlcache_jax.models.families.llava.model import Llava


def kernel_times(run: Callable[[], Any]) -> dict[str, tuple[int, float]]:
    """Launches and seconds of every kernel in one run; empty where there is no GPU."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        for file in Path(folder).rglob("*.xplane.pb"):
            for plane in ProfileData.from_file(str(file)).planes:
                for line in plane.lines if "GPU" in plane.name else ():
                    if "Stream" in (line.name or ""):
                        for event in line.events:
                            found[event.name].append(event.duration_ns / 1e9)
    return {name: (len(times), sum(times)) for name, times in found.items()}


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--shape", choices=harness.SHAPES, default="7b")
    parser.add_argument("--shapes", nargs="+", default=["1x2048", "8x8192"], help="batch x prompt tokens")
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--scored", type=int, default=50, help="text tokens after the image, the rows that score")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layout", choices=sorted(LAYOUTS), default="apart", help="of the weights")
    parser.add_argument("--shown", type=int, default=15, help="kernels, those that take longest")
    args = parser.parse_args()

    model = Llava(harness.SHAPES[args.shape], jnp.bfloat16, layout=args.layout)
    params = harness.random_params(model, dtype=jnp.bfloat16)
    rows = []
    for size in args.shapes:
        batch, length = (int(n) for n in size.split("x"))
        prompts = harness.random_batch(model.config, batch, length, question=args.scored)
        for policy in (vlc.FullCache(), vlc.VLCache(budget=args.budget)):

            def prefill(prompts=prompts, policy=policy) -> Any:
                return vlc.prefill(model, params, prompts, policy).start(args.steps + 1)

            def decode(logits: jax.Array, state: Any) -> Any:
                return vlc.decode(model, params, logits, state, args.steps + 1, eos_token_ids=())

            first = {"prefill": harness.timed(prefill)}
            started = prefill()
            first["decode step"] = harness.timed(lambda started=started: decode(*started))
            for part, run, count in (
                ("prefill", prefill, 1),
                ("decode step", lambda started=started: decode(*started), args.steps),
            ):
                seconds, kernels = harness.timed(run) / count, kernel_times(run)
                name = f"{size} {policy.name} {part}"
                total, launches = (sum(x[i] for x in kernels.values()) / count for i in (1, 0))
                longest = sorted(kernels.items(), key=lambda item: -item[1][1])[: args.shown]
                if longest:
                    harness.table([name, "launches", "ms"], [
                        [kernel[:80], f"{n / count:.1f}", f"{t / count * 1e3:.3f}"] for kernel, (n, t) in longest
                    ])  # fmt: skip
                rows.append({"name": name, "seconds": seconds, "kernel_seconds": total, "launches": launches,
                             "first_seconds": first[part]})  # fmt: skip
            del started
    names = {"seconds": "ms", "kernel_seconds": "kernels, ms", "launches": "launches", "first_seconds": "first run, s"}
    factors = (1e3, 1e3, 1, 1)
    harness.table(["", *names.values()], [
        [row["name"], *(f"{row[name] * by:.3f}" for name, by in zip(names, factors, strict=True))] for row in rows
    ])  # fmt: skip
    harness.finish("kernels", {k: v for k, v in vars(args).items() if k != "json"}, rows, args.json)


if __name__ == "__main__":
    main()
