"""A small VLM on a pretrained decoder: a tower that reads strips of the demo's pages, and SmolLM2-135M-Instruct.

    python benchmarks/pretrained/make_checkpoint.py smollm2
    python benchmarks/pretrained/train_vlm.py smollm2 run --stage tower --minutes 8      # again and again, until done
    python benchmarks/pretrained/train_vlm.py smollm2 run --stage decoder --minutes 8    # likewise
    python benchmarks/pretrained/train_vlm.py smollm2 run --stage save                   # run/model: a LLaVA folder
    python benchmarks/pretrained/train_vlm.py smollm2 run --stage draw                   # run/curve.png

1. Tower and projector alone, from random numbers: what a patch shows shall be projected to where the decoder's own
   embedding table has the tokens of that text. The decoder is not run.
2. Adapters (LoRA) of the decoder, everything else frozen: the cross entropy of the answers, and nothing else. No term
   asks anything of the attention.
"""

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image
from strips import IMAGE_SIZE, PATCH_SIZE, Strip, shown, stream

import vlcache_jax as vlc
from vlcache_jax.demo.data.samples import FULL_GRID, IMAGE_MEAN, IMAGE_STD
from vlcache_jax.demo.data.words import ITEMS, NAMES
from vlcache_jax.files.writing import write_picture
from vlcache_jax.inputs import TEXT
from vlcache_jax.models.families.llava.layout import VisionLayout
from vlcache_jax.models.families.llava.model import Llava
from vlcache_jax.models.images.transform import ImageTransform
from vlcache_jax.models.io.saving import save
from vlcache_jax.models.processor import Processor
from vlcache_jax.training import (
    Conversation,
    Lora,
    ProgressLog,
    TrainBatch,
    TrainState,
    answer_loss,
    init_state,
    load_state,
    make_train_step,
    merge,
    pack,
    prefetch,
    save_state,
)
from vlcache_jax.training.checkpoint import has_state

TOWER_STEPS, TOWER_ROWS, TOWER_RATE = 600, 32, 2e-3


def normalised(images: Any) -> Any:
    """u8 -> f32, as the saved folder's image processor does."""
    return (images.astype("float32") / 255 - IMAGE_MEAN) / IMAGE_STD


def with_tower(vlm: vlc.VLM, dtype: Any = jnp.bfloat16) -> vlc.VLM:
    """The decoder behind a new tower for `IMAGE_SIZE` images, which has learnt nothing yet."""
    vision = dataclasses.replace(
        vlm.config.vision, hidden_size=128, intermediate_size=512, num_layers=3, num_heads=4, image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )  # fmt: skip
    config = dataclasses.replace(vlm.config, vision=vision, feature_layers=(vision.num_layers,))
    model = Llava(config, dtype)
    pixels = jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3))
    tower = jax.jit(lambda key: model.init(key, pixels, method="encode_images")["params"])(jax.random.key(0))
    tower["vision"] = reading_tower(tower["vision"], vision.grid_size)
    tower["projector"]["linear_2"]["kernel"] *= 0.1  # embeddings are small
    transform = ImageTransform(
        size=IMAGE_SIZE, crop_size=(IMAGE_SIZE, IMAGE_SIZE), mean=(IMAGE_MEAN,) * 3, std=(IMAGE_STD,) * 3
    )
    processor = Processor(
        tokenizer=vlm.processor.tokenizer,
        layout=VisionLayout(config, transform),
        image_token=vlm.processor.image_token,
        chat_templates=vlm.processor.chat_templates,
    )
    return vlc.VLM(model, vlm.params | tower, processor, config)


LOOKS = ((-1, 1, -2, 2), (-1, -2, -3, -4), (1, -1, -4, 4))  # of each layer's heads: so many patches to the right
STROKES, BESIDE = 48, 24  # components of a patch that the tower begins with; and of the patches left and right of it


