"""What the attention of a pretrained decoder is like: whether layers differ, and whether few tokens get most of it.

    python benchmarks/pretrained/attention.py smollm2 --plot layers.png
    python benchmarks/pretrained/attention.py run/model --pictures --plot layers.png  # train_vlm.py's, and the demo's

Of every layer, averaged over prompts: VL-Cache's density, the share of the first token and of all visual ones, the
share of the other tokens that it takes to hold 90 % of what the scoring rows give them, and how much of the answer's
attention the tokens hold that these rows rank first. The scoring rows are VL-Cache's: those after the image; of a
prompt of text the last 32. The prompts are those of study.py, or strips and the pages that the demo model reads.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from study import LENGTHS, Prompts, answered, compress, draw, prepare
from vlm_answers import drawn

import vlcache_jax as vlc
from vlcache_jax.demo.assets import MODEL, Question, demo_assets, make_batch
from vlcache_jax.demo.data.samples import HELD_OUT_SEED, make_sample
from vlcache_jax.demo.study.oracle import answer_attention
from vlcache_jax.demo.study.recording import Recording
from vlcache_jax.files.writing import replacing

MASS = 0.9
SHARES = (0.1, 0.25, 0.4)


@jax.jit
def received(recording: Recording, lengths: jax.Array, vision_mask: jax.Array) -> jax.Array:
    """Attention that each prompt's scoring rows give to its tokens, f32 [layers, batch, heads, length]; sums to 1."""
    first, count = vlc.PostVision().span(lengths, vision_mask)
    place = jnp.arange(recording.key.shape[2])[None]
    scoring = (place >= first[:, None]) & (place < lengths[:, None])
    scoring, count = scoring.astype(recording.query.dtype), count.astype(recording.query.dtype)[:, None]

    def of_layer(layer: tuple[jax.Array, jax.Array]) -> jax.Array:
        query, key = layer
        key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where((place <= place.T)[None, None], logits, -jnp.inf))
        return jnp.einsum("bhqk,bq->bhk", weights, scoring / count)

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


def measure(vlm: vlc.VLM, prompts: Prompts) -> dict[str, np.ndarray]:
    """By name: f64 [layers], averaged over prompts; of what the heads need also the least and the most of a layer."""
    batch, recording, answers = prompts.batch, prompts.recording, prompts.answers
    lengths, length, vision = jnp.asarray(batch.lengths), batch.length, np.asarray(batch.vision_mask)
    mass = np.asarray(received(recording, lengths, vision))
    others = np.where(np.arange(length) > 0, mass, 0)
    answer = np.asarray(answer_attention(vlm.model, vlm.params, recording, lengths, answers.tokens, answers.lengths))
    lengths = np.asarray(lengths)
    by_head = np.mean(mass.reshape(*mass.shape[:2], answer.shape[2], -1, length), axis=3)
    density = compress(vlm, batch, recording, vlc.VLCache(0.1)).report.density
    heads = np.mean(needed(others, lengths), axis=1)  # [layers, heads]
    found = {
        "density": np.mean(np.asarray(density), axis=0),
        "first": np.mean(mass[..., 0], axis=(1, 2)),
        "vision": np.mean(np.sum(np.where(vision[:, None], mass, 0), axis=-1), axis=(1, 2)),
        "heads": heads.mean(axis=1),
        "least": heads.min(axis=1),
        "most": heads.max(axis=1),
        "layer": np.mean(needed(np.mean(others, axis=2), lengths), axis=1),
    }
    for share in SHARES:
        found[f"held {share:g}"] = np.mean(held(by_head, answer, lengths, share), axis=(1, 2))
        found[f"best {share:g}"] = np.mean(held(answer, answer, lengths, share), axis=(1, 2))
    return found


def texts(folder: Path, samples: int) -> dict[str, dict[str, np.ndarray]]:
    """What is measured of each task of study.py."""
    vlm, found = vlc.load(folder, dtype=jnp.float32, layout="stacked"), {}
    drawn, length = draw(vlm, list(LENGTHS), samples, None, seed=0)
    for task, of_task in drawn.items():
        found[task] = measure(vlm, prepare(vlm, of_task, length, samples))
    return found


def pictures(folder: Path, samples: int) -> dict[str, dict[str, np.ndarray]]:
    """What is measured of train_vlm.py's model on strips, and of the demo's on its documents."""
    folders = (folder, demo_assets(None) / MODEL)
    small, demo = (vlc.load(x, dtype=jnp.float32, layout="stacked") for x in folders)
    strips, chats, length = drawn(small, samples)
    pages = [make_sample("documents", HELD_OUT_SEED, index, max_questions=1) for index in range(samples)]
    asked = [Question("documents", [Image.fromarray(x) for x in page.images], *page.questions[0]) for page in pages]
    return {
        "small VLM": measure(small, answered(small, strips, small.processor.chat(chats, pad_to=length))),
        "demo model": measure(demo, answered(demo, asked, make_batch(demo.processor, asked))),
    }


def plot(found: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Four panels over the layers, first to last; a line for each kind of prompt.

    Dotted: all heads together, and the best that can be. Bands: from the head that needs least to the one of most.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    panels = figure.subplots(1, 4)
    for color, (kind, values) in zip(("C0", "C1", "C2", "C3", "C4", "C5"), found.items(), strict=False):
        depth = np.linspace(0, 100, len(values["first"]))
        for axes, name, dotted in zip(panels, ("density", "first", "heads", "held 0.1"), ("", "", "layer", "best 0.1")):
            axes.plot(depth, 100 * values[name], color, label=kind)
            if dotted:
                axes.plot(depth, 100 * values[dotted], color, linestyle=":")
        panels[2].fill_between(depth, 100 * values["least"], 100 * values["most"], color=color, alpha=0.12, linewidth=0)
    titles = (
        "VL-Cache's density",
        "attention to the first token",
        "tokens that hold 90 % of the rest",
        "answer's attention, a tenth of the tokens",
    )
    for axes, title in zip(panels, titles, strict=True):
        axes.set(title=f"{title}, %", xlabel="depth, % of the layers", ylim=(0, 100))
        axes.title.set_size(8)
    panels[0].legend()
    with replacing(path) as stream:
        figure.savefig(stream, format="png", dpi=90, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="from make_checkpoint.py; with --pictures run/model of train_vlm.py")
    parser.add_argument("--pictures", action="store_true", help="prompts with pictures, beside the demo model's")
    parser.add_argument("--samples", type=int, default=4, help="of each kind of prompt")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a .png")
    args = parser.parse_args()
    found = (pictures if args.pictures else texts)(args.folder, args.samples)
    for task, values in found.items():
        print(task)
        for name, value in values.items():
            shown = " ".join(f"{100 * x:.0f}" if name != "density" else f"{x:.3f}" for x in value)
            print(f"  {name}, mean {value.mean():.3f}: {shown}")
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
