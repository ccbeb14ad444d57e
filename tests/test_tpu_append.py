"""The append kernel compiled by the real TPU compiler: steps over all layers, in place, what they move counted."""

import jax
import jax.numpy as jnp
import pytest
from tpu import compile_for, shape, temporaries

from vlcache_jax.kernels.append import append
from vlcache_jax.kernels.decode_attention import Segments, Store, union_attention
from vlcache_jax.kernels.shapes import SHAPES

LAYERS, ROWS, CAPACITY = 8, 4, 512
MODELS = list({shape.head_dim: name for name, shape in SHAPES.items()}.values())  # one for each head size


def steps(pools, query, key, value, lengths):
    """Three steps: each layer writes its row's token and reads all of them, as decoding does."""

    def layer(pools, layer):
        pools = append(pools, (key, value), layer * CAPACITY + lengths)
        parts = [(Store(*pools), Segments(jnp.full((ROWS, 1), layer * CAPACITY), lengths[:, None] + 1))]
        return pools, union_attention(query, parts)[0]

    def step(carry, _):
        return jax.lax.scan(layer, carry, jnp.arange(LAYERS, dtype=jnp.int32))

    return jax.lax.scan(step, pools, length=3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("topology", ["v5e:2x2", pytest.param("v5p:2x2x1", marks=pytest.mark.thorough)])
def test_rows_write_at_slots_of_their_own_and_nothing_is_copied(topology, name):
    heads, kv_heads, head_dim = SHAPES[name]
    pool = shape(ROWS, kv_heads, LAYERS * CAPACITY, head_dim)
    new = shape(ROWS, kv_heads, head_dim)
    arguments = ((pool, pool), shape(ROWS, heads, head_dim), new, new, shape(ROWS, dtype="int32"))
    program = compile_for(topology, steps, *arguments, donate=(0,))
    pools = 2 * 2 * ROWS * kv_heads * LAYERS * CAPACITY * head_dim
    assert program.memory_analysis().alias_size_in_bytes >= pools
    assert temporaries(program) < max(0.02 * pools, 2**21)  # v5p takes a MiB of its own; the smallest pools are 2**23
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 2


def test_the_kernel_says_what_it_moves():
    """A tile of 16 slots of every head, read and written."""
    pool, new = shape(ROWS, 8, 512, 128), shape(ROWS, 8, 128)
    program = compile_for("v5e:2x2", append, (pool, pool), (new, new), shape(ROWS, dtype="int32"), donate=(0,))
    formula = 2 * 2 * (ROWS * 8 * 16 * 128 * 2)
    assert formula <= program.cost_analysis()["bytes accessed"] < 1.5 * formula + 2**14
