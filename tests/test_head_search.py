"""The search for patterns of heads: shares of attention against NumPy, planted heads, and the file that comes of it."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prefill_references import m_inference
from test_prefill_patterns import BLOCK, HEAD_DIM, HEADS, KV_HEADS, LENGTHS, inputs
from tiny_models import ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.cli.main import main
from vlcache_jax.evaluation.head_search import BLOCKS, SHAPE, VERTICAL, kept_attention, search_heads

CANDIDATES = ((SHAPE, 9, 30), (VERTICAL, 32, 104), (BLOCKS, 1, 1))


def attention(query, key):
    logits = query.astype(np.float64) @ key.astype(np.float64).T * HEAD_DIM**-0.5
    weights = np.exp(logits - logits.max(axis=1, keepdims=True)) * np.tril(np.ones(logits.shape))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda x: x[0])
def test_shares_of_attention(candidate):
    """Of rows from one on, that go to the blocks and columns of the definition; ragged rows."""
    given = inputs()
    pattern = vlc.MInference(((candidate,),), heads="each", min_tokens=0, block=BLOCK)
    start = np.array([50, 40, 30, 2], np.int32)
    found = jax.jit(lambda *x: kept_attention(pattern, *x))(given.query, given.key, given.lengths, jnp.int32(0), start)
    for row, n in enumerate(LENGTHS):
        for head in range(HEADS):
            query, key = given.query[row, :n, head], given.key[row, :n, head * KV_HEADS // HEADS]
            keep, columns = m_inference.group([(query, candidate)], key, BLOCK)
            listed = np.repeat(np.repeat(keep, BLOCK, axis=0), BLOCK, axis=1)[:n, :n]
            listed[:, columns] = True
            for i in range(0, n, BLOCK):
                listed[i : i + BLOCK, i : i + BLOCK] = True
            expected = np.where(listed, attention(query, key), 0).sum(axis=1)[start[row] :].mean()
            np.testing.assert_allclose(found[row, head], expected, rtol=1e-4)


def test_the_best_candidate_of_each_head_becomes_a_file(tmp_path):
    """All heads of a model, over prompts of several sizes; `MInference` reads what comes of it."""
    model, params = tiny_llava(layers=2)
    batches = [ragged_batch(rows=2, length=48, seed=1)]
    options = {"candidates": ((SHAPE, 1, 1), (SHAPE, 8, 40)), "first_row": 8, "block": 8}
    found = search_heads(model, params, batches, **options)
    heads = model.config.decoder.num_heads
    assert [sorted(layer) for layer in found] == [[str(head) for head in range(heads)]] * 2
    assert all(entry[:3] == [SHAPE, 8, 40] and 0.9 < entry[3] <= 1 for layer in found for entry in layer.values())
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(found))
    assert vlc.MInference(path).table == (((SHAPE, 8, 40),) * heads,) * 2
    with pytest.raises(vlc.InputError, match="no prompts"):
        search_heads(model, params, [])
    with pytest.raises(vlc.InputError, match="no candidates"):
        search_heads(model, params, batches, candidates=())


@pytest.mark.thorough
def test_the_command(tmp_path, capsys):
    """On the shipped checkpoint, with the samples of an evaluation."""
    data, out = tmp_path / "data.jsonl", tmp_path / "heads.json"
    assets = Path(vlc.__file__).parent / "assets"
    demo, image = str(assets / "demo_model"), str(assets / "demo_images" / "scene_3.png")
    lines = [{"id": str(i), "question": "Describe the scene.", "images": [image], "answers": ["x"]} for i in range(3)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["search-heads", "--model", demo, "--data", str(data), "--out", str(out), "--limit", "2"]
    assert main([*command, "--no-compilation-cache"]) == 0
    error = capsys.readouterr().err
    assert "of the attention" in error
    assert "give longer ones" in error
    layers = json.loads(out.read_text())
    assert len(layers) == len(vlc.MInference(out).table) == 6
