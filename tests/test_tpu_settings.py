"""The TPU's compiler takes the kernels, and a step of a whole model, in JAX's 64-bit mode too."""

import jax
import pytest
from test_tpu_attention import arguments as attention_arguments
from test_tpu_column_statistics import compiled as compiled_statistics
from test_tpu_decode_attention import arguments as decode_arguments
from test_tpu_decode_attention import compiled as compiled_decode
from tpu import chip_llava, compile_for, mesh_of

import vlcache_jax as vlc
from vlcache_jax.kernels.attention import attention
from vlcache_jax.planning.programs import Programs, Workload

CHIP, MODEL = "v5e:2x2", "llava-v1.6-mistral-7b"


def test_kernels_in_64_bit_mode():
    with jax.enable_x64(True):
        programs = [
            compile_for(CHIP, lambda *x: attention(*x, with_lse=False)[0], *attention_arguments(MODEL, 512)),
            compiled_statistics(CHIP, MODEL, 512, max_rows=50, given=("lse",)),
            compiled_statistics(CHIP, MODEL, 512),
            compiled_decode(CHIP, [(decode_arguments(32, 8, 128, store), {}) for store in ("bfloat16", "int4")]),
        ]
    assert all("tpu_custom_call" in program.as_text() for program in programs)


@pytest.mark.thorough
def test_prefill_and_a_step_in_64_bit_mode():
    with jax.enable_x64(True):
        mesh = mesh_of("v5e:2x2", {"data": 1, "model": 1})
        programs = Programs(chip_llava(), mesh)
        work = Workload(batch=2, prompt=512, new_tokens=32, tiles=0)
        for policy in (vlc.VLCache(0.1), vlc.H2O(0.1, decoding="evict")):
            assert programs.prefill(work, policy)[0].refused is None
            assert programs.decode_step(work, policy)[0].refused is None
