"""Checks before anything is traced or compiled."""

import jax
import numpy as np

from vlcache_jax.batch import Batch
from vlcache_jax.errors import InputError, PolicyError
from vlcache_jax.interfaces import ModelSpec
from vlcache_jax.policies.base import Policy


def check_prefill(spec: ModelSpec, batch: Batch, policy: Policy, max_new_tokens: int) -> None:
    """Raises if the arguments of a prefill cannot work; what is only known at run time is not checked under `jit`.

    Raises:
      PolicyError: `policy` is not a policy, or its lanes do not divide the model's KV heads.
      InputError: max_new_tokens below 1, a malformed batch, or more positions than the model has.
    """
    if not isinstance(policy, Policy):
        raise PolicyError(f"policy={policy!r} is not a policy: build one, for example VLCache(budget=0.1)")
    if policy.sharing.per_head and spec.num_kv_heads % policy.lanes:
        raise PolicyError(
            f"policy {policy.name!r}: lanes={policy.lanes} do not divide the model's {spec.num_kv_heads} KV heads: "
            f"give a divisor of {spec.num_kv_heads}"
        )
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int | np.integer):
        raise InputError(f"max_new_tokens={max_new_tokens!r} is not an integer")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} leaves no room for an answer: give at least 1")
    shapes = {field: getattr(batch, field).shape for field in ("tokens", "lengths", "vision_index", "pixels")}
    if len({shape[0] for shape in shapes.values()}) != 1 or shapes["tokens"] != shapes["vision_index"]:
        raise InputError(
            f"the batch's arrays disagree on the number of rows or the length: {shapes}; build it with the processor"
        )
    if isinstance(batch.lengths, jax.core.Tracer):
        return
    lengths = np.asarray(batch.lengths)
    if lengths.min() < 1 or lengths.max() > batch.length:
        raise InputError(f"lengths {lengths.tolist()} must lie between 1 and the padded length {batch.length}")
    needed = int(lengths.max()) + int(max_new_tokens)
    if needed > spec.max_positions:
        raise InputError(
            f"row {int(lengths.argmax())} needs {needed} positions ({int(lengths.max())} prompt tokens + "
            f"{max_new_tokens} new ones) but the model has {spec.max_positions}: shorten the prompt, use fewer or "
            "smaller images, or lower max_new_tokens"
        )