def reading_tower(vision: Any, side: int) -> Any:
    """A tower's parameters, changed so that training begins with the strokes of a patch and of those beside it.

    The first channels say in which row and column a patch lies, by which heads find patches of the same row. The next
    are principal components of printed patches, whatever the paper's colour; the rest come from the neighbours.
    """
    strokes, kernel = 2 * side + np.arange(STROKES), np.zeros(vision["patch_embedding"]["kernel"].shape, np.float32)
    kernel[..., strokes] = components().T.reshape(PATCH_SIZE, PATCH_SIZE, 1, STROKES) / 3
    rows, columns = np.divmod(np.arange(side**2), side)
    table = np.zeros(vision["position_embedding"].shape, np.float32)
    table[1 + np.arange(side**2), rows] = table[1 + np.arange(side**2), side + columns] = 8.0
    attention = {name: 0.3 * np.array(x["kernel"]) for name, x in vision["layers"]["attention"].items()}
    for layer, looks in enumerate(LOOKS):
        for head, look in enumerate(looks):
            own = 2 * side * head + np.arange(2 * side)
            attention["key"][layer, np.arange(2 * side), own] += 1.1
            attention["query"][layer, np.arange(side), own[:side]] += 1.1
            for column in range(max(0, -look), min(side, side - look)):
                attention["query"][layer, side + column, own[side + column + look]] += 1.1
    for head in range(2):
        own, free = 2 * side * head + np.arange(BESIDE), 2 * side + STROKES + BESIDE * head + np.arange(BESIDE)
        attention["value"][0, strokes[:BESIDE], own] += 1.0
        attention["output"][0, own, free] += 1.0
    changed = {(name, "kernel"): jnp.asarray(x) for name, x in attention.items()}
    parts = {("layers", "attention", *path): x for path, x in changed.items()}
    parts |= {("patch_embedding", "kernel"): jnp.asarray(kernel), ("position_embedding",): jnp.asarray(table)}
    return unflatten_dict(flatten_dict(vision) | parts)


def components() -> np.ndarray:
    """Principal components of printed patches without their mean, of unit variance: f32 [STROKES, pixels]."""
    images = np.stack([strip.image for strip in itertools.islice(stream(0), 64)])
    grey = normalised(images).mean(-1).reshape(-1, FULL_GRID, PATCH_SIZE, FULL_GRID, PATCH_SIZE)
    patches = grey.swapaxes(2, 3).reshape(-1, PATCH_SIZE**2)
    patches = patches - patches.mean(1, keepdims=True)
    _, size, found = np.linalg.svd(patches[patches.std(1) > 0.4], full_matrices=False)
    spread = size**2 / np.sum(patches.std(1) > 0.4)
    return (found / np.sqrt(spread + 0.01 * spread[0])[:, None])[:STROKES].astype(np.float32)


def tower_loss(vlm: vlc.VLM) -> Any:
    """What patches show, by the nearest of the embeddings of all that they can show; and how far off it is."""
    tokenizer = vlm.processor.tokenizer
    texts = [" ", *"0123456789", *(f" {word}" for word in (*NAMES, *ITEMS))]
    vocabulary = np.array(sorted({i for text in texts for i in tokenizer.encode(text, False)}))
    table = vlm.params["decoder"]["embed_tokens"]["embedding"][vocabulary].astype(jnp.float32)
    spread = float(jnp.mean(jnp.sum((table - table.mean(0)) ** 2, -1)))
    (space,) = tokenizer.encode(" ", False)

    def loss(params: Any, batch: Any) -> Any:
        images, ids, places = batch
        projected = vlm.model.apply({"params": params}, normalised(images), places, method="encode_images")
        projected, wanted = projected.astype(jnp.float32), jnp.searchsorted(vocabulary, ids)
        far = jnp.sum(projected**2, -1, keepdims=True) - 2 * projected @ table.T + jnp.sum(table**2, -1)[None, None]
        weight = jnp.where(ids == space, 0.3, 3.0)
        entropy = optax.softmax_cross_entropy_with_integer_labels(-2 * far, wanted)
        off = jnp.take_along_axis(far, wanted[..., None], -1)[..., 0] / spread
        right, text = jnp.argmin(far, -1) == wanted, ids != space
        of_text = jnp.maximum(jnp.sum(text), 1)
        return jnp.mean(weight * (entropy + off)), {
            "right": jnp.sum(right & text) / of_text,
            "false": jnp.mean(~right & ~text),
            "off": jnp.sum(off * text) / of_text,
        }

    return loss


