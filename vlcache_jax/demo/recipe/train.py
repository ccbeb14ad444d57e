"""The demo checkpoint's recipe, end to end: tower, then decoder on growing images, then export.

Times are shares of the run, so the same recipe fits any duration: the constant learning rate can be left at any
moment for the decay at the end.
"""

import dataclasses
import itertools
import os
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlcache_jax.demo.data.conversations import conversation, patch_hints
from vlcache_jax.demo.data.export import export_demo, write_examples
from vlcache_jax.demo.data.samples import FULL_GRID, HELD_OUT_SEED, make_sample
from vlcache_jax.demo.recipe import init as demo_init
from vlcache_jax.demo.recipe.ahead import Ahead, ahead_loss, ahead_targets
from vlcache_jax.demo.recipe.alignment import alignment
from vlcache_jax.demo.recipe.eviction import evicted_attention
from vlcache_jax.demo.recipe.recipe import FULL, Recipe, Shape
from vlcache_jax.demo.recipe.vision import init_head, normalise, patch_batches, patch_loss, window
from vlcache_jax.errors import CheckpointError
from vlcache_jax.files.json_text import shorten
from vlcache_jax.inputs import Batch
from vlcache_jax.kernels.attention import Mask, attention
from vlcache_jax.models.families.llava.model import Llava
from vlcache_jax.terminal.progress import Progress
from vlcache_jax.training.batch import TrainBatch, pack
from vlcache_jax.training.checkpoint import has_state, load_state, save_state
from vlcache_jax.training.loop import ProgressLog, prefetch
from vlcache_jax.training.loss import answers_right, weighted_cross_entropy
from vlcache_jax.training.parts import merge, split
from vlcache_jax.training.state import Loss, Metrics, Params, init_state, make_train_step


class DemoBatch(NamedTuple):
    """A `TrainBatch` with u8 pixels, and what else the demo's loss needs.

    Attributes:
      train: prompts and answers.
      patch_ids: i32 [grid²], the window of the tower's position table that the images take.
      hints: i32 [batch, length]. At patches the token that `patch_hints` gives, -1 elsewhere.
      ahead: what the rows before the answers have to look ahead to.
    """

    train: TrainBatch
    patch_ids: jax.Array | np.ndarray
    hints: jax.Array | np.ndarray
    ahead: Ahead


def demo_batch(recipe: Recipe, shape: Shape, seed: int, number: int, *, blur: bool = True) -> DemoBatch:
    """Batch `number` of a shape: a pure function of the arguments."""
    rng = np.random.default_rng([seed, 2, number])
    conversations, hints = [], np.full((shape.rows, shape.length), -1, np.int32)
    for row in range(shape.rows):
        task = shape.tasks[(number + row) % len(shape.tasks)]
        sample = make_sample(task, seed, number * shape.rows + row, shape.grid)
        conversations.append(conversation(sample, rng if blur else None))
        hint, end = patch_hints(sample), len(conversations[-1].prefix)
        hints[row, end - len(hint) : end] = hint
    pad = recipe.config.pad_token_id or 0
    batch = pack(conversations, shape.length, pad_token=pad)
    return DemoBatch(batch, window(rng, shape.grid), hints, ahead_targets(batch, _QUESTIONS, _AHEAD_ROWS, _AHEAD))


def _plain(batch: DemoBatch) -> Batch:
    return dataclasses.replace(batch.train.batch, pixels=normalise(jnp.asarray(batch.train.batch.pixels)))


def _run(model: Llava, params: Params, batch: DemoBatch, *, evict: bool) -> tuple[jax.Array, jax.Array]:
    """Hidden states, and the mean alignment loss of the layers."""
    variables, train = {"params": params}, batch.train
    columns = train.batch.pixels.shape[1] * batch.patch_ids.shape[0] + _PREFIX

    def attend(query, key, value, carry, xs):
        out, _ = attention(query, key, value, Mask(segments=train.segments), with_lse=False)
        if evict:
            out = evicted_attention(out, query, key, value, train.segments, columns, batch.ahead)
        return out, carry, alignment(query, key, train.segments, columns, batch.ahead)

    hidden = model.apply(variables, _plain(batch), batch.patch_ids, method="embed").hidden
    hidden, _, losses = model.apply(variables, hidden, train.positions, attend, method="decode")
    return hidden, jnp.mean(losses)


