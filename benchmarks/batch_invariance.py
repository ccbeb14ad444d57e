"""Whether a row of a batch keeps the tokens that it keeps alone: random policies on random ragged prompts.

python benchmarks/batch_invariance.py --progress progress.jsonl

A case is one row of a batch, and the same row alone, padded to another length and by other tokens: a random policy
(any method, any of its options, any kind of budget), a prompt of 1 to 300 tokens with 0 to 3 images, a third of the
prompts of a few different tokens only, so that scores tie. A small random LLaVA computes queries, keys and values, in
the batch and alone; the library's own prefill scores, shares and selects them. Every layer and KV head must keep the
same positions.

Where it does not, the scores of the tokens that changed places are compared: alike to `TIE`, they tie, and rounding
chose. Policies that evict while decoding answer `--answers` prompts as well: the tokens must be the same.

Programs are compiled once for each policy, and the prompts of all of a policy's cases run through them. What is done is
written to `--progress` policy by policy, and is not done again.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np

import vlcache_jax as vlc
from vlcache_jax.demo.study.recording import Recording, Replay, record
from vlcache_jax.files.json_text import parse_json
from vlcache_jax.files.reading import read_plain
from vlcache_jax.files.writing import append_line
from vlcache_jax.inference.validation import check_prefill
from vlcache_jax.inputs import TEXT
from vlcache_jax.models.families.llava.model import Llava
from vlcache_jax.policies import METHODS as KNOWN
from vlcache_jax.policies.scores.attention import Derived
from vlcache_jax.policies.window import AverageShare

TIE = 2.0**-18
"""Relative difference of two scores, in units of the larger, below which rounding decides."""

IMAGES, ALONE = 3, 16  # the most images of a prompt; tokens by which the padding of a row alone differs
RULES = ("evict", "window:5", "recompress:6")


def model_and_params() -> tuple[Llava, Any]:
    """A model whose attention is sharp enough that tokens differ."""
    model = Llava(harness.SHAPES["smoke"], jnp.float32)
    rng = np.random.default_rng(1)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        scale = 0.12 if len(leaf.shape) > 2 else 0.02
        drawn = np.ones(leaf.shape) if path[-1].key == "scale" else scale * rng.normal(size=leaf.shape)
        return drawn.astype(np.float32)

    return model, jax.tree_util.tree_map_with_path(draw, model.abstract_params())


METHODS = sorted(set(KNOWN) - {"full_cache"})


def random_policy(rng: np.random.Generator, side: int, name: str) -> vlc.Policy:
    """A method with random options, which are drawn again where they do not go together."""

    def some(*values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    while True:
        budget = some(
            round(float(rng.uniform(0.01, 0.95)), 2), round(float(rng.uniform(0.01, 0.3)), 2),
            vlc.Tokens(int(rng.integers(2, 120))), vlc.Bytes(int(rng.integers(3000, 60000))),
            vlc.Mass(round(float(rng.uniform(0.3, 0.99)), 2), cap=round(float(rng.uniform(0.1, 0.9)), 2)),
        )  # fmt: skip
        options: dict[str, Any] = {"budget": budget}
        window = some(None, 4, 8, 32)
        recent = some(None, 0.0, 0.1, 0.5, vlc.Tokens(7), vlc.Window(int(rng.integers(1, 40))), AverageShare(0.2))
        pool = {"pool": some(1, 3, 5, 7), "pooling": some("mean", "max"), "grid_side": some(None, side)}
        own = {
            "vl_cache": {
                "heads": some("each", "shared"), "total": some("exact", "exact", "paper", "effivlm"), "recent": recent,
                "rows": some(None, vlc.LastRows(50)), "mask_visual_sinks": some(False, True), **pool,
            },
            "snap_kv": {"window": window, "recent": recent, "heads": some("each", "shared"), **pool},
            "pyramid_kv": {"window": window, "recent": recent, "beta": some(1, 5, 20), "pool": pool["pool"]},
            "ada_kv": {
                "window": window, "recent": recent, "floor_alpha": some(0.0, 0.2, 0.5), "pyramid": some(False, True),
                "lanes": some(1, 2), "pool": pool["pool"], "pooling": pool["pooling"],
            },
            "mix_kv": {"window": window, "recent": recent, "pool": pool["pool"]},
            "tgv_kv": {"sinks": some(0, 4, 9)},
            "csp": {"window": window, "recent": recent, "cross": some(0, 0.1, 0.5)},
            "critical_kv": {
                "window": window, "recent": recent, "first": some(0, 0.5, 1), "pool": pool["pool"],
                "pooling": pool["pooling"],
            },
            "sparse_mm": {"window": window, "recent": recent, "part": some(0, 0.1), "lanes": some(1, 2)},
            "kv_zip": {"sinks": some(0, 4), "lanes": some(1, 2)},
            "compactor": {
                "blend": some(None, 0.35), "sketch": some(4, 48), "chunk": some(7, 256), "sinks": some(0, 8),
                "recent": some(0, 4),
            },
            "lag_kv": {"sinks": some(0, 4), "lag": some(4, 16, 128)},
            "h2o": {"recent": some(0.0, 0.1, 0.5), "normalised": some(False, True)},
            "look_m": {"selection": some("paper", "code"), "merge": some("pivotal", None)},
            "prefix_kv": {"sinks": some(0, 4, 9), "recent": some(0.0, 0.2)},
            "expected_attention": {"sinks": some(0, 4, 9), "future": some(16, 64), "recent": some(0.0, 0.2)},
            "streaming_llm": {"sinks": some(0, 4, 9)},
            "air_cache": {"ratio": some(0.2, 0.9)},
            "zip_vl": {"mass": some(0.6, 0.975), "evicted": some("drop", "quantise")},
        }.get(name, {})  # fmt: skip
        options |= {k: v for k, v in own.items() if v is not None or k == "merge"}
        if name != "zip_vl":
            options["bits"] = some(None, None, 8, 4)
            if name != "look_m" or options["merge"] is None:
                options["candidate_fraction"] = some(1.0, 1.0, 0.5, 0.9)
        if name in ("vl_cache", "snap_kv", "ada_kv", "prefix_kv", "expected_attention", "key_norm"):
            options["evicted"] = some(vlc.Drop(), vlc.Drop(), vlc.Quantise(2), vlc.Merge("pivotal"))
        if name in ("h2o", "tova", "streaming_llm"):
            options["decoding"] = some("append", *RULES)
        elif name not in ("zip_vl", "look_m"):
            options["decoding"] = some(vlc.Append(), vlc.RollingWindow(5), vlc.Recompress(6))
        try:
            policy = KNOWN[name].make(**options)
            check_prefill(Llava(harness.SHAPES["smoke"]).spec, _probe(), policy, 4)  # what the model cannot do
        except (vlc.PolicyError, AssertionError):
            continue
        return policy


@functools.cache
def _probe() -> vlc.Batch:
    index = np.full((1, 8), TEXT, np.int32)
    return vlc.Batch(np.zeros_like(index), np.array([8], np.int32), index, np.zeros((1, IMAGES, 32, 32, 3), np.float32))


def random_prompts(rng: np.random.Generator, rows: int, length: int, most: int, features: int) -> vlc.Batch:
    """Ragged prompts, padded to `length`."""
    tokens = np.zeros((rows, length), np.int32)
    index = np.full((rows, length), TEXT, np.int32)
    lengths = rng.integers(1, most + 1, rows).astype(np.int32)
    for row, n in enumerate(lengths):
        kinds = 64 if rng.random() < 2 / 3 else int(rng.integers(1, 4))
        tokens[row, :n] = rng.choice(rng.integers(4, 64, kinds), n)
        at = int(rng.integers(0, 6))
        for image in range(int(rng.integers(0, IMAGES + 1))):
            kept = np.sort(rng.permutation(features)[: int(rng.integers(4, features + 1))])
            if at + len(kept) > n:
                break
            index[row, at : at + len(kept)] = image * features + kept
            at += len(kept) + int(rng.integers(0, 20))
    tokens[index != TEXT] = harness.IMAGE_TOKEN
    return vlc.Batch(tokens, lengths, index, rng.normal(size=(rows, IMAGES, 32, 32, 3)).astype(np.float32))


def alone(batch: vlc.Batch, row: int, length: int) -> vlc.Batch:
    """One row, padded to `length` with other tokens than those of the batch."""
    n = int(batch.lengths[row])
    tokens, index = np.full((1, length), 9, np.int32), np.full((1, length), TEXT, np.int32)
    tokens[0, :n], index[0, :n] = batch.tokens[row, :n], batch.vision_index[row, :n]
    return vlc.Batch(tokens, batch.lengths[row : row + 1], index, batch.pixels[row : row + 1])


@functools.partial(jax.jit, static_argnames=("model", "policy"))
def kept_positions(model: Replay, policy: vlc.Policy, recording: Recording, batch: vlc.Batch) -> list[jax.Array]:
    """i32 [batch, kv_heads, n] for each layer, ascending, -1 where there are fewer."""
    _, state = vlc.prefill(model, {"model": {}, "recording": recording}, batch, policy).start(4)
    return [state.kept_positions(layer) for layer in range(model.spec.num_layers)]


def recorded(model: Llava, params: Any, batch: vlc.Batch, policy: vlc.Policy) -> Recording:
    """What the layers compute of a batch; said twice, if the policy has it so."""
    if not policy.repeats:
        return record(model, params, batch)
    tokens, index = (np.pad(x, ((0, 0), (0, batch.length))) for x in (batch.tokens, batch.vision_index))
    for row, n in enumerate(batch.lengths):
        for x in (tokens, index):
            x[row, n : 2 * n] = x[row, :n]
        index[row, 2 * n :] = TEXT
    return record(model, params, vlc.Batch(tokens, 2 * batch.lengths, index, batch.pixels))


def sets(kept: list[jax.Array], row: int) -> list[list[list[int]]]:
    """Of one row: lists of positions [layer][head]."""
    return [[head[head >= 0].tolist() for head in np.asarray(layer)[row]] for layer in kept]


@dataclasses.dataclass(frozen=True)
class Seen(Derived):
    """A score that shows what it computes to `note`."""

    note: Any

    def __call__(self, inputs: Any) -> jax.Array:
        """See `Score.__call__`."""
        scores = self.score(inputs)
        jax.debug.callback(self.note, inputs.layer, scores)
        return scores


def judge(model: Replay, policy: vlc.Policy, recording: Recording, one: vlc.Batch, together: Any, own: Any) -> str:
    """ "tie" if in every layer and head the tokens that changed places score alike; else what differs."""
    found: dict[int, np.ndarray] = {}
    seen = dataclasses.replace(policy, score=Seen(policy.score, lambda layer, x: found.__setitem__(int(layer), x)))
    jax.block_until_ready(kept_positions(model, seen, recording, one))
    jax.effects_barrier()
    for layer, (a, b) in enumerate(zip(together, own, strict=True)):
        for head, (x, y) in enumerate(zip(a, b, strict=True)):
            if x == y:
                continue
            if len(x) != len(y):
                return f"layer {layer}: {len(x)} slots and {len(y)}"
            scores = np.asarray(found[layer], np.float64)[0, min(head, found[layer].shape[1] - 1)]
            changed = scores[sorted(set(x) ^ set(y))]
            if np.ptp(changed) > TIE * np.abs(changed).max():
                return f"layer {layer}, head {head}: scores {changed.tolist()}"
    return "tie"


def run_policy(
    model: Llava, params: Any, policy: vlc.Policy, rng: np.random.Generator, args: argparse.Namespace
) -> Any:
    """The cases of one policy."""
    replay, features = Replay(model), model.config.features_per_tile
    longer = args.length + 4
    mismatches, cases = [], -(-args.cases // args.policies)
    for first in range(0, cases, args.rows):
        batch = random_prompts(rng, args.rows, longer, args.length, features)
        together = kept_positions(replay, policy, recorded(model, params, batch, policy), batch)
        for row in range(min(args.rows, cases - first)):
            one = alone(batch, row, longer + ALONE)
            recording = recorded(model, params, one, policy)
            a, b = sets(together, row), sets(kept_positions(replay, policy, recording, one), 0)
            if a != b:
                what = judge(replay, policy, recording, one, a, b)
                mismatches.append({"length": int(batch.lengths[row]), "what": what})
    answers = args.answers if policy.rule.rewrites_context else 0
    for first in range(0, answers, args.rows):
        batch = random_prompts(rng, args.rows, longer, args.length, features)
        options: dict[str, Any] = {"policy": policy, "max_new_tokens": 16, "eos_token_ids": []}
        together = vlc.generate(model, params, batch, **options).tokens
        for row in range(min(args.rows, answers - first)):
            own = vlc.generate(model, params, alone(batch, row, longer + ALONE), **options).tokens
            if not np.array_equal(together[row], own[0]):
                mismatches.append({"length": int(batch.lengths[row]), "what": "answer"})
    return {"cases": cases, "answers": answers, "mismatches": mismatches}


def _read_progress(path: Path, settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """What earlier runs with the same settings did. A line that a stopped run left unfinished is done again."""
    done = {}
    for number, text in enumerate(read_plain(path).splitlines(), 1):
        try:
            line = parse_json(text)
            if line["settings"] == settings:
                done[int(line["number"])] = line
        except (ValueError, TypeError, KeyError) as error:
            print(f"{path}, line {number} is left out, and done again: {error}", file=sys.stderr)
    return done


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="rows compared, over all policies")
    parser.add_argument("--policies", type=int, default=100)
    parser.add_argument("--rows", type=int, default=10, help="of a batch")
    parser.add_argument("--length", type=int, default=300, help="the longest prompt")
    parser.add_argument("--answers", type=int, default=10, help="of each policy that evicts while decoding")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="NAME")
    parser.add_argument("--progress", metavar="FILE", type=Path, help="what is done, and is not done again")
    args = parser.parse_args()

    warnings.simplefilter("ignore", vlc.PolicyWarning)
    settings = {k: getattr(args, k) for k in ("cases", "policies", "rows", "length", "answers", "seed", "methods")}
    done: dict[int, Any] = {}
    if args.progress is not None and args.progress.exists():
        done = _read_progress(args.progress, settings)
    model, params = model_and_params()
    start = time.perf_counter()
    for number in range(args.policies):
        if number in done:
            continue
        rng = np.random.default_rng([args.seed, number])
        policy = random_policy(rng, model.spec.vision_grid or 0, args.methods[number % len(args.methods)])
        line = {"number": number, "settings": settings, "policy": policy.name, "options": str(policy)}
        done[number] = line | run_policy(model, params, policy, rng, args)
        if args.progress is not None:
            append_line(args.progress, json.dumps(done[number]))
        print(
            f"{number + 1} of {args.policies}, {time.perf_counter() - start:.0f} s: {policy.name}, "
            f"{len(done[number]['mismatches'])} mismatches",
            file=sys.stderr,
        )
        if number % 10 == 9:
            jax.clear_caches()  # every program takes memory mappings, of which Linux allows a process 65,530

    rows = [done[number] for number in sorted(done)]
    names = sorted({row["policy"] for row in rows})
    table = []
    for name in [*names, "all"]:
        some = [row for row in rows if name in (row["policy"], "all")]
        found = [x["what"] for row in some for x in row["mismatches"]]
        table.append([
            name, str(len(some)), str(sum(row["cases"] for row in some)), str(sum(row["answers"] for row in some)),
            str(found.count("tie")), str(len(found) - found.count("tie")),
        ])  # fmt: skip
    harness.table(["method", "policies", "cases", "answers", "exact ties", "other mismatches"], table)
    for row in rows:
        for x in row["mismatches"]:
            if x["what"] != "tie":
                print(f"{row['options']}: {x['length']} tokens: {x['what']}")
    harness.finish("batch_invariance", settings, rows, args.json)


if __name__ == "__main__":
    main()
