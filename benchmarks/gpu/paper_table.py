"""The paper's table of speed: prefill, decoding and both together, of this library and of transformers.

    python benchmarks/gpu/paper_table.py --json paper_table.json

After VL-Cache (arXiv 2410.23317): batch x prompt tokens, 100 tokens generated, 10 % of the cache, the last 50 rows of
the prompt score; here with random weights in the shape of llava-v1.6-mistral-7b, one image in each prompt, and
bfloat16. Every side of every case runs in a process of its own, whose peak of memory is then that of the case alone;
one that fails is reported with its reason.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parent.parent))
import harness

import vlcache_jax as vlc
from vlcache_jax.models.families.llava.config import LlavaConfig
from vlcache_jax.models.families.llava.model import Llava
from vlcache_jax.models.families.registry import write_config

SIDES = ("full_cache", "vl_cache", "transformers")
Run = Callable[[], tuple[float, float]]  # seconds of the prefill, seconds of the decoding


def prompts_of(config: LlavaConfig, batch: int, length: int) -> vlc.Batch:
    """Text, an image and 50 tokens of text, which score; fewer in short prompts."""
    question = min(50, max(1, length - config.features_per_tile))
    return harness.random_batch(config, batch, length, question=question)


def ours(config: LlavaConfig, batch: int, length: int, policy: vlc.Policy, steps: int) -> tuple[Run, Callable[[], Any]]:
    """A run, and the peak of memory in bytes."""
    model = Llava(config, jnp.bfloat16, layout="apart")  # as `vlc.load` has it on one GPU
    params = harness.random_params(model, dtype=jnp.bfloat16)
    prompts = prompts_of(config, batch, length)

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        logits, state = jax.block_until_ready(vlc.prefill(model, params, prompts, policy).start(steps))
        middle = time.perf_counter()
        jax.block_until_ready(vlc.decode(model, params, logits, state, steps, eos_token_ids=()))
        return middle - start, time.perf_counter() - middle

    return run, lambda: (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def theirs(config: LlavaConfig, batch: int, length: int, steps: int) -> tuple[Run, Callable[[], Any]]:
    """The same of transformers on torch, with torch's fused attention."""
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        write_config(config, folder)
        described = transformers.AutoConfig.from_pretrained(folder)
    with torch.device(device):
        model = transformers.LlavaForConditionalGeneration._from_config(
            described, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    model.generation_config.eos_token_id = None
    inputs = {k: x.to(device) for k, x in harness.torch_inputs(prompts_of(config, batch, length)).items()}
    ends: list[float] = []

    def note(*_: Any) -> None:
        if not ends:  # the prefill
            if cuda:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    model.register_forward_hook(note)

    def run() -> tuple[float, float]:
        ends.clear()
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(**inputs, do_sample=False, min_new_tokens=steps, max_new_tokens=steps)
        if cuda:
            torch.cuda.synchronize()
        return ends[0] - start, time.perf_counter() - ends[0]

    return run, lambda: torch.cuda.max_memory_allocated() if cuda else None


def measure(side: str, case: str, shape: str, budget: float, steps: int, repeats: int) -> dict[str, Any]:
    """Prefill and decode seconds of one side (after one run that does not count), and its peak of memory."""
    batch, length = (int(n) for n in case.split("x"))
    config = harness.SHAPES[shape]
    room = max(config.decoder.max_positions, length + steps)
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, max_positions=room))
    if side == "transformers":
        run, peak = theirs(config, batch, length, steps)
    else:
        policy = vlc.FullCache() if side == "full_cache" else vlc.VLCache(budget=budget)
        run, peak = ours(config, batch, length, policy, steps)
    run()
    prefill, decode = zip(*(run() for _ in range(repeats)), strict=True)
    both = [a + b for a, b in zip(prefill, decode, strict=True)]
    seconds = {"prefill": prefill, "decode": decode, "end_to_end": both}
    return {**{k: harness.Timing(tuple(v)).record() for k, v in seconds.items()}, "peak_bytes": peak()}


def in_own_process(side: str, case: str, options: list[str], limit: float) -> dict[str, Any]:
    """`measure` in a new process; {"failed": reason} if it fails."""
    command = [sys.executable, __file__, "--only", side, case, *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {limit:.0f} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--shape", choices=harness.SHAPES, default="7b")
    parser.add_argument("--cases", nargs="+", default=["1x2048", "1x32768", "1x131072", "4x32768", "64x2048"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=100, help="tokens generated")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=300, help="seconds for one side of one case")
    parser.add_argument("--only", nargs=2, metavar=("SIDE", "CASE"), help="measure this here, print it as JSON")
    args = parser.parse_args()
    settings = {"shape": args.shape, "budget": args.budget, "steps": args.steps, "repeats": args.repeats}
    if args.only:
        print(json.dumps(measure(*args.only, **settings)))
        return

    options = [x for k, v in settings.items() for x in (f"--{k}", str(v))]
    rows, lines = [], []
    for case in args.cases:
        found = {}
        for side in args.sides:
            found[side] = in_own_process(side, case, options, args.limit)
            print(case, side, json.dumps(found[side]), flush=True)  # a run that is cut short has shown what it had
        for side, result in found.items():
            rows.append({"case": case, "side": side, **result})
            if "failed" in result:
                lines.append([case, side, result["failed"], *[""] * 4])
                continue
            times = [f"{result[k]['median']:.3f}" for k in ("prefill", "decode", "end_to_end")]
            base = found.get("transformers", {"failed": "not run"})
            ratio = "" if "failed" in base else f"{base['end_to_end']['median'] / result['end_to_end']['median']:.2f}"
            peak = "" if result["peak_bytes"] is None else f"{result['peak_bytes'] / 2**30:.1f}"
            lines.append([case, side, *times, ratio, peak])
    header = ["batch x prompt", "", "prefill, s", "decoding, s", "both, s", "x transformers", "peak, GiB"]
    harness.table(header, lines)
    harness.finish("paper_table", settings, rows, args.json)


if __name__ == "__main__":
    main()
