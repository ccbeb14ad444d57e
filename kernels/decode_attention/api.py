"""The public function of the decode attention op."""

import jax

from vlcache_jax.kernels.decode_attention import reference, xla

_IMPLEMENTATIONS = {"xla": xla.decode_attention, "reference": reference.decode_attention}


def decode_attention(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    offsets: jax.Array,
    lengths: jax.Array,
    *,
    scale: float | None = None,
    max_length: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Grouped-query attention of one query per row over one segment per (row, KV head) of a packed store.

        keys[b, lane]:   | layer 0 ....... | layer 1 .. free | layer 2 ............ free |
                                           ^ offsets[b, h]
                                           <-------> lengths[b, h]

    Only the slots of the segments are read: the rest of the store may hold anything, NaN included. The work follows
    the longest segment, not the size of the store. KV head h lies in lane `h * lanes // kv_heads`.

    Args:
      query: [batch, heads, head_dim].
      keys: [batch, lanes, slots, head_dim].
      values: like `keys`.
      offsets: i32 [batch, kv_heads]; [batch, 1] if the heads of a row share one segment; [1, 1] if all rows' segments
        start at the same slot. First slot.
      lengths: i32, like `offsets`, or [batch, 1]. Number of slots; 0 is allowed.
      scale: factor of the logits, head_dim ** -0.5 by default.
      max_length: a bound on `lengths` known when the program is built, or None.
      implementation: "xla" (default) or "reference".

    Returns:
      (out f32 [batch, heads, head_dim], lse f32 [batch, heads]). An empty segment gives 0 and -inf.

    Raises:
      ValueError: shapes that do not fit together, or an unknown implementation.
    """
    batch, heads, head_dim = query.shape
    lanes = keys.shape[1]
    if keys.shape != values.shape or keys.shape[0] != batch or keys.shape[3] != head_dim:
        raise ValueError(f"keys {keys.shape} and values {values.shape} do not fit query {query.shape}")
    if offsets.shape not in (lengths.shape, (1, 1)) or lengths.ndim != 2 or lengths.shape[0] != batch:
        raise ValueError(f"offsets {offsets.shape}, lengths {lengths.shape}: want two of [{batch}, kv_heads or 1] or offsets [1, 1]")
    kv_heads = lanes if offsets.shape[1] == 1 else offsets.shape[1]
    if heads % kv_heads or kv_heads % lanes:
        raise ValueError(f"{heads} query heads, {kv_heads} KV heads and {lanes} lanes do not divide one another")
    if implementation not in (None, *_IMPLEMENTATIONS):
        raise ValueError(f"implementation {implementation!r} is not one of {sorted(_IMPLEMENTATIONS)}")
    function = _IMPLEMENTATIONS[implementation or "xla"]
    scale = head_dim**-0.5 if scale is None else scale
    return function(query, keys, values, offsets, lengths, scale, max_length)