def tower_batches(processor: Processor, seed: int, first: int) -> Iterator[Any]:
    """Batches from number `first` on: images u8, ids and places i32 of four rows of each strip, put at any four places.

    Drawing costs as much as a step: three batches in turn are of the same strips.
    """
    for number in itertools.count(first):
        rng = np.random.default_rng([seed, number])
        if number in (first, number // 3 * 3):
            strips = list(itertools.islice(stream(seed, number // 3 * TOWER_ROWS), TOWER_ROWS))
        images, ids = [], []
        for strip in strips:
            used = {row for row, *_ in strip.fields} if rng.random() < 0.8 else ()
            rows = sorted(rng.permutation(FULL_GRID), key=lambda row: row not in used)[:4]
            images.append(strip.image.reshape(FULL_GRID, PATCH_SIZE, IMAGE_SIZE, 3)[rows].reshape(-1, IMAGE_SIZE, 3))
            ids.append(shown(strip, processor.tokenizer).reshape(FULL_GRID, FULL_GRID)[rows].reshape(-1))
        places = np.sort(rng.permutation(FULL_GRID)[:4])[:, None] * FULL_GRID + np.arange(FULL_GRID)
        yield np.stack(images), np.stack(ids), places.reshape(-1).astype(np.int32)


DECODER_STEPS, DECODER_ROWS, DECODER_RATE = 72, 2, 1.5e-3
PRACTICE_STEPS, PRACTICE_ROWS = 32, 4  # the first steps, 64 visual tokens; then pictures, 256
LORA = Lora(rank=8, alpha=16)
BEFORE = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n"
)
AFTER = "\n{}<|im_end|>\n<|im_start|>assistant\n"  # both as the folder's chat template writes them


def conversation(processor: Processor, strip: Strip, rows: int | None) -> Conversation:
    """A strip with its questions.

    rows: None for its picture; else so many rows of patches, those with fields first, as text that a perfect tower
      would show: the same embeddings, without a tower.
    """
    encode = lambda text: processor.tokenizer.encode(text, False)  # noqa: E731
    before, used = encode(BEFORE), {row for row, *_ in strip.fields}
    some = sorted(sorted(range(FULL_GRID), key=lambda row: row not in used)[:rows])
    visible = shown(strip, processor.tokenizer).reshape(FULL_GRID, FULL_GRID)[some].reshape(-1)
    index, pixels = [TEXT] * len(visible), np.zeros((0, IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    if rows is None:
        visible = np.full_like(visible, processor.config.image_token_id)
        index, pixels = list(range(len(visible))), normalised(strip.image)[None]
    names = {name for row, _, name, _ in strip.fields if row in some}
    questions = [
        (encode(AFTER.format(question)), [*encode(answer), processor.tokenizer.eos_token_id])
        for question, answer in strip.questions
        if answer.split()[0] in names
    ]
    return Conversation([*before, *visible.tolist()], [TEXT] * len(before) + index, questions, pixels)


def answer_batches(processor: Processor, seed: int, first: int) -> Iterator[TrainBatch]:
    """Batches from number `first` on, small ones of text first."""
    for number in itertools.count(first):
        rows, length = (PRACTICE_ROWS, 224) if number < PRACTICE_STEPS else (None, 448)
        some = itertools.islice(stream(seed, DECODER_ROWS * number, ("documents",)), DECODER_ROWS)
        conversations = [conversation(processor, strip, rows) for strip in some]
        yield pack(conversations, length, pad_token=processor.padding_id)


STAGES = {"tower": (TOWER_STEPS, TOWER_RATE, 0.01), "decoder": (DECODER_STEPS, DECODER_RATE, 1e-4)}  # last: decay


def reached(run: Path, stage: str, params: Any) -> tuple[TrainState, Any]:
    """The state that a stage has reached, or its first one, and its optimizer: warmed up, and down to nothing."""
    steps, rate, decay = STAGES[stage]
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=decay))
    state = init_state(params, optimizer)
    return load_state(run / stage, state)[0] if has_state(run / stage) else state, optimizer


def train(vlm: vlc.VLM, run: Path, stage: str, minutes: float) -> None:
    """Goes on with a stage for some minutes, or to its end."""
    end, log = time.monotonic() + 60 * minutes, ProgressLog(run / "log.jsonl")
    params, frozen = (tower_of(vlm), {}) if stage == "tower" else (LORA.init(vlm.model, vlm.params), vlm.params)
    state, optimizer = reached(run, stage, params)
    loss = tower_loss(vlm) if stage == "tower" else LORA.loss(answer_loss(vlm.model))
    step = make_train_step(loss, optimizer)
    batches = prefetch((tower_batches if stage == "tower" else answer_batches)(vlm.processor, 0, int(state.step)))
    for number in range(int(state.step) + 1, STAGES[stage][0] + 1):
        state, metrics = step(state, next(batches), frozen)
        if number == 1 or number % (25 if stage == "tower" else 5) == 0:
            log.report(stage=stage, step=number, **{name: float(x) for name, x in metrics.items()})
        if time.monotonic() > end:
            break
    save_state(run / stage, state)


def tower_of(vlm: vlc.VLM) -> Any:
    """The parameters of the first stage."""
    return {name: vlm.params[name] for name in ("vision", "projector")}


def trained(vlm: vlc.VLM, run: Path, *, adapted: bool) -> vlc.VLM:
    """With the run's tower; and with its adapters added to the decoder's weights."""
    params = vlm.params | reached(run, "tower", tower_of(vlm))[0].params
    if adapted:
        params = LORA.merged(merge(params, reached(run, "decoder", LORA.init(vlm.model, params))[0].params))
    return dataclasses.replace(vlm, params=params)


def draw(run: Path) -> None:
    """The curves of the stages so far: run/curve.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    curves = {"tower": ("right", "patches with text that are read"), "decoder": ("exact_match", "answers right")}
    some = {stage: [line for line in log if line["stage"] == stage] for stage in curves}
    some = {stage: lines for stage, lines in some.items() if lines}
    figure = Figure(figsize=(5 * len(some), 3.2), layout="constrained")
    for axes, (stage, lines) in zip(figure.subplots(1, len(some), squeeze=False)[0], some.items()):
        key, title = curves[stage]
        axes.plot([line["step"] for line in lines], [line[key] for line in lines], marker=".")
        axes.set(title=title, xlabel=f"step of the {stage}", ylim=(0, 1))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    write_picture(run / "curve.png", Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="from make_checkpoint.py")
    parser.add_argument("run", type=Path, help="where states, log and model are written")
    parser.add_argument("--stage", choices=("tower", "decoder", "save", "draw"), required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    args = parser.parse_args()
    if args.stage == "draw":
        draw(args.run)
        return
    vlm = with_tower(vlc.load(args.folder, dtype="bfloat16", param_dtype="float32", layout="stacked"))
    if args.stage == "save":
        save(trained(vlm, args.run, adapted=True), args.run / "model")
    else:
        train(
            vlm if args.stage == "tower" else trained(vlm, args.run, adapted=False), args.run, args.stage, args.minutes
        )


if __name__ == "__main__":
    main()
