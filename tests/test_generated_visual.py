"""VAR and VASparse against their definitions in NumPy, token by token, on ragged rows; and the contrast of logits."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from generated_references import GROUP, Row, program, ragged, scripted_params
from stub_model import HEAD_DIM, HEADS, KV_HEADS, LAYERS, kept_sets
from tiers import later
from tiny_models import ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.inputs import TEXT

STEPS = 6
BASES = {"full_cache": vlc.FullCache(), "snap_kv": vlc.SnapKV(0.7, window=4)}


def softmax(x):
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def prompt_attention(row, layer):
    """[heads, n, n], causal."""
    key = np.repeat(row.k[layer, : row.n], GROUP, axis=1)
    logits = np.einsum("qhd,khd->hqk", row.q[layer, : row.n], key) / np.sqrt(HEAD_DIM)
    return softmax(np.where(np.tril(np.ones((row.n, row.n), bool)), logits, -np.inf))


def outputs(row, kept, weigh):
    """[steps, layers * heads * d]: attention outputs with the weights of `weigh` (logits, cache, layer)."""
    out = np.zeros((STEPS, LAYERS, HEADS, HEAD_DIM))
    for step in range(STEPS):
        for layer in range(LAYERS):
            for head in range(HEADS):
                at = row.n + step
                cache = np.array([*kept[layer][head // GROUP], *range(row.n, at + 1)])
                logits = row.k[layer, cache, head // GROUP] @ row.q[layer, at, head] / np.sqrt(HEAD_DIM)
                out[step, layer, head] = weigh(logits, cache, layer) @ row.v[layer, cache, head // GROUP]
    return out.reshape(STEPS, -1)


def with_sinks(batch, seed):
    """Some tokens, of image and text, that draw attention and carry little."""
    params = scripted_params(batch, STEPS, seed)
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=HEAD_DIM)
    heavy = np.zeros(params["key"].shape[1:3], bool)
    heavy[:, 0] = heavy[0, 5] = heavy[1, 9] = heavy[3, 7] = True
    params["query"] = params["query"] + 0.8 * direction
    params["key"] = params["key"] + np.where(heavy, 1.0, 0.0)[None, :, :, None, None] * direction
    params["value"] = params["value"] * np.where(heavy, 0.1, 1.0)[None, :, :, None, None]
    return {name: x.astype(np.float32) for name, x in params.items()}


@pytest.mark.parametrize("base", ["snap_kv", *later("full_cache")])
def test_var(base):
    batch = ragged(seed=1)
    params = with_sinks(batch, 1)
    rule = vlc.VAR(share=0.4, ratio=0.7, least=0.05, first=1, outlier=1.5, value=0.6)
    policy = dataclasses.replace(BASES[base], decoding=rule)
    out, first, _ = program(policy, STEPS)(params, batch)
    plain, _, _ = program(dataclasses.replace(policy, decoding=vlc.VAR(share=0)), STEPS)(params, batch)
    sets, changed = kept_sets(first), []
    for number in range(batch.size):
        row = Row(batch, params, number)
        visual = np.append(batch.vision_index[number, : row.n] != TEXT, np.zeros(STEPS, bool))
        sinks = []
        for layer in range(LAYERS):
            received = prompt_attention(row, layer)[:, -32:].mean(axis=(0, 1))
            norm = np.sqrt((row.v[layer, : row.n] ** 2).sum(axis=(1, 2)))
            found = (received > 1.5 * received.mean()) & (norm < 0.6 * norm.mean())
            sinks.append(np.append(found, np.zeros(STEPS, bool)))

        def weigh(logits, cache, layer, visual=visual, sinks=sinks):
            weights, seen, sink = softmax(logits), visual[cache], sinks[layer][cache]
            image, of_sinks = weights[seen].sum(), weights[seen & sink].sum()
            if (
                layer < 1
                or not (seen & sink).any()
                or of_sinks > 0.7 * image
                or image < 0.05
                or not (seen & ~sink).any()
            ):
                return weights
            changed.append(True)
            freed = 0.4 * weights[sink].sum()
            new = np.where(sink, 0.6 * weights, weights)
            new[seen & ~sink] += freed * weights[seen & ~sink] / weights[seen & ~sink].sum()
            np.testing.assert_allclose(new.sum(), 1)
            return new

        kept = [[sets[layer][number][head] for head in range(KV_HEADS)] for layer in range(LAYERS)]
        np.testing.assert_allclose(np.asarray(out)[:, number], outputs(row, kept, weigh), atol=2e-5)
        usual = outputs(row, kept, lambda logits, cache, layer: softmax(logits))
        np.testing.assert_allclose(np.asarray(plain)[:, number], usual, atol=2e-5)
    assert len(changed) > 20


@pytest.mark.parametrize("base", ["snap_kv", *later("full_cache")])
def test_va_sparse(base):
    batch = ragged(seed=2)
    params = scripted_params(batch, STEPS, 2)
    rule = vlc.VASparse(keep=0.4, weight=300.0, contrast=0)
    out, first, _ = program(dataclasses.replace(BASES[base], decoding=rule), STEPS)(params, batch)
    sets = kept_sets(first)
    for number in range(batch.size):
        row = Row(batch, params, number)
        visual = batch.vision_index[number, : row.n] != TEXT
        seen_image = [
            softmax(prompt_attention(row, layer)[:, :, visual].sum(axis=2).mean(axis=0)) for layer in range(LAYERS)
        ]

        def weigh(logits, cache, layer, row=row, seen_image=seen_image):
            prompt = cache < row.n
            scores = (logits * np.sqrt(HEAD_DIM)) ** 2
            scores = scores[prompt] + 300 * seen_image[layer][cache[prompt]]
            best = np.argsort(-scores, kind="stable")[: max(1, int(0.4 * prompt.sum()))]
            stays = np.append(np.isin(np.arange(prompt.sum()), best), np.ones(len(cache) - prompt.sum(), bool))
            return softmax(np.where(stays, logits, -np.inf))

        kept = [[sets[layer][number][head] for head in range(KV_HEADS)] for layer in range(LAYERS)]
        np.testing.assert_allclose(np.asarray(out)[:, number], outputs(row, kept, weigh), atol=2e-5)


def test_contrast():
    """Of the first token and of one behind it: minus a part of the logits of the embedding alone, behind no layer."""
    model, params = tiny_llava(layers=2)
    batch, part = ragged_batch(rows=3, length=24), 0.3
    policies = [dataclasses.replace(vlc.FullCache(), decoding=vlc.VASparse(keep=1, contrast=x)) for x in (0.0, part)]
    token = jnp.array([7, 8, 9])
    found = []
    for policy in policies:
        logits, state = vlc.prefill(model, params, batch, policy).start(4)
        found.append((np.asarray(logits), np.asarray(vlc.decode_step(model, params, token, state)[0])))
    (first, second), (first_of, second_of) = found
    head = np.asarray(params["decoder"]["lm_head"]["kernel"], np.float64)
    scale = np.asarray(params["decoder"]["final_norm"]["scale"], np.float64)

    def early(x):
        x = np.asarray(x, np.float64)
        return (x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + model.config.decoder.rms_norm_eps) * scale) @ head

    hidden = np.asarray(model.apply({"params": params}, batch, method="embed").hidden)
    last = hidden[np.arange(3), np.asarray(batch.lengths) - 1]
    table = np.asarray(params["decoder"]["embed_tokens"]["embedding"])
    np.testing.assert_allclose(first_of, first - part * early(last), atol=1e-4)
    np.testing.assert_allclose(second_of, second - part * early(table[np.asarray(token)]), atol=1e-4)
    assert not np.allclose(first_of, first, atol=1e-2)


def test_what_cannot_work_is_refused():
    for make, message in (
        (lambda: vlc.VASparse(keep=0), "keep=0"),
        (lambda: vlc.VAR(first=-1), "give the number of a layer"),
        (lambda: vlc.VLCache(0.3, decoding=vlc.VAR()), "the same number of slots in every layer"),
        (lambda: dataclasses.replace(vlc.FullCache(bits=8), decoding=vlc.VAR()), "reads single slots"),
        (lambda: vlc.recipe_by_name("snap_kv:0.3,decoding=var + fast_v"), "notes something of every token"),
    ):
        with pytest.raises(vlc.PolicyError, match=message):
            make()
    assert vlc.recipe_by_name("snap_kv:0.3,decoding=va_sparse").policy.rule == vlc.VASparse()
