"""The choice of implementations reaches from the public functions to the ops."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import ragged_batch, tiny_llava

import vlcache_jax as vlc
from vlcache_jax.kernels import cards
from vlcache_jax.kernels.attention import api as attention_api
from vlcache_jax.kernels.attention import attention
from vlcache_jax.kernels.decode_attention import Segments, Store, decode_attention, union_attention
from vlcache_jax.kernels.dispatch import implementations

REFERENCE = vlc.Kernels(attention="reference", column_statistics="reference", decode_attention="reference")


def test_named_implementations_keep_and_say_the_same():
    model, params = tiny_llava()
    batch = ragged_batch(rows=2)
    outs = [
        vlc.generate(model, params, batch, vlc.VLCache(budget=0.3), 4, eos_token_ids=[], kernels=kernels)
        for kernels in (None, REFERENCE)
    ]
    np.testing.assert_array_equal(outs[0].report.kept, outs[1].report.kept)
    np.testing.assert_array_equal(outs[0].tokens, outs[1].tokens)


@pytest.mark.parametrize("op", ["attention", "column_statistics", "decode_attention"])
def test_the_choice_arrives_at_every_op(op):
    """No GPU here, so the implementations for one refuse, or are never asked."""
    model, params = tiny_llava()
    name = {"attention": "cudnn", "column_statistics": "pallas_tpu", "decode_attention": "pallas_gpu"}[op]
    with pytest.raises((NotImplementedError, ValueError)):
        vlc.generate(model, params, ragged_batch(rows=2), vlc.VLCache(budget=0.3), 4, kernels=vlc.Kernels(**{op: name}))


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(vlc.InputError, match=r"decode_attention='palas_tpu'.*did you mean 'pallas_tpu'"):
        vlc.Kernels(decode_attention="palas_tpu")


def test_a_program_tells_which_implementation_runs_and_why():
    """Of the platform that it is lowered for; of all names, where several are wanted."""

    def run(query, wanted=None):
        return attention(query, query, query, with_lse=True, implementation=wanted)[0]

    query = jnp.zeros((1, 256, 2, 64), jnp.float32)
    here = jax.jit(run).lower(query).compile().as_text()
    assert implementations(here) == ("attention=xla",)
    several = jax.jit(partial(run, wanted=("cudnn", "xla_wide"))).lower(query).compile().as_text()
    reason = "cudnn: JAX rounds its log-sum-exp to half precision: pass with_lse=False"
    assert implementations(several) == (f"attention=xla_wide <{reason}>",)
    with pytest.raises(NotImplementedError, match=r"^cudnn: JAX rounds"):
        run(query, "cudnn")
    with pytest.raises(NotImplementedError, match=r"^no implementation serves the arguments\. cudnn: JAX rounds"):
        run(query, ("cudnn", "cudnn"))


def for_cuda(function, *shapes):
    """The program for NVIDIA GPUs, as text."""
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def shapes(slots=256):
    """Query, keys, values, offsets and lengths of decode attention."""
    bf16 = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    table = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return bf16((1, 4, 64)), bf16((1, 2, slots, 64)), bf16((1, 2, slots, 64)), table, table


def test_a_card_has_its_kernels_where_it_is_attached_only(monkeypatch):
    """A program that is made without one may run on any; and the next generation has other instructions."""
    query = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    for capability, hopper, cudnn in (
        (None, False, False),
        ((8, 0), False, True),
        ((9, 0), True, True),
        ((10, 0), False, True),
    ):
        monkeypatch.setattr(cards, "compute_capability", lambda capability=capability: capability)
        assert ("mosaic_gpu" in for_cuda(lambda *a: decode_attention(*a), *shapes())) == hopper
        tried = []
        monkeypatch.setitem(attention_api.IMPLEMENTATIONS, "cudnn", lambda *_, tried=tried, **__: refuse(tried))
        for_cuda(lambda q: attention(q, q, q, with_lse=False)[0], query)
        assert bool(tried) == cudnn


def refuse(tried):
    tried.append(1)
    raise NotImplementedError("no cuDNN")


def test_the_hopper_kernel_is_compiled_once_for_all_layers():
    def layers(query, keys, values, offsets, lengths):
        for layer in range(3):
            parts = [(Store(keys, values), Segments(offsets + 16 * layer, lengths))]
            query = union_attention(query, parts, implementation="pallas_gpu")[0].astype(query.dtype)
        return query

    assert for_cuda(layers, *shapes()).count("custom_call @mosaic_gpu") == 1
