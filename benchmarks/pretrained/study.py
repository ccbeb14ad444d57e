"""What compression costs a pretrained decoder: every policy on generated text tasks, at the bytes it takes.

    python benchmarks/pretrained/make_checkpoint.py smollm2
    python benchmarks/pretrained/study.py smollm2 --output pretrained.jsonl
    python benchmarks/pretrained/study.py smollm2 --output small.jsonl --small       # three methods, under five minutes

The prompts run through the model once; what each policy keeps is taken from that recording, by the library's own code,
and decoded by the real model. Every policy of a task is a JSON line: right answers, answers equal to the full cache's,
the log-likelihood of the full cache's answers, and the kept bytes as a share of a bfloat16 cache's. An interrupted
study goes on where it stopped. The table that is printed holds 95 % intervals of the paired difference to the full
cache, or to the policy that `--against` names. A policy is typed as everywhere else; `;others=4` behind it keeps the
tokens that it would evict at 4 bits.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tasks import TASKS, make_sample

import vlcache_jax as vlc
from vlcache_jax.demo.study.recording import Recording, Replay, record
from vlcache_jax.evaluation.metrics import bootstrap_interval
from vlcache_jax.files.writing import append_line
from vlcache_jax.policies import policy_by_name

FULL = "full_cache"
LENGTHS = {"codes": 16, "list": 16, "opening": 16}
"""Tasks of the study and their sentences of prose: those that the full cache answers; see docs/pretrained.md."""

SMALL = ("snap_kv:0.4", "full_cache,bits=4", "ranked_bits:0.25")
EVICTING = (
    "vl_cache",
    "snap_kv",
    "h2o",
    "tova",
    "pyramid_kv",
    "ada_kv",
    "mix_kv",
    "key_difference",
    "expected_attention",
)
BUDGETS = (0.05, 0.1, 0.25, 0.4, 0.6, 0.8)
STORED = (
    "full_cache,bits=8",
    "full_cache,bits=4",
    "full_cache,bits=2",
    "ranked_bits:0.1",
    "ranked_bits:0.25",
    "ranked_bits:0.4",
)


def grid() -> Iterator[str]:
    """The policies as they are typed."""
    yield from STORED
    for budget in reversed(BUDGETS):
        for method in EVICTING:
            yield f"{method}:{budget}"


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A batch of prompts and what the full cache makes of it."""

    batch: Any
    recording: Recording
    full: Any  # the full cache's Generation


def policy_of(text: str) -> vlc.Policy:
    """The policy that a text names."""
    typed, _, others = text.partition(";others=")
    policy = policy_by_name(typed)
    return dataclasses.replace(policy, evicted=vlc.Quantise(int(others))) if others else policy


def kept_share(stores: Any, prompt: Any, spec: Any) -> float:
    """Bytes of the kept tokens as a share of a bfloat16 cache of the whole prompts; free slots do not count.

    A float number counts two bytes whatever it was computed in; codes and their scales count what they take.
    """
    taken = 0.0
    for store in stores:
        slots = store.keys.shape[0] * store.keys.shape[1] * store.positions.shape[-1]
        arrays = [store.keys, store.values, store.key_scales, store.value_scales]
        if store.bits is None:
            size = sum(2 * x.size for x in arrays if x is not None)
        else:
            size = sum(x.nbytes for x in arrays if x is not None)
        heads = store.keys.shape[1] if store.lengths.shape[2] == 1 else 1
        taken += float(np.sum(np.asarray(store.lengths))) * heads * size / slots
    full = float(np.sum(np.asarray(prompt.lengths))) * spec.num_layers * spec.num_kv_heads * spec.head_dim * 4
    return taken / full