def _logits(model: Llava, params: Params, hidden: jax.Array) -> jax.Array:
    return model.apply({"params": params}, hidden, method="unembed")


_HINT_WEIGHT = 0.5
_AHEAD_WEIGHT = 0.5
_ALIGNMENT_WEIGHT = 0.5
_PREFIX = 8  # at least the tokens in front of the images
_AHEAD = 10  # tokens
_AHEAD_ROWS = 4  # of each question: by then it has named what it asks for
_QUESTIONS = 12


def demo_loss(model: Llava) -> Loss:
    """`answer_loss` for `DemoBatch`, and three auxiliary losses.

    Hints: the row of a value's patch has to predict the name beside it. Looking a name up takes two steps, binding
    names to values and matching, neither of which pays without the other; the hint pays for the first one. Likewise a
    shape's row predicts how many shapes there were so far.

    Look-ahead: see `recipe.ahead`; its heads are `params["ahead"]`. Alignment: see `recipe.alignment`.
    """

    def loss(params: Params, batch: DemoBatch) -> tuple[jax.Array, Metrics]:
        hidden, aligned = _run(model, params, batch, evict=True)
        logits = _logits(model, params, hidden)
        value, metrics = weighted_cross_entropy(logits, batch.train)
        hinted, hints = batch.hints >= 0, jnp.maximum(batch.hints, 0)
        count = jnp.maximum(jnp.sum(hinted), 1).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, hints)
        hint = jnp.sum(losses * hinted.astype(jnp.float32)) / count
        accuracy = jnp.sum((jnp.argmax(logits, -1) == hints) & hinted).astype(jnp.float32) / count
        ahead, ahead_accuracy = ahead_loss(params["ahead"], hidden, batch.ahead)
        extra = {"answer_loss": value, "hint_accuracy": accuracy, "ahead_accuracy": ahead_accuracy}
        extra["alignment"] = aligned
        total = value + _HINT_WEIGHT * hint + _AHEAD_WEIGHT * ahead + _ALIGNMENT_WEIGHT * aligned
        return total, metrics | extra

    return loss


def train_vision(recipe: Recipe, directory: Path, log: ProgressLog, progress: Progress) -> Params:
    """Trains tower and projector alone, or returns those an earlier run left in `directory`."""
    path = directory / "vision"
    initial = _init(recipe, recipe.seed)
    params = {name: initial[name] for name in ("vision", "projector")}
    if has_state(path):
        return load_state(path, params)[0]
    params["head"] = init_head(jax.random.key(recipe.seed + 1), recipe.config.decoder.hidden_size)
    steps = recipe.vision_steps
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, recipe.vision_rate, steps // 30 + 1),
            optax.constant_schedule(recipe.vision_rate),
            optax.linear_schedule(recipe.vision_rate, 0.0, int(0.4 * steps)),
        ],
        [steps // 30 + 1, steps - int(0.4 * steps)],
    )
    optimizer = _optimizer(schedule, 0.01)
    step = make_train_step(patch_loss(Llava(recipe.config)), optimizer)
    state = init_state(params, optimizer)
    batches = prefetch(patch_batches(recipe.seed, recipe.vision_grid, recipe.vision_rows))
    progress.step("training the vision tower", total=steps)
    for number in range(steps):
        state, metrics = step(state, next(batches))
        progress.advance()
        log.count(recipe.vision_rows * recipe.vision_grid**2)
        if number % 50 == 49 or number == steps - 1:
            log.report(stage="vision", step=number + 1, **{k: float(v) for k, v in metrics.items()})
    trained = {name: state.params[name] for name in ("vision", "projector")}
    save_state(path, trained)
    return trained


