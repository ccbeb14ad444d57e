"""What compression costs the VLM of train_vlm.py, whose attention nobody shaped: exact answers on held-out strips.

    python benchmarks/pretrained/vlm_answers.py run/model --output answers.jsonl

The first question of each strip, which the model has to read off a picture of 256 visual tokens. As in study.py the
prompts run once, every policy keeps what it keeps of that recording, a line of JSON holds a policy on one batch, and a
run goes on where it was interrupted. The table has right answers, the 95 % interval of the paired difference to the
full cache, those that are right up to a digit, and what becomes of the full cache's answer.
"""

import argparse
import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from strips import Strip, asked, stream
from study import FULL, Lines, answered, measure

import vlcache_jax as vlc
from vlcache_jax.demo.data.samples import HELD_OUT_SEED
from vlcache_jax.evaluation.metrics import bootstrap_interval
from vlcache_jax.policies.allocate.uniform import Uniform
from vlcache_jax.policies.methods.kv_zip import LargestAttention
from vlcache_jax.policies.rows.spans import Repetition

TASK = "strips"
EVICTING = {
    "VL-Cache": vlc.VLCache,
    "its scores, equal layers": lambda budget: dataclasses.replace(vlc.VLCache(budget), allocate=Uniform()),
    "SnapKV": vlc.SnapKV,
    "Ada-KV": vlc.AdaKV,
    "CriticalKV": vlc.CriticalKV,
    "TGV-KV": vlc.TGVKV,
    "H2O": vlc.H2O,
    "KVzip": vlc.KVzip,
    "LagKV": vlc.LagKV,
}
BUDGETS = (0.25, 0.1)


@dataclasses.dataclass(frozen=True)
class Asked:
    """The first question of a strip; `answer` is a name and a value."""

    strip: Strip

    @property
    def answer(self) -> str:
        return self.strip.questions[0][1]

    def right(self, said: str) -> bool:
        """Whether an answer is right word for word."""
        return said.strip() == self.answer

    def begun(self, said: str, digits: int) -> bool:
        """Whether it is right up to so many of the value's digits."""
        return said.strip().startswith(self.answer[: self.answer.index(" ") + 1 + digits])


def variants() -> dict[str, vlc.Policy]:
    """What decides: pooling, KVzip's shares of layers and heads, its scores, and bits besides."""

    def retold(budget: float) -> vlc.Policy:
        return dataclasses.replace(vlc.RankedBits(budget), rows=Repetition(), score=LargestAttention())

    return {
        **{
            f"equal layers, pooled over 7 {budget:g}": dataclasses.replace(
                vlc.VLCache(budget, pool=7), allocate=Uniform()
            )
            for budget in BUDGETS
        },
        "KVzip 0.1, equal layers": dataclasses.replace(vlc.KVzip(0.1), allocate=Uniform()),
        **{f"KVzip {budget:g}": vlc.KVzip(budget) for budget in (0.05, 0.02)},
        **{f"KVzip, 4 bits, bytes {share:g}": vlc.KVzip(vlc.ByteShare(share), bits=4) for share in (0.1, 0.05, 0.02)},
        **{f"ranked bits {share:g}, KVzip's scores": retold(share) for share in (0.1, 0.05)},
    }


def policies() -> dict[str, vlc.Policy]:
    """By what the table calls them."""
    found: dict[str, vlc.Policy] = {FULL: vlc.FullCache()}
    found |= {f"all at {bits} bits": vlc.FullCache(bits=bits) for bits in (8, 4)}
    found |= {f"ranked bits {budget:g}": vlc.RankedBits(budget) for budget in (0.4, 0.3, 0.25, 0.1)}
    found |= {f"{name} {budget:g}": make(budget) for budget in BUDGETS for name, make in EVICTING.items()}
    return found | variants()


def drawn(vlm: vlc.VLM, count: int) -> tuple[list[Asked], list[Any], int]:
    """Held-out strips, their conversations, and how many tokens all of these are padded to."""
    samples = [Asked(strip) for strip in itertools.islice(stream(HELD_OUT_SEED, 0, ("documents",)), count)]
    chats = [asked(sample.strip) for sample in samples]
    longest = max(int(np.max(vlm.processor.chat([chat]).lengths)) for chat in chats)
    return samples, chats, -(-longest // 64) * 64


def table(lines: Lines, samples: list[Asked]) -> str:
    """Markdown: a row for each policy; in per cent, the divergence in nats a token."""
    rows = [["policy", "bytes", "buffers", "right", "to digit 1, 2, 3, 4", "repeated", "divergence"]]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    whole = lines.values(TASK, FULL)
    for (_, policy), found in lines.found.items():
        own, said = lines.values(TASK, policy), [text for _, line in sorted(found.items()) for text in line["answers"]]
        pairs = list(zip(samples, said, strict=False))
        begun = [np.mean([sample.begun(text, digits) for sample, text in pairs]) for digits in (1, 2, 3, 4)]
        right, count = own["right"], len(own["right"])
        _, low, high = bootstrap_interval(100 * (right - whole["right"][:count]))
        _, less, more = bootstrap_interval(own["kl"])
        shares = np.mean([line["buffers"] for line in found.values()])
        cells = [own["bytes"].mean(), shares, own["agrees"].mean(), *begun]
        kept, buffers, repeated, *digits = (f"{100 * x:.0f}" for x in cells)
        points = f"{100 * right.mean():.0f} % of {count} ({low:+.0f} to {high:+.0f})"
        divergence = f"{own['kl'].mean():.4f} ({less:.4f} to {more:.4f})"
        rows.append([policy, kept, buffers, points, ", ".join(digits), repeated, divergence])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="run/model of train_vlm.py")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--rows", type=int, default=32, help="prompts at once")
    parser.add_argument("--only", default="", help="policies whose name holds that, and the full cache")
    args = parser.parse_args(arguments)
    vlm = vlc.load(args.folder, dtype=jnp.float32, layout="stacked")
    lines = Lines(args.output, seed=HELD_OUT_SEED, rows=args.rows)
    wanted = {name: policy for name, policy in policies().items() if args.only in name or name == FULL}
    samples, chats, length = drawn(vlm, args.samples)
    for first in range(0, args.samples, args.rows):
        left = [name for name in wanted if not lines.has(TASK, name, first)]
        if not left:
            continue
        begun, some = time.monotonic(), (chats[first : first + args.rows] + chats[-1:] * args.rows)[: args.rows]
        repeated = any(wanted[name].repeats for name in left)
        batch = vlm.processor.chat(some, pad_to=length)
        prompts = answered(vlm, samples[first : first + args.rows], batch, repeated)
        print(f"from {first}, {length} tokens: {time.monotonic() - begun:.0f} s", flush=True)
        for name in left:
            lines.add(TASK, name, first, line := measure(vlm, prompts, wanted[name]))
            print(f"  {name}: {line['right']}, {100 * line['bytes']:.1f} %, {line['seconds']} s", flush=True)
    print(table(lines, samples))


if __name__ == "__main__":
    vlc.use_compilation_cache()
    main()
