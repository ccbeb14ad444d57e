"""What the attention of a pretrained decoder is like: whether layers differ, and whether few tokens get most of it.

    python benchmarks/pretrained/attention.py smollm2 --plot layers.png

Of every layer, averaged over prompts: VL-Cache's density, the share of the first token, the share of the other tokens
that it takes to hold 90 % of what the last rows give them, and how much of the answer's attention the tokens hold that
these rows rank first. The prompts are those of study.py.
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from study import LENGTHS, compress, draw, prepare

import vlcache_jax as vlc
from vlcache_jax.demo.study.oracle import answer_attention
from vlcache_jax.demo.study.recording import Recording
from vlcache_jax.files.writing import replacing

ROWS = 32  # of the prompt's end, which VL-Cache and SnapKV score with
MASS = 0.9
SHARES = (0.1, 0.25, 0.4)


@partial(jax.jit, static_argnames="rows")
def received(recording: Recording, lengths: jax.Array, rows: int = ROWS) -> jax.Array:
    """Attention that each prompt's last rows give to its tokens, f32 [layers, batch, heads, length]; sums to 1."""
    place = jnp.arange(recording.key.shape[2])[None]
    last = (place >= lengths[:, None] - rows) & (place < lengths[:, None])

    def of_layer(layer: tuple[jax.Array, jax.Array]) -> jax.Array:
        query, key = layer
        key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where((place <= place.T)[None, None], logits, -jnp.inf))
        return jnp.einsum("bhqk,bq->bhk", weights, last.astype(weights.dtype)) / rows

    return jax.lax.map(of_layer, (recording.query, recording.key))


def needed(mass: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The share of each prompt's tokens that holds `MASS` of `mass` [..., length], f64 [...]; batch is axis 1."""
    held = np.cumsum(-np.sort(-mass, axis=-1), axis=-1)
    count = np.sum(held < MASS * held[..., -1:], axis=-1) + 1
    return count / lengths.reshape(1, -1, *[1] * (count.ndim - 2))


def held(scores: np.ndarray, wanted: np.ndarray, lengths: np.ndarray, share: float) -> np.ndarray:
    """How much of `wanted` the best-scored tokens hold, [layers, batch, kv_heads, length] both; the first one apart."""
    order = np.argsort(-scores[..., 1:], axis=-1)
    counts = np.floor(share * lengths)[None, :, None, None]
    sorted_, total = np.take_along_axis(wanted[..., 1:], order, -1), wanted[..., 1:].sum(-1)
    return np.sum(sorted_ * (np.arange(order.shape[-1]) < counts), axis=-1) / np.maximum(total, 1e-9)


def measure(vlm: vlc.VLM, task: str, samples: int) -> dict[str, np.ndarray]:
    """By name: f64 [layers], averaged over samples; of what the heads need also the least and the most of a layer."""
    drawn, length = draw(vlm, task, samples, LENGTHS[task], seed=0)
    prompts = prepare(vlm, drawn, length, samples)
    lengths, recording = np.asarray(prompts.batch.lengths), prompts.recording
    mass = np.asarray(received(recording, jnp.asarray(lengths)))
    others = np.where(np.arange(length) > 0, mass, 0)
    answer = np.asarray(
        answer_attention(
            vlm.model, vlm.params, recording, jnp.asarray(lengths), prompts.answers.tokens, prompts.answers.lengths
        )
    )
    by_head = np.mean(mass.reshape(*mass.shape[:2], answer.shape[2], -1, length), axis=3)
    density = compress(vlm, prompts.batch, recording, vlc.VLCache(0.1)).report.density
    heads = np.mean(needed(others, lengths), axis=1)  # [layers, heads]
    found = {
        "density": np.mean(np.asarray(density), axis=0),
        "first": np.mean(mass[..., 0], axis=(1, 2)),
        "heads": heads.mean(axis=1),
        "least": heads.min(axis=1),
        "most": heads.max(axis=1),
        "layer": np.mean(needed(np.mean(others, axis=2), lengths), axis=1),
    }
    for share in SHARES:
        found[f"held {share:g}"] = np.mean(held(by_head, answer, lengths, share), axis=(1, 2))
        found[f"best {share:g}"] = np.mean(held(answer, answer, lengths, share), axis=(1, 2))
    return found


def plot(found: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Three panels over the layers; a line for each task. Dotted: all heads together, and the best that can be."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    for color, (task, values) in zip(("C0", "C1", "C2", "C3", "C4", "C5"), found.items(), strict=False):
        layers = np.arange(len(values["first"]))
        first.plot(layers, 100 * values["first"], color, label=task)
        second.plot(layers, 100 * values["heads"], color)
        second.plot(layers, 100 * values["layer"], color, linestyle=":")
        third.plot(layers, 100 * values["held 0.1"], color, label=task)
        third.plot(layers, 100 * values["best 0.1"], color, linestyle=":")
    titles = (
        "attention to the first token",
        "tokens that hold 90 % of the rest",
        "of the answer's, in a tenth of the tokens",
    )
    for axes, title in zip((first, second, third), titles, strict=True):
        axes.set(title=f"{title}, %", xlabel="layer", ylim=(0, 100))
        axes.title.set_size(10)
    first.legend()
    with replacing(path) as stream:
        figure.savefig(stream, format="png", dpi=90, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="from make_checkpoint.py")
    parser.add_argument("--samples", type=int, default=4, help="of each task")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a .png")
    args = parser.parse_args()
    vlm = vlc.load(args.folder, dtype=jnp.float32)
    found = {task: measure(vlm, task, args.samples) for task in LENGTHS}
    for task, values in found.items():
        print(task)
        for name, value in values.items():
            shown = " ".join(f"{100 * x:.0f}" if name != "density" else f"{x:.3f}" for x in value)
            print(f"  {name}, mean {value.mean():.3f}: {shown}")
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