def _optimizer(rate: float | optax.Schedule, decay: float) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b1=0.9, b2=0.98, weight_decay=decay))


def _init(recipe: Recipe, seed: int) -> Params:
    example = demo_batch(recipe, Shape(("scenes",), 4, 1, 1, 64), 0, 0)

    def init(key: jax.Array) -> Params:
        train = example.train
        batch = dataclasses.replace(train.batch, pixels=train.batch.pixels.astype(np.float32))
        model = Llava(recipe.config)
        inputs = (batch, train.positions, train.segments, example.patch_ids)
        return model.init(key, *inputs, method="forward")["params"]

    return jax.jit(init)(jax.random.key(seed))


def initial_params(recipe: Recipe, trained: Params) -> Params:
    """Parameters of the whole model around a trained tower and projector; see `recipe.init`."""
    params = _init(recipe, recipe.seed + 2) | trained
    decoder = params["decoder"]
    # The usual 0.02 is meant for wide models: at this width it starts with next to no attention.
    decoder["layers"] = jax.tree.map(lambda x: 2.5 * x if x.ndim > 2 else x, decoder["layers"])
    decoder["embed_tokens"]["embedding"] *= 10.0
    model = Llava(recipe.config)
    batches = patch_batches(recipe.seed + 3, recipe.vision_grid, recipe.vision_rows)
    ids, directions = demo_init.word_directions(model, params, batches)
    embedding = decoder["embed_tokens"]["embedding"]
    decoder["embed_tokens"]["embedding"] = embedding.at[ids].set(0.2 * directions)
    decoder["layers"]["attention"] = demo_init.matching_attention(
        jax.random.key(recipe.seed + 4), decoder["layers"]["attention"], recipe.config.decoder
    )
    # At zero, these heads start with every token equally likely.
    params["ahead"] = jnp.zeros((_AHEAD, recipe.config.decoder.hidden_size, recipe.config.decoder.vocab_size))
    return params


