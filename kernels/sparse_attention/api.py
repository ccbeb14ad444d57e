"""The public function of the sparse attention op."""

from functools import partial
from typing import Any

import jax

from vlcache_jax.kernels.dispatch import Implementation, bound, dispatch
from vlcache_jax.kernels.sparse_attention import pallas_tpu, reference, xla
from vlcache_jax.kernels.sparse_attention.types import Lists, Options

IMPLEMENTATIONS: dict[str, Implementation] = {
    "pallas_tpu": pallas_tpu.sparse_attention,
    "xla": xla.sparse_attention,
    "xla_wide": partial(xla.sparse_attention, wide=True),
    "reference": reference.sparse_attention,
}
_ORDER = {"tpu": ("pallas_tpu", "xla_wide"), "cuda": ("xla_wide",), "default": ("xla",)}


def sparse_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lists: Lists,
    *,
    window: int | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Causal grouped-query attention of every block of queries with the keys that its list names.

        out[t] = sum_j softmax_j(scale q_t . k_j) v_j    over j <= t, j in a block of t's list or j a loose column

    Lists are data: another one compiles nothing, and the time follows their counts, not their capacity. Keys and values
    of blocks that no list names are never read: they may be NaN. Forward only: it has no derivative.

    Args:
      query: [batch, length, heads, head_dim].
      key: [batch, length, kv_heads, head_dim]; heads is a multiple of kv_heads.
      value: like `key`.
      lists: which blocks; of the KV heads, or of the query heads. Within a listed block a query sees what lies before
        it, and itself, or what `lists.order` says.
      window: static; a query sees so many of the latest keys, its own included. None: all.
      scale: factor of the logits, head_dim ** -0.5 by default.
      implementation: None takes the first of the platform's order that serves the arguments; or one of
          "pallas_tpu"  copies of listed blocks double-buffered from HBM, several a step.
          "xla"         for CPUs: one list head after the other; the work is that of the listed blocks.
          "xla_wide"    for GPUs: all at once; a block of queries takes the time of its longest list.
          "reference"   the definition.
      interpret: for the Pallas implementation, as in `pallas_call`.

    Returns:
      (out, lse): out [batch, length, heads, head_dim] in the dtype of `value`, lse f32 [batch, length, heads], the
      log-sum-exp of the logits that were seen. 0 and -inf for a query that sees nothing.

    Raises:
      ValueError: shapes that do not fit together, or an unknown implementation.
      NotImplementedError: the named implementation cannot serve the arguments.

    Example:
      ids = jnp.zeros((batch, kv_heads, 8, 1), jnp.int32)  # the first block of keys alone, for each of 8 blocks
      out, lse = sparse_attention(query, key, value, Lists(ids, jnp.ones((batch, kv_heads, 8), jnp.int32)))
    """
    batch, length, heads, head_dim = query.shape
    if key.shape != value.shape or key.shape[:2] != (batch, length) or key.shape[3] != head_dim:
        raise ValueError(f"key {key.shape} and value {value.shape} do not fit query {query.shape}")
    if heads % key.shape[2]:
        raise ValueError(f"{heads} query heads are not a multiple of {key.shape[2]} KV heads")
    shape = lists.ids.shape
    blocks = -(-length // lists.rows)
    if len(shape) != 4 or shape[0] != batch or shape[1] not in (key.shape[2], heads) or shape[2] != blocks:
        raise ValueError(
            f"lists {shape} must be [{batch}, {key.shape[2]} or {heads}, {blocks}, capacity]: "
            f"{lists.rows} queries a block"
        )
    if lists.counts.shape != shape[:3]:
        raise ValueError(f"counts {lists.counts.shape} must be {shape[:3]}, one for each list")
    if lists.loose is not None and (lists.loose.ndim != 3 or lists.loose.shape[:2] != shape[:2]):
        raise ValueError(f"loose {lists.loose.shape} must be [{shape[0]}, {shape[1]}, columns]")
    if lists.order is not None:
        if lists.loose is not None or window is not None:
            raise ValueError("lists with an order have neither loose columns nor a window: limits say it all")
        for name in ("places", "limits"):
            if (found := getattr(lists.order, name).shape) != (*shape[:2], length):
                raise ValueError(f"{name} {found} must be {(*shape[:2], length)}, one for each token")
    options = Options(head_dim**-0.5 if scale is None else scale, window)
    implementations = bound(IMPLEMENTATIONS, interpret, options)
    return dispatch("sparse_attention", implementation, implementations, _ORDER, query, key, value, lists)
