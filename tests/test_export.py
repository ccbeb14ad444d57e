"""Programs whose arguments and results are ours go through `jax.export`, into another process too."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stub_model import StubModel, stub_batch, stub_params
from tiny_models import ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.files.exporting import _from_text, _to_bytes

POLICY = vlc.H2O(budget=0.3, decoding="evict")


def exported(function, *args):
    return jax.export.export(jax.jit(function))(*args).serialize()


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


class Stepping(StubModel):
    """A stub model that takes generated tokens, too."""

    def embed_tokens(self, params, tokens):
        return jnp.zeros((*tokens.shape, 1))


def test_prefill_and_a_step():
    """The state holds a rule, which is static."""
    model, batch = Stepping(), stub_batch()
    params, tokens = stub_params(batch), jnp.zeros((batch.size,), jnp.int32)
    of_step = jax.tree.map(lambda x: x[:, :, -1:], params)

    def prefill(params, batch):
        return vlc.prefill(model, params, batch, POLICY).start(4)

    def step(params, tokens, state):
        return vlc.decode_step(model, params, tokens, state)

    expected = prefill(params, batch)
    found = jax.export.deserialize(exported(prefill, params, batch)).call(params, batch)
    same(found, expected)
    arguments = of_step, tokens, found[1]
    same(jax.export.deserialize(exported(step, *arguments)).call(*arguments), step(*arguments))


@pytest.fixture(scope="module")
def answering():
    """(the program as bytes, its arguments, its result): of a whole context, which holds the model."""
    model, params = tiny_llava(layers=1)
    context = vlc.compress(model, params, ragged_batch(rows=2, length=16, tiles=1), vlc.VLCache(budget=0.5))
    questions = vlc.Continuation(np.full((2, 3), 9, np.int32), np.full((2,), 3, np.int32))

    def answer(context, questions):
        return vlc.answer(context, questions, 4, eos_token_ids=[])

    return exported(answer, context, questions), (context, questions), answer(context, questions)


def test_an_answer_with_its_report(answering):
    data, arguments, result = answering
    found = jax.export.deserialize(data).call(*arguments)
    same(found, result)
    assert found.report.policy == "vl_cache"


_ELSEWHERE = """
import sys
import jax, numpy as np
import vlcache_jax as vlc
vlc.Context
program = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
leaves = dict(np.load(sys.argv[2]))
arguments = jax.tree.unflatten(program.in_tree, [leaves[str(i)] for i in range(len(leaves))])[0]
print(program.call(*arguments).tokens.tolist())
"""


def test_in_another_process(answering, tmp_path):
    data, arguments, result = answering
    (tmp_path / "program").write_bytes(data)
    leaves = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(arguments))}
    np.savez(tmp_path / "leaves.npz", **leaves)
    command = [sys.executable, "-c", _ELSEWHERE, str(tmp_path / "program"), str(tmp_path / "leaves.npz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(result.tokens.tolist())


STATICS = [
    (3, vlc.Append()),
    (0, vlc.Evict(recent=vlc.Tokens(3), sinks=1)),
    (8, vlc.Recompress(8, recent=0.1)),
    (8, vlc.RollingWindow(8)),
    ("vl_cache", vlc.Mass(0.9, cap=0.3), 1, 2, 3, ("a note",)),
    ("vl_cache", 0.1, 1, 2, 3, ()),
    ("vl_cache", vlc.Bytes(1000), 1, 2, 3, ()),
    (tiny_llava("bfloat16", newline=True)[0], 0),
    (dataclasses.replace(tiny_llava()[0], dtype=jnp.float32, remat=True), 0),
    (),
]


@pytest.mark.parametrize("static", STATICS, ids=str)
def test_static_fields_come_back_equal(static):
    import json

    found = _from_text(json.loads(_to_bytes(vlc.Report, static)))
    assert found == static
    assert hash(found) == hash(static)


def test_a_model_of_ones_own_is_refused_with_the_remedy():
    model, batch = StubModel(), stub_batch()
    context = vlc.compress(model, stub_params(batch), batch, vlc.FullCache())
    with pytest.raises(vlc.InputError, match=r"Context cannot be exported.*StubModel.*KVState"):
        exported(lambda context: context.logits, context)


def test_only_our_classes_are_made():
    with pytest.raises(KeyError):
        _from_text({"class": "Popen", "fields": {"args": ["true"]}})