def evaluate_tasks(model: Llava, params: Params, recipe: Recipe, grid: int, samples: int) -> dict[str, float]:
    """Exact match per task under teacher forcing on held-out samples, all questions of each."""
    scores = {}
    for task in ("documents", "prices", "scenes", "counts", *(("places",) if grid == FULL_GRID else ())):
        shape = Shape((task,), grid, 1, 16, 512 if grid > 10 else 288)
        right = asked = 0
        for number in range(-(-samples // shape.rows)):
            batch = demo_batch(recipe, shape, HELD_OUT_SEED, number, blur=False)
            counts = _answers_right(model, params, batch)
            right, asked = right + int(counts[0].sum()), asked + int(counts[1].sum())
        scores[task] = right / asked
    return scores


@partial(jax.jit, static_argnames="model")
def _answers_right(model: Llava, params: Params, batch: DemoBatch) -> tuple[jax.Array, jax.Array]:
    return answers_right(_logits(model, params, _run(model, params, batch, evict=False)[0]), batch.train)


class _Clock:
    """How much of the run is done, by steps or by minutes."""

    def __init__(self, minutes: float | None, steps: int | None, elapsed: float) -> None:
        self.minutes, self.steps = minutes, steps
        self._start = time.monotonic() - elapsed

    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def share(self, step: int) -> float:
        if self.steps is not None:
            return step / self.steps
        return self.elapsed() / (60 * (self.minutes or 60.0))


def train_demo(
    output_dir: str | os.PathLike[str],
    *,
    minutes: float | None = None,
    steps: int | None = None,
    resume: bool = True,
    recipe: Recipe = FULL,
    save_every: float = 180.0,
    progress: Progress | None = None,
) -> Params:
    """Trains the demo's model, writes `demo_model/` and `demo_images/`, and returns the parameters.

    Args:
      output_dir: for those two, the train state, the tower and the log.
      minutes: how long to train the decoder (60 by default), or
      steps: for how many steps.
      resume: go on from the train state in `output_dir` if there is one.
      recipe: what to train.
      save_every: seconds between train states.
      progress: shows how far the run is; by default on standard error.
    """
    directory = Path(output_dir)
    progress = Progress() if progress is None else progress
    log = ProgressLog(directory / "log.jsonl", progress)
    path = directory / "state"
    model = Llava(recipe.config, jnp.bfloat16, remat=True)  # on two cores more than twice as fast as float32
    optimizer = _optimizer(recipe.rate, 0.05)
    tower = train_vision(recipe, directory, log, progress)
    progress.step("preparing the decoder")
    tuned, frozen = split(initial_params(recipe, tower), ("decoder", "projector", "ahead"))
    state = init_state(tuned, optimizer)
    reached: dict[str, Any] = {"stage": 0, "step": 0, "elapsed": 0.0, "running": 0.0, "entered": 0}
    if resume and has_state(path):
        begin, (state, reached) = reached, load_state(path, state)
        _check_reached(path, reached, begin, len(recipe.stages))
    step = make_train_step(demo_loss(model), optimizer)
    clock = _Clock(minutes, steps, reached["elapsed"])
    progress.step("training the decoder", total=1.0)
    progress.advance(shown := clock.share(reached["step"]))
    saved = time.monotonic()

    def save() -> None:
        save_state(path, state, reached | {"elapsed": clock.elapsed()})

    while (share := clock.share(reached["step"])) < 1:
        stage = recipe.stages[reached["stage"]]
        batches = prefetch(
            demo_batch(recipe, stage.shapes[number % len(stage.shapes)], recipe.seed, number)
            for number in itertools.count(reached["step"])
        )
        while (share := clock.share(reached["step"])) < 1:
            batch = next(batches)
            warm = min(1.0, (reached["step"] + 1) / recipe.warmup)
            state, metrics = step(state, batch, frozen, warm * min(1.0, (1 - share) / recipe.decay))
            reached["step"] += 1
            progress.advance(share - shown)
            shown = share
            log.count(batch.train.batch.tokens.size)
            running = reached["running"] = 0.97 * reached["running"] + 0.03 * float(metrics["exact_match"])
            number = reached["step"]
            if number % 20 == 0:
                values = {k: float(v) for k, v in metrics.items() if k != "weight"}
                remaining = clock.elapsed() * (1 - share) / max(share, 1e-6)
                log.report(stage=reached["stage"], step=number, share=share, running=running, eta=remaining, **values)
            if time.monotonic() - saved > save_every:
                save()
                scores = evaluate_tasks(model, merge(frozen, state.params), recipe, stage.shapes[0].grid, 32)
                log.report(evaluated=number, stage=reached["stage"], **scores)
                saved = time.monotonic()
            last = reached["stage"] == len(recipe.stages) - 1
            if not last and (share > stage.latest or (running > stage.until and number - reached["entered"] > 60)):
                reached |= {"stage": reached["stage"] + 1, "running": 0.0, "entered": number}
                break
        batches.close()  # type: ignore[attr-defined]
    progress.step("writing the checkpoint")
    save()
    params = {name: x for name, x in merge(frozen, state.params).items() if name != "ahead"}
    export_demo(params, recipe.config, directory / "demo_model")
    write_examples(directory / "demo_images")
    return params


def _check_reached(path: Path, reached: dict[str, Any], begin: dict[str, Any], stages: int) -> None:
    """Raises CheckpointError for what `train_demo` never saved."""
    right = reached.keys() == begin.keys() and all(
        type(reached[name]) in ((int,) if isinstance(value, int) else (int, float)) and reached[name] >= 0
        for name, value in begin.items()
    )
    if not right or reached["stage"] >= stages:
        raise CheckpointError(
            f"{path} was not saved by a run of this recipe (its progress is {shorten(reached)}): delete it to start "
            "afresh"
        )