def prepare(vlm: Any, task: str, samples: int, sentences: int, rows: int, seed: int) -> tuple[list[Any], list[Prompts]]:
    """The samples of a task and their prompts, recorded and answered with the full cache."""
    drawn = [make_sample(task, seed, i, sentences) for i in range(samples)]
    length = max(len(vlm.processor.tokenizer.encode(sample.prompt, False)) for sample in drawn)
    model, prompts = Replay(vlm.model), []
    for first in range(0, samples, rows):
        some = [sample.prompt for sample in (drawn[first : first + rows] + drawn[-1:] * rows)[:rows]]
        batch = vlm.processor(images=[[]] * rows, text=some, pad_to=-(-length // 32) * 32)
        recording = jax.block_until_ready(record(vlm.model, vlm.params, batch))
        full, *_ = answered(model, vlm, batch, recording, vlc.FullCache(), drawn[0].max_new_tokens)
        prompts.append(Prompts(batch, recording, full))
    return drawn, prompts


def answered(model: Replay, vlm: Any, batch: Any, recording: Recording, policy: Any, tokens: int) -> tuple[Any, Any]:
    """Answers under a policy, and the context they were given in."""
    ctx = vlc.compress(model, {"model": vlm.params, "recording": recording}, batch, policy)
    return vlc.answer(ctx, None, max_new_tokens=tokens), ctx


def measure(vlm: Any, drawn: list[Any], prompts: list[Prompts], policy: Any) -> dict[str, Any]:
    """A policy's line: of each sample whether it is right and agrees, and how likely the full cache's answer is."""
    model, room, begun = Replay(vlm.model), drawn[0].max_new_tokens, time.monotonic()
    right, agrees, likely, share, texts = [], [], [], [], []
    for some in prompts:
        out, ctx = answered(model, vlm, some.batch, some.recording, policy, room)
        scores = vlc.score(ctx, some.full)
        texts += vlm.processor.decode(out)
        agrees += np.all(np.asarray(out.tokens) == np.asarray(some.full.tokens), axis=1).tolist()
        likely += np.asarray(scores.total).tolist()
        share.append(kept_share(ctx.stores, some.batch, vlm.model.spec))
    count = len(drawn)
    right = [sample.right(text) for sample, text in zip(drawn, texts[:count], strict=True)]
    return {
        "right": "".join(str(int(x)) for x in right),
        "agrees": "".join(str(int(x)) for x in agrees[:count]),
        "log_likelihood": [round(x, 3) for x in likely[:count]],
        "bytes": round(float(np.mean(share)), 4),
        "seconds": round(time.monotonic() - begun, 1),
        "answers": texts[:3],
    }


def table(lines: dict[tuple[str, str], dict[str, Any]], against: str = FULL) -> str:
    """Markdown: for each policy its bytes, and of each task and of all right answers and their difference to another's.

    Of all tasks together also how much likelier the full cache's answer is, in nats, than under that other policy.
    """
    tasks = list(dict.fromkeys(task for task, _ in lines))
    columns = [*(f"{task}: right, agrees, %" for task in tasks), "all: right", "log-likelihood"]
    rows = [["policy", "bytes, %", *columns]]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    bits = lambda line, name: np.array([float(x) for x in line[name]])  # noqa: E731
    for policy in dict.fromkeys(policy for _, policy in lines):
        found = [lines[task, policy] for task in tasks if (task, policy) in lines]
        if len(found) < len(tasks):
            continue
        cells, gained, likelier = [], [], []
        for task, line in zip(tasks, found, strict=True):
            right = bits(line, "right")
            other = lines[task, against]
            gained.append(100 * (right - bits(other, "right")))
            likelier.append(np.subtract(line["log_likelihood"], other["log_likelihood"]))
            _, low, high = bootstrap_interval(gained[-1])
            cells.append(
                f"{100 * right.mean():.0f} ({low:+.0f} to {high:+.0f}), {100 * bits(line, 'agrees').mean():.0f}"
            )
        for name, differences, unit, digits in (("right", gained, 100, 0), ("log_likelihood", likelier, 1, 2)):
            _, low, high = bootstrap_interval(np.concatenate(differences))
            mean = unit * np.mean([np.mean(bits(line, name)) for line in found])
            cells.append(f"{mean:.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})")
        rows.append([policy, f"{100 * np.mean([x['bytes'] for x in found]):.0f}", *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="from make_checkpoint.py")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--policy", nargs="+", help="instead of the grid")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(LENGTHS))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sentences", type=int, help="of prose around the facts")
    parser.add_argument("--rows", type=int, default=16, help="prompts at once")
    parser.add_argument("--seed", type=int, default=0, help="of the samples: 0 for development, 1 to measure")
    parser.add_argument("--against", default=FULL, help="the policy that the table compares with")
    parser.add_argument("--small", action="store_true", help="three policies, 40 samples of one task")
    args = parser.parse_args()
    policies = [FULL, *(args.policy or (SMALL if args.small else grid()))]
    tasks = args.task[:1] if args.small else args.task
    samples = 40 if args.small else args.samples
    vlm = vlc.load(args.folder, dtype=jnp.float32)
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    if args.output.exists():
        for text in args.output.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            lines[line["task"], line["policy"]] = line
    for task in tasks:
        left = [name for name in policies if (task, name) not in lines]
        if not left:
            continue
        print(f"{task}: {samples} prompts", flush=True)
        drawn, prompts = prepare(vlm, task, samples, args.sentences or LENGTHS.get(task, 16), args.rows, args.seed)
        for name in left:
            line = {"task": task, "policy": name} | measure(vlm, drawn, prompts, policy_of(name))
            append_line(args.output, json.dumps(line))
            lines[task, name] = line
            right = np.mean([float(x) for x in line["right"]])
            print(f"{task} {name}: {100 * right:.0f} % right, {100 * line['bytes']:.1f} % of the bytes", flush=True)
        jax.clear_caches()
    print(table(lines, args.against))


if __name__ == "__main__":
    main()
