"""Numbers that are not finite: every way to an answer notices them, once all has run, and says in which rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.inference import generate as generation

NEW = 6
FULL, SOME = vlc.FullCache(), vlc.VLCache(0.3)
policies = pytest.mark.parametrize("policy", [FULL, SOME], ids=lambda p: p.name)
OPTIONS = {"eos_token_ids": []}


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


@pytest.fixture(scope="module")
def batch():
    return ragged_batch(rows=3)


def spoilt(params, *path, index=(0,), value=np.nan):
    """The parameters with one number replaced."""
    params = jax.tree.map(np.asarray, params)
    leaf = params
    for name in path[:-1]:
        leaf[name] = dict(leaf[name])
        leaf = leaf[name]
    leaf[path[-1]] = np.array(leaf[path[-1]])
    leaf[path[-1]][index] = value
    return params


def ways(model, params, batch, policy):
    """Every public function that answers, by name."""
    questions = vlc.Continuation(np.full((3, 2), 7, np.int32), np.full(3, 2, np.int32))

    def answered():
        context = dataclasses.replace(vlc.compress(model, tiny_llava()[1], batch, policy), params=params)
        return vlc.answer(context, questions, NEW, **OPTIONS)

    def extended():
        context = dataclasses.replace(vlc.compress(model, tiny_llava()[1], batch, policy), params=params)
        return vlc.extend(context, questions)

    return {
        "generate": lambda: vlc.generate(model, params, batch, policy, NEW, **OPTIONS),
        "stream": lambda: list(vlc.stream(model, params, batch, policy, NEW, **OPTIONS)),
        "decode": lambda: vlc.decode(
            model, params, *vlc.prefill(model, params, batch, policy).start(NEW), NEW, **OPTIONS
        ),
        "compress": lambda: vlc.compress(model, params, batch, policy),
        "answer": answered,
        "extend": extended,
    }


@policies
@pytest.mark.parametrize(
    "path",
    [("final_norm", "scale"), ("lm_head", "kernel"), ("layers", "mlp", "down", "kernel")],
    ids=["norm", "head", "mlp"],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_whatever_is_not_finite_is_an_error(llava, batch, policy, path, value):
    model, params = llava
    bad = spoilt(params, "decoder", *path, index=(-1,), value=value)
    with pytest.raises(vlc.CheckpointError, match=f"policy '{policy.name}': logits after the prompt .* rows 0, 1, 2"):
        vlc.generate(model, bad, batch, policy, NEW, **OPTIONS)


@pytest.mark.parametrize("way", ["generate", "stream", "decode", "compress", "answer", "extend"])
def test_every_way_notices(llava, batch, way):
    model, params = llava
    bad = spoilt(params, "decoder", "final_norm", "scale")
    with pytest.raises(vlc.NonFiniteError, match="NaN or infinity, or overflows in float32") as error:
        ways(model, bad, batch, FULL)[way]()
    assert error.value.rows == (0, 1, 2)


def test_inside_jit_the_report_tells(llava, batch):
    model, params = llava
    run = jax.jit(lambda p: vlc.generate(model, p, batch, SOME, NEW, **OPTIONS).report.finite)
    assert run(params).tolist() == [True] * 3
    assert run(spoilt(params, "decoder", "final_norm", "scale")).tolist() == [False] * 3


@policies
def test_the_other_rows_keep_their_answers(llava, batch, policy):
    model, params = llava
    good = vlc.generate(model, params, batch, policy, NEW, **OPTIONS)
    pixels = np.array(batch.pixels)
    pixels[0] = np.nan
    bad = dataclasses.replace(batch, pixels=pixels)
    with pytest.raises(vlc.NonFiniteError, match=r"row 0 of the batch.*in this error's `result`") as error:
        vlc.generate(model, params, bad, policy, NEW, **OPTIONS)
    assert error.value.rows == (0,)
    result = error.value.result
    assert result.report.finite.tolist() == [False, True, True]
    np.testing.assert_array_equal(result.tokens[1:], good.tokens[1:])
    np.testing.assert_array_equal(result.report.kept[1:], good.report.kept[1:])


def test_a_step_of_the_answer_counts_until_the_row_has_ended(llava, batch):
    """The embedding of the second token that row 2 draws is spoilt; nothing else holds this token."""
    model, params = llava
    batch = dataclasses.replace(batch, tokens=np.where(batch.tokens > 5, 6 + batch.tokens % 8, batch.tokens))
    for seed in range(20):
        options = {"sampling": vlc.Sampling(temperature=8.0), "seeds": [seed, seed + 1, seed + 2], **OPTIONS}
        good = np.asarray(vlc.generate(model, params, batch, FULL, NEW, **options).tokens)
        token = int(good[2, 1])
        if token not in (*batch.tokens.flat, *good[:2].flat, good[2, 0]):
            break
    bad = spoilt(params, "decoder", "embed_tokens", "embedding", index=(token,))
    with pytest.raises(vlc.NonFiniteError, match="logits while answering are not finite for row 2 of the batch"):
        vlc.generate(model, bad, batch, FULL, NEW, **options)
    steps = vlc.stream(model, bad, batch, FULL, NEW, **options)
    np.testing.assert_array_equal([next(steps), next(steps)], good[:, :2].T)
    with pytest.raises(vlc.NonFiniteError, match="while answering") as error:
        next(steps)
    np.testing.assert_array_equal(error.value.result[:2], good[:2, 2])
    ended = vlc.generate(
        model, bad, batch, FULL, NEW, **(options | {"eos_token_ids": [token]})
    )  # what follows is no answer
    assert int(ended.lengths[2]) == 2
    logits, state = vlc.prefill(model, bad, batch, FULL).start(NEW)
    assert state.finite.tolist() == [True] * 3
    for step in range(2):
        logits, state = vlc.decode_step(model, bad, good[:, step], state)
    assert state.finite.tolist() == [True, True, False]
    assert np.isnan(logits[2]).any()


def test_logits_that_a_caller_masks_are_usable(llava, batch):
    model, params = llava
    logits, state = vlc.prefill(model, params, batch, FULL).start(NEW)
    tokens, _ = vlc.decode(model, params, logits.at[:, :40].set(-jnp.inf), state, NEW, **OPTIONS)
    assert int(tokens[:, 0].min()) >= 40
    with pytest.raises(vlc.NonFiniteError, match="row 1"):
        vlc.decode(model, params, logits.at[1].set(-jnp.inf), state, NEW, **OPTIONS)


@policies
def test_nothing_is_read_between_prefill_and_decoding(llava, batch, policy, monkeypatch):
    model, params = llava
    vlc.generate(model, params, batch, policy, NEW)  # compiled
    array = type(jnp.zeros(1))
    inside = []

    def forbidden(*_, **__):
        raise AssertionError("an array was read on the host")

    def run_prompts(*args):
        out = prompts(*args)
        for name in (
            "__array__",
            "__bool__",
            "__int__",
            "__index__",
            "tolist",
            "item",
            "block_until_ready",
        ):
            inside.append((name, getattr(array, name)))
            monkeypatch.setattr(array, name, forbidden)
        monkeypatch.setattr(jax, "device_get", forbidden)
        return out

    def decode_all(*args):
        out = real(*args)
        monkeypatch.undo()
        return out

    real, prompts = generation.decode_all, generation.run_prompts
    monkeypatch.setattr(generation, "run_prompts", run_prompts)
    monkeypatch.setattr(generation, "decode_all", decode_all)
    vlc.generate(model, params, batch, policy, NEW)
    assert inside
