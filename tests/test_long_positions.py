"""Prompts beyond the length that a model was trained with, where rope scaling extends it, against transformers."""

import json

import numpy as np
import pytest
import torch
from tiny_checkpoints import WORDS, make_tiny_llava

import vlcache_jax as vlc
from vlcache_jax.errors import InputError
from vlcache_jax.models.families.registry import read_config

TRAINED = 64  # positions
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Kind, its parameters, max_position_embeddings, and the positions that the model can use.
CASES = {
    "linear": ({"factor": 4.0}, TRAINED, 256),
    "dynamic": ({"factor": 2.5}, TRAINED, 160),
    "yarn": ({"factor": 4.0, "original_max_position_embeddings": TRAINED}, TRAINED, 256),
    "yarn, extended already": ({"factor": 4.0, "original_max_position_embeddings": TRAINED}, 256, 256),
    "yarn, without a factor": ({"factor": None, "original_max_position_embeddings": TRAINED}, 192, 192),
    "llama3": ({"factor": 4.0, "original_max_position_embeddings": TRAINED, **LLAMA3}, TRAINED, 256),
    "llama3, extended already": ({"factor": 2.0, "original_max_position_embeddings": TRAINED, **LLAMA3}, 256, 256),
    "default": ({}, TRAINED, TRAINED),
}
RUN = ("linear", "dynamic", "yarn", "llama3")
PROMPT = " ".join(WORDS[i * 7 % len(WORDS)] for i in range(99))  # 100 tokens


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Model of transformers and folder by case, made when asked for."""
    made = {}

    def get(case):
        if case not in made:
            parameters, positions, _ = CASES[case]
            scaling = {"rope_type": case.split(",")[0], "rope_theta": 10_000.0, **parameters}
            folder = tmp_path_factory.mktemp("long")
            text = {"max_position_embeddings": positions, "num_hidden_layers": 2, "rope_parameters": scaling}
            made[case] = make_tiny_llava(folder, text=text), folder
        return made[case]

    return get


@pytest.mark.parametrize("case", CASES)
def test_the_limit_is_the_extended_one_in_both_forms_of_the_config(case, checkpoints):
    _, folder = checkpoints(case)
    config = read_config(folder)
    assert config.decoder.max_positions == CASES[case][1]
    assert config.decoder.extended_positions == CASES[case][2]
    path = folder / "config.json"
    whole = json.loads(path.read_text())
    text = dict(whole["text_config"])
    scaling = text.pop("rope_parameters")
    text["rope_theta"] = scaling.pop("rope_theta")
    for name in ("type", "rope_type"):
        old = {name if key == "rope_type" else key: value for key, value in scaling.items()}
        path.write_text(
            json.dumps(whole | {"text_config": text | {"rope_scaling": old if case != "default" else None}})
        )
        assert read_config(folder) == config
    path.write_text(json.dumps(whole))


@pytest.mark.parametrize("case", RUN)
def test_a_long_prompt_equals_transformers(case, checkpoints):
    model, folder = checkpoints(case)
    vlm = vlc.load(folder, dtype="float32")
    batch = vlm.processor(text=[PROMPT, "user: w1"], pad_to=128)
    assert int(batch.lengths[0]) == 100 > TRAINED
    logits, state = vlc.prefill(vlm.model, vlm.params, batch, vlc.FullCache()).start(6)
    answers, _ = vlc.decode(vlm.model, vlm.params, logits, state, 6, eos_token_ids=[])
    for row, length in enumerate(batch.lengths):
        ids = torch.tensor(np.asarray(batch.tokens)[row : row + 1, :length], dtype=torch.long)
        with torch.no_grad():
            # A fresh module: transformers remembers the longest sequence that `dynamic` has seen.
            rotary = model.model.language_model.rotary_emb
            model.model.language_model.rotary_emb = type(rotary)(config=model.config.text_config)
            wanted = model(input_ids=ids).logits[0, -1].numpy()
            tokens = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
        np.testing.assert_allclose(logits[row], wanted, rtol=0, atol=2e-3)
        assert np.asarray(answers)[row].tolist() == tokens[0, length:].tolist()


def test_beyond_the_extended_limit_a_prompt_is_refused(checkpoints):
    _, folder = checkpoints("dynamic")
    vlm = vlc.load(folder, dtype="float32")
    batch = vlm.processor(text=[PROMPT])
    with pytest.raises(InputError, match=r"needs 161 positions .* but the model has 160"):
        vlc.compress(vlm.model, vlm.params, batch, vlc.FullCache()).start(61)
