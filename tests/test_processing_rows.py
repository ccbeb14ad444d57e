"""Token ids against the rows of the embedding table."""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny_checkpoints import make_tiny_llava
from transformers import AutoTokenizer

import vlcache_jax as vlc
from vlcache_jax.errors import CheckpointError, InputError
from vlcache_jax.training.examples import make_train_batch

ROWS = 64
PROMPTS = ["user: w1 w2 w3 assistant:", "user: w4 assistant:"]


@pytest.fixture(scope="module")
def unresized(tmp_path_factory):
    """(folder, transformers' model) of a fine-tune that added [PAD] and <extra> but never resized the table."""
    folder = tmp_path_factory.mktemp("unresized")
    model = make_tiny_llava(folder, text={"num_hidden_layers": 2})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["<extra>"]})
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | {"pad_token_id": ROWS}))
    return folder, model


@pytest.fixture(scope="module")
def vlm(unresized):
    return vlc.load(unresized[0], dtype="float32")


def test_a_padding_token_without_a_row_changes_nothing(unresized, vlm):
    _, model = unresized
    assert vlm.processor.tokenizer.pad_token_id == ROWS == vlm.processor.embedding_rows
    assert vlm.model.spec.pad_token_id < ROWS
    batch = vlm.processor(text=PROMPTS)
    assert int(batch.tokens.max()) < ROWS
    assert batch.lengths[0] != batch.lengths[1]
    for policy in (vlc.FullCache(), vlc.VLCache(budget=0.5, rows=vlc.LastRows(2))):
        out = vlc.generate(vlm.model, vlm.params, batch, policy=policy, max_new_tokens=4, eos_token_ids=[])
        logits, _ = vlc.prefill(vlm.model, vlm.params, batch, policy).start(4)
        for row, length in enumerate(batch.lengths):
            ids = torch.tensor(np.asarray(batch.tokens)[row : row + 1, :length], dtype=torch.long)
            with torch.no_grad():
                want = model(input_ids=ids).logits[0, -1].numpy()
            np.testing.assert_allclose(logits[row], want, atol=2e-4, rtol=2e-4)
            if policy == vlc.FullCache():
                tokens = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
                assert np.asarray(out.tokens)[row].tolist() == tokens[0, length:].tolist()


def test_a_finished_row_is_fed_a_token_with_a_row(vlm):
    batch = vlm.processor(text=PROMPTS)
    free = vlc.generate(vlm.model, vlm.params, batch, vlc.FullCache(), max_new_tokens=4, eos_token_ids=[])
    first = int(free.tokens[0, 0])
    out = vlc.generate(vlm.model, vlm.params, batch, vlc.FullCache(), max_new_tokens=4, eos_token_ids=[first])
    assert int(out.lengths[0]) == 1
    assert np.asarray(out.tokens).max() < ROWS


def test_a_prompt_id_without_a_row_is_refused(vlm):
    message = rf"row 1: the token '<extra>' has the id {ROWS + 1}, but the model's embedding table has {ROWS} rows"
    with pytest.raises(InputError, match=message):
        vlm.processor(text=[PROMPTS[0], "user: <extra> assistant:"])
    with pytest.raises(InputError, match="row 0: the token '<extra>'"):
        vlm.processor.chat([{"role": "user", "content": "<extra>"}])
    with pytest.raises(InputError, match="text 0: the token '<extra>'"):
        vlm.processor.continuation("w1 <extra>")
    with pytest.raises(InputError, match="row 0, the answer and its end: the token '<extra>'"):
        make_train_batch(vlm.processor, None, [PROMPTS[0]], ["w1 <extra>"], 64)


@pytest.mark.parametrize("token", ["w1", "assistant:"])
def test_a_vocabulary_larger_than_the_table_is_refused(token, unresized, tmp_path):
    folder = shutil.copytree(unresized[0], tmp_path / "copy")
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"][token] = 5000
    path.write_text(json.dumps(values))
    with pytest.raises(
        CheckpointError, match=rf"the token '{token}' of tokenizer.json has the id 5000, .* {ROWS} rows"
    ):
        vlc.load(folder)


def test_a_beginning_without_a_row_is_refused(unresized, tmp_path):
    folder = shutil.copytree(unresized[0], tmp_path / "copy")
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["post_processor"]["special_tokens"]["<s>"] = {"id": "<s>", "ids": [ROWS + 1], "tokens": ["<extra>"]}
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=rf"adds '<extra>' to every prompt, whose id {ROWS + 1} has no row"):
        vlc.load(folder)


@pytest.mark.parametrize("key", ["image_token_index", "eos_token_id"])
def test_ids_of_the_config_without_a_row_are_refused(key, unresized, tmp_path):
    folder = shutil.copytree(unresized[0], tmp_path / "copy")
    name = "generation_config.json" if key == "eos_token_id" else "config.json"
    values = json.loads((folder / name).read_text())
    values.pop("image_token_id", None)
    (folder / name).write_text(json.dumps(values | {key: ROWS + 1}))
    with pytest.raises(CheckpointError, match=rf"{name}: {key} is {ROWS + 1}; expected .* below the vocab_size {ROWS}"):
        vlc.load(folder)


def test_ends_that_can_be_generated_stay(unresized, tmp_path):
    folder = shutil.copytree(unresized[0], tmp_path / "copy")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [ROWS + 1, 2], "bos_token_id": ROWS + 1}))
    assert vlc.load(folder, dtype="float32").model.spec.eos_token_ids == (ROWS + 1, 2)


def test_continuations_and_training_rows_are_padded_with_a_row(vlm):
    assert int(vlm.processor.continuation(["w1", "w2 w3"]).tokens.max()) < ROWS
    batch = make_train_batch(vlm.processor, None, PROMPTS, ["w1", "w2"], 64)
    assert int(np.asarray(batch.batch.tokens).max()) < ROWS
