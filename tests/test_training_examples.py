"""Fine-tuning a loaded checkpoint: batches from its processor, and a loss that falls."""

import jax
import numpy as np
import optax
import pytest
from PIL import Image
from tiny_checkpoints import make_tiny_llava

import vlcache_jax as vlc
from vlcache_jax.training.examples import make_train_batch
from vlcache_jax.training.loss import answer_loss
from vlcache_jax.training.parts import split
from vlcache_jax.training.state import init_state, make_train_step


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_llava(folder)
    return vlc.load(folder, dtype="float32", layout="stacked")


def image(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 30, 3), dtype=np.uint8))


def test_batches_hold_prompt_and_answer(vlm):
    prompt = f"{vlm.processor.image_token} w1 w2 w3"
    batch = make_train_batch(vlm.processor, [[image(0)], []], [prompt, "w1 w2 w3"], ["w4 w5", "w3"], 64)
    plain = vlm.processor(images=[[image(0)], []], text=[prompt, "w1 w2 w3"])
    for row, answer in enumerate(("w4 w5", "w3")):
        n = int(plain.lengths[row])
        ids = [*vlm.processor.tokenizer.encode(answer, False), vlm.processor.tokenizer.eos_token_id]
        np.testing.assert_array_equal(batch.batch.tokens[row, :n], plain.tokens[row, :n])
        np.testing.assert_array_equal(batch.batch.vision_index[row, :n], plain.vision_index[row, :n])
        np.testing.assert_array_equal(batch.batch.tokens[row, n : n + len(ids)], ids)
        np.testing.assert_array_equal(np.flatnonzero(batch.weights[row]), np.arange(n - 1, n - 1 + len(ids)))
        np.testing.assert_array_equal(batch.targets[row, n - 1 : n - 1 + len(ids)], ids)
    assert batch.positions is batch.segments is None  # the model's own, and plain causal text


def test_the_loss_falls_and_the_answer_is_learned(vlm):
    prompts = [f"{vlm.processor.image_token} w1 w2 w3"] * 2
    batch = make_train_batch(vlm.processor, [[image(1)], [image(2)]], prompts, ["w4 w5", "w6 w7"], 64)
    optimizer = optax.adam(3e-3)
    step = make_train_step(answer_loss(vlm.model), optimizer)
    before = jax.tree.map(np.asarray, vlm.params)
    tuned, frozen = split(jax.tree.map(lambda x: x + 0, vlm.params), ("decoder", "projector"))
    state = init_state(tuned, optimizer)
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch, frozen)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    np.testing.assert_array_equal(frozen["vision"]["class_embedding"], before["vision"]["class_embedding"])
    assert not np.array_equal(
        state.params["projector"]["linear_1"]["kernel"], before["projector"]["linear_1"]["kernel"]
    )


def test_bad_input(vlm):
    with pytest.raises(vlc.InputError, match="1 prompts and 2 answers"):
        make_train_batch(vlm.processor, [[]], ["w1"], ["w1", "w2"], 64)
    with pytest.raises(vlc.InputError, match="row 0: the answer is empty"):
        make_train_batch(vlm.processor, [[]], ["w1"], [" "], 64)
    with pytest.raises(vlc.InputError, match="raise the length"):
        make_train_batch(vlm.processor, [[image(0)]], [f"{vlm.processor.image_token} w1"], ["w2"], 8)
