"""Token ids against the rows of the embedding table."""

import json

import numpy as np
import pytest
import torch
from tiny_checkpoints import make_tiny_llava
from transformers import AutoTokenizer

import vlcache_jax as vlc
from vlcache_jax.errors import InputError
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
        logits, _ = vlc.prefill(vlm.model, vlm.params, batch, policy, max_new_tokens=4)
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


def test_continuations_and_training_rows_are_padded_with_a_row(vlm):
    assert int(vlm.processor.continuation(["w1", "w2 w3"]).tokens.max()) < ROWS
    batch = make_train_batch(vlm.processor, None, PROMPTS, ["w1", "w2"], 64)
    assert int(np.asarray(batch.batch.tokens).max()) < ROWS
