"""No compression, or none but fewer bits."""

from vlcache_jax.policies.methods.method import method
from vlcache_jax.policies.policy import Policy


@method("full_cache", title="Full cache")
def FullCache(*, bits: int | str | None = None) -> Policy:
    """Keeps the whole prompt: the yardstick of every other policy.

    Args:
      bits: see `Policy`.

    Raises:
      PolicyError: bits that cannot be stored.

    Example:
      >>> FullCache().keeps_all
      True
    """
    return Policy(name="full_cache", budget=1.0, bits=bits)
