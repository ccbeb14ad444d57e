"""Numbers that are not finite: noticed as data by every program, so that nothing waits, and told once all has run.

scores, merged keys and values of a layer    `Allocation.density` is NaN
any of these, or logits                      `KVState.finite`, then `Report.finite`, is False
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlcache_jax.errors import NonFiniteError
from vlcache_jax.parallel.mesh import is_known
from vlcache_jax.policies.policy import Policy


def finite_rows(logits: jax.Array) -> jax.Array:
    """bool [rows]: whether all of a row's logits [rows, vocab] are finite."""
    return jnp.all(jnp.isfinite(logits), axis=-1)


def usable_rows(logits: jax.Array) -> jax.Array:
    """bool [rows]: whether a token can be chosen from logits [rows, vocab] that a caller may have masked with -inf."""
    return jnp.isfinite(jnp.max(logits, axis=-1))


def is_ready(x: jax.Array) -> bool:
    """Whether the values of an array can be read here without waiting for the device."""
    return is_known(x) and (not isinstance(x, jax.Array) or x.is_ready())  # type: ignore[attr-defined]


def require_finite(
    finite: jax.Array | None,
    result: Any,
    *,
    dtype: Any,
    before: jax.Array | None = None,
    density: jax.Array | None = None,
    policy: Policy | None = None,
) -> None:
    """Raises if a flag of `finite` is False; waits for the device. Does nothing where the flags cannot be read.

    Args:
      finite: bool [...], of each answer.
      result: what the caller would return.
      dtype: of the model; it and what follows are for the message.
      before: the flags, of the same shape, when the answers began.
      density: of the prompts' `Allocation`.
      policy: of the prompts.

    Raises:
      NonFiniteError: it holds `result`, in which the other rows are as they should be.
    """
    if finite is None or not is_known(finite):
        return
    bad = np.argwhere(~jax.device_get(finite))
    if not len(bad):
        return
    rows: tuple[Any, ...] = tuple(x[0] if len(x) == 1 else tuple(x) for x in bad.tolist())
    name = f"policy {policy.name!r}: " if policy else ""
    where = "" if len(rows) == len(finite.reshape(-1)) else "; the other rows are in this error's `result`"
    cause = f"the checkpoint or the input holds NaN or infinity, or overflows in {jnp.dtype(dtype).name}"
    broken = (
        np.zeros((0, 2), int)
        if density is None or not is_known(density)
        else np.argwhere(~np.isfinite(jax.device_get(density)))
    )
    if len(broken):
        row, layer = (int(x) for x in broken[0])
        merged = policy is not None and policy.evicted.mixes
        what = "scores, keys or values" if merged else "scores"
        raise NonFiniteError(
            f"{name}layer {layer} has {what} that are not finite for row {row} of the batch, so no token can be told "
            f"from another: {cause}; check the logits with FullCache(){where}",
            rows,
            result,
        )
    when = ""
    if before is not None and is_known(before):
        when = " while answering" if jax.device_get(before)[tuple(bad.T)].any() else " after the prompt"
    raise NonFiniteError(
        f"{name}logits{when} are not finite for row{'s' * (len(rows) > 1)} {', '.join(map(str, rows))} of the batch: "
        f"{cause}, so no token can be told from another{where}",
        rows,
        result,
    )
