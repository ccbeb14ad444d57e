"""What compression costs a pretrained decoder: every policy on generated text tasks, at the bytes it takes.

    python benchmarks/pretrained/make_checkpoint.py smollm2
    python benchmarks/pretrained/study.py smollm2 --output pretrained.jsonl
    python benchmarks/pretrained/study.py smollm2 --output small.jsonl --small  # three methods, two budgets

The prompts run through the model once; what each policy keeps is taken from that recording, by the library's own code,
and decoded by the real model. A JSON line holds a policy on one batch of a task: right answers, answers equal to the
full cache's, the divergence from the full cache along its answers, their log-likelihood, and the kept bytes as a share
of a bfloat16 cache's. A study goes on where it was interrupted. The table that is printed holds 95 % intervals of the
paired difference to the full cache, or to the policy that `--against` names, on the samples that both have. A policy is
typed as everywhere else; `;others=4` behind it keeps the tokens that it would evict at 4 bits.

Most of the time is compilation. So the layers' weights stay stacked, which compiles one layer and not thirty, all tasks
are padded to one length, and programs are kept in the command line's cache for the next piece of a study.
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
from tasks import MAX_NEW_TOKENS, TASKS, make_sample

import vlcache_jax as vlc
from vlcache_jax.demo.study.recording import Recording, Replay, record
from vlcache_jax.evaluation.metrics import bootstrap_interval
from vlcache_jax.files.writing import append_line
from vlcache_jax.policies import policy_by_name

FULL = "full_cache"
LENGTHS = {"codes": 16, "list": 16, "opening": 16, "instruction": 16}
"""Tasks of the study and their sentences of prose: those that the full cache answers; see docs/pretrained.md."""

SMALL = (
    "full_cache,bits=4",
    "full_cache,bits=8",
    *(f"{x}:{b}" for x in ("snap_kv", "ranked_bits") for b in (0.25, 0.4)),
)
EVICTING = ("snap_kv", "h2o", "vl_cache", "ada_kv", "critical_kv", "tgv_kv", "kv_zip", "lag_kv")
BUDGETS = (0.4, 0.25)
STORED = (
    "full_cache,bits=8",
    "full_cache,bits=4",
    "ranked_bits:0.1",
    "ranked_bits:0.25",
    "ranked_bits:0.3",
    "ranked_bits:0.4",
    *(f"ranked_bits:{budget},repeat=true" for budget in (0.02, 0.05, 0.1, 0.25, 0.3)),
)
RETOLD = (*(f"kv_zip:bytes:{b},bits=8" for b in (0.4, 0.3, 0.25)), "kv_zip:bytes:0.25,bits=4")
"""What the prompt's repetition looks at, in one precision; budgets in bytes."""

MEASURES = ("right", "agrees", "kl", "log_likelihood")


