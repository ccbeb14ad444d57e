"""A whole decode step of a random llava-v1.6-mistral-7b: how near it comes to the bandwidth of the card.

    python benchmarks/gpu/decode_step.py --json decode_step.json

What every step must read, the decoder's weights and the keys and values of prompt and answer, over its time is the
bandwidth it reaches; beside it stands that of a copy measured in the same run. A step's time is that of the compiled
loop of `vlc.generate` divided by its steps, so that no launch from the host counts.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parent.parent))
import harness

import vlcache_jax as vlc
from vlcache_jax.cache.state import KVState
from vlcache_jax.models.decoder.layout import LAYOUTS
from vlcache_jax.models.families.llava.model import Llava


def weight_bytes(params: Any) -> int:
    """Bytes of the decoder's weights that a step reads: all but the table of embeddings, if there is a head besides."""
    used = {k: x for k, x in params["decoder"].items() if k != "embed_tokens" or "lm_head" not in params["decoder"]}
    return sum(x.nbytes for x in jax.tree.leaves(used))


def cache_bytes(state: KVState, steps: int) -> int:
    """Bytes of keys and values that a step reads on average: what is kept of the prompts, and half of the answers."""
    batch, lanes, _, head_dim = state.context.keys.shape
    layers = state.context.lengths.shape[1]
    kept = int(jnp.sum(state.context.lengths)) * (lanes if state.context.lengths.shape[2] == 1 else 1)
    answers = batch * layers * lanes * steps / 2
    return int((kept + answers) * head_dim * 2 * state.context.keys.dtype.itemsize)


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--shape", choices=harness.SHAPES, default="7b")
    parser.add_argument("--shapes", nargs="+", default=["1x8192", "8x8192"], help="batch x prompt tokens")
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--scored", type=int, default=50, help="text tokens after the image, the rows that score")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--decode-attention", nargs="+", default=["xla_wide", "pallas_gpu"], help="implementations")
    parser.add_argument("--layout", choices=sorted(LAYOUTS), default="apart", help="of the weights")
    parser.add_argument("--copy-bytes", type=int, default=1 << 30)
    parser.add_argument("--rounds", type=int, default=100, help="copies inside one program")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    model = Llava(harness.SHAPES[args.shape], jnp.bfloat16, layout=args.layout)
    params = harness.random_params(model, dtype=jnp.bfloat16)
    block = jnp.zeros(args.copy_bytes // 2, jnp.bfloat16)
    copy = harness.repeated_copy(args.rounds)
    sides = {"copy": lambda: harness.timed(lambda: copy(block)) / args.rounds}
    moved, failures = {"copy": 2 * block.nbytes}, {}
    for size in args.shapes:
        batch, length = (int(n) for n in size.split("x"))
        prompts = harness.random_batch(model.config, batch, length, question=args.scored)
        for policy in (vlc.FullCache(), vlc.VLCache(budget=args.budget)):
            logits, state = vlc.prefill(model, params, prompts, policy).start(args.steps + 1)
            for name in args.decode_attention:
                kernels = vlc.Kernels(decode_attention=name)

                def decode(logits=logits, state=state, kernels=kernels) -> Any:
                    return vlc.decode(model, params, logits, state, args.steps + 1, eos_token_ids=(), kernels=kernels)

                side = f"{size} {policy.name} {policy.budget:g}, {name}"
                try:
                    jax.block_until_ready(decode())
                except Exception as error:  # the reason is the result
                    failures[side] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                    continue
                sides[side] = lambda decode=decode: harness.timed(decode) / args.steps
                moved[side] = weight_bytes(params) + cache_bytes(state, args.steps)

    timings = harness.alternate(sides, args.repeats)
    records = harness.beside_copy(timings, moved, "ms")
    for name, reason in failures.items():
        print(f"{name}: {reason}")
    settings = {k: v for k, v in vars(args).items() if k != "json"}
    harness.finish("decode_step", {**settings, "failures": failures}, records, args.json)


if __name__ == "__main__":
    main()