def grid() -> Iterator[str]:
    """The policies as they are typed."""
    yield from STORED
    yield from RETOLD
    for budget in BUDGETS:
        for method in EVICTING:
            yield f"{method}:{budget}"


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A batch of prompts and what the full cache makes of it."""

    samples: list[Any]  # those that count; the others fill the batch
    batch: Any
    recording: Recording
    context: Any  # of the full cache
    answers: Any  # the full cache's Generation
    question: Any = None  # asked when the prompts have been compressed


def policy_of(text: str) -> vlc.Policy:
    """The policy that a text names."""
    typed, _, others = text.partition(";others=")
    policy = policy_by_name(typed)
    bits = int(others) if others.isdecimal() else others
    return dataclasses.replace(policy, evicted=vlc.Quantise(bits)) if others else policy


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


def buffers_share(context: Any) -> float:
    """Bytes of a context's buffers as a share of a 16-bit cache's; in short prompts many slots are free.

    Of a context of a float32 model, whose stores are all floats or all codes.
    """
    coded = all(store.bits is not None for store in context.stores)
    return context.report.state_bytes / context.report.full_bytes * (2 if coded else 1)


def draw(vlm: Any, tasks: list[str], count: int, sentences: int | None, seed: int) -> tuple[dict[str, list[Any]], int]:
    """So many samples of each task, and how many tokens all of their prompts are padded to."""
    drawn = {
        task: [make_sample(task, seed, i, sentences or LENGTHS.get(task, 16)) for i in range(count)] for task in tasks
    }
    prompts = [sample.prompt for samples in drawn.values() for sample in samples]
    longest = max(len(vlm.processor.tokenizer.encode(prompt, False)) for prompt in prompts)
    return drawn, -(-longest // 64) * 64


def prepare(
    vlm: Any, samples: list[Any], length: int, rows: int, repeated: bool = False, before: bool = False
) -> Prompts:
    """A batch of prompts, recorded (`repeated`: as said twice, see `record`) and answered with the full cache.

    `before`: they end where the question begins, which comes when they have been compressed.
    """
    filled = (samples + samples[-1:] * rows)[:rows]
    texts = [sample.split[0] if before else sample.prompt for sample in filled]
    question = vlm.processor.continuation([sample.split[1] for sample in filled], pad_to=32) if before else None
    batch = vlm.processor(images=[[]] * rows, text=texts, pad_to=length)
    return answered(vlm, samples, batch, repeated, question)


def answered(vlm: Any, samples: list[Any], batch: Any, repeated: bool = False, question: Any = None) -> Prompts:
    """A batch whose first prompts are those of `samples`, recorded and answered with the full cache."""
    recording = jax.block_until_ready(record(vlm.model, vlm.params, batch, repeated))
    context = asked(compress(vlm, batch, recording, vlc.FullCache()), question)
    answers = vlc.answer(context, None, max_new_tokens=MAX_NEW_TOKENS)
    return Prompts(samples, batch, recording, context, answers, question)


def asked(context: Any, question: Any) -> Any:
    """The context with the question behind it, if there is one yet to ask."""
    return context if question is None else vlc.extend(context, question)


def compress(vlm: Any, batch: Any, recording: Recording, policy: Any) -> Any:
    """The context that a policy keeps; one that has prompts said twice runs them itself if that was not recorded."""
    if policy.repeats and recording.key.shape[2] == batch.length:
        return vlc.compress(vlm.model, vlm.params, batch, policy)
    return vlc.compress(Replay(vlm.model), {"model": vlm.params, "recording": recording}, batch, policy)


def measure(vlm: Any, prompts: Prompts, policy: Any) -> dict[str, Any]:
    """A policy's line: of each sample whether it is right and agrees, and what becomes of the full cache's answer."""
    begun, count, full = time.monotonic(), len(prompts.samples), prompts.answers
    compressed = compress(vlm, prompts.batch, prompts.recording, policy)
    kept = asked(compressed, prompts.question)
    out = vlc.answer(kept, None, max_new_tokens=MAX_NEW_TOKENS)
    texts = vlm.processor.decode(out)[:count]
    agrees = np.all(np.asarray(out.tokens) == np.asarray(full.tokens), axis=1)[:count]
    found = vlc.divergence(prompts.context, kept, full)
    likely = np.asarray(jnp.sum(found.log_probabilities, axis=-1))
    return {
        "right": "".join(str(int(x.right(text))) for x, text in zip(prompts.samples, texts, strict=True)),
        "agrees": "".join(str(int(x)) for x in agrees),
        "kl": [float(f"{x:.4g}") for x in np.asarray(found.mean)[:count]],
        "log_likelihood": [round(x, 3) for x in likely.tolist()[:count]],
        "bytes": round(kept_share(compressed.stores, prompts.batch, vlm.model.spec), 4),
        "seconds": round(time.monotonic() - begun, 1),
        "buffers": round(buffers_share(compressed), 4),
        "answers": texts,
    }


class Lines:
    """The file of a study: for each task and policy the measures of its samples, in their order."""

    def __init__(self, path: Path, **drawn: int) -> None:
        """Reads what there is of samples that were drawn so, in such batches, and the rest not at all."""
        self.path, self.drawn = path, drawn
        self.found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
        if path.exists():
            for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
                if all(line.get(name, 0) == value for name, value in drawn.items()):
                    self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        self.found.setdefault((line["task"], line["policy"]), {})[line["first"]] = line

    def add(self, task: str, policy: str, first: int, measured: dict[str, Any]) -> None:
        """Appends a policy's measures of a batch, whose first sample is number `first`."""
        line = {"task": task, "policy": policy, "first": first, **self.drawn, **measured}
        append_line(self.path, json.dumps(line))
        self._take(line)

    def has(self, task: str, policy: str, first: int) -> bool:
        """Whether this batch is there."""
        return first in self.found.get((task, policy), {})

    def values(self, task: str, policy: str) -> dict[str, np.ndarray]:
        """By the names of `MEASURES`, f64 [samples]; and "bytes" of each batch."""
        lines = [line for _, line in sorted(self.found[task, policy].items())]
        found = {name: np.array([float(x) for line in lines for x in line[name]]) for name in MEASURES}
        return found | {"bytes": np.array([line["bytes"] for line in lines])}

    def table(self, against: str = FULL) -> str:
        """Markdown: of each task the right answers, then of all every measure and its difference to another policy's.

        In per cent, for each policy that has all tasks; divergence in nats a token, log-likelihood in nats an answer.
        """
        tasks = list(dict.fromkeys(task for task, _ in self.found))
        columns = [f"{task}, right" for task in tasks] + ["all, right", "agrees", "divergence", "log-likelihood"]
        rows = [["policy", "samples", "bytes", *columns]]
        rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
        for policy in dict.fromkeys(policy for _, policy in self.found):
            if not all((task, name) in self.found for task in tasks for name in (policy, against)):
                continue
            own, other = ([self.values(task, name) for task in tasks] for name in (policy, against))
            counts = [min(len(x["kl"]), len(y["kl"])) for x, y in zip(own, other, strict=True)]
            cells = [f"{100 * x['right'].mean():.0f}" for x in own]
            for name, unit, digits in (("right", 100, 0), ("agrees", 100, 0), ("kl", 1, 4), ("log_likelihood", 1, 2)):
                gained = [unit * (x[name][:n] - y[name][:n]) for x, y, n in zip(own, other, counts, strict=True)]
                _, low, high = bootstrap_interval(np.concatenate(gained))
                mean = unit * np.mean([x[name].mean() for x in own])
                cells.append(f"{mean:.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})")
            share = f"{100 * np.mean([x['bytes'].mean() for x in own]):.1f}"
            rows.append([policy, str(sum(len(x["kl"]) for x in own)), share, *cells])
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="from make_checkpoint.py")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--policy", nargs="+", help="instead of the grid")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(LENGTHS))
    parser.add_argument("--samples", type=int, default=32, help="of each task")
    parser.add_argument("--sentences", type=int, help="of prose around the facts")
    parser.add_argument("--rows", type=int, default=32, help="prompts at once")
    parser.add_argument("--seed", type=int, default=0, help="of the samples: 0 for development, 1 to measure")
    parser.add_argument("--before", action="store_true", help="compress before the question is known")
    parser.add_argument("--against", default=FULL, help="the policy that the table compares with")
    parser.add_argument("--small", action="store_true", help="three methods at two budgets, 40 samples of one task")
    args = parser.parse_args()
    policies = list(dict.fromkeys([FULL, *(args.policy or (SMALL if args.small else grid()))]))
    tasks, samples, rows = (args.task[:1], 40, 40) if args.small else (args.task, args.samples, args.rows)
    vlc.use_compilation_cache()
    vlm = vlc.load(args.folder, dtype=jnp.float32, layout="stacked")
    lines = Lines(args.output, seed=args.seed, sentences=args.sentences or 0, rows=rows, before=int(args.before))
    drawn, length = draw(vlm, tasks, samples, args.sentences, args.seed)
    for task, of_task in drawn.items():
        for first in range(0, samples, rows):
            left = [name for name in policies if not lines.has(task, name, first)]
            if not left:
                continue
            begun = time.monotonic()
            repeated = any(policy_of(name).repeats for name in left)
            prompts = prepare(vlm, of_task[first : first + rows], length, rows, repeated, args.before)
            print(f"{task} from {first}, {length} tokens: {time.monotonic() - begun:.0f} s", flush=True)
            for name in left:
                lines.add(task, name, first, line := measure(vlm, prompts, policy_of(name)))
                print(f"  {name}: {line['right']}, {100 * line['bytes']:.1f} %, {line['seconds']} s", flush=True)
    print(lines.table(args.against))


if __name__ == "__main__":
    main()
