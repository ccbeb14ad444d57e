"""No compression, or none but fewer bits."""

from vlcache_jax.policies.base import Policy
from vlcache_jax.policies.method import method


@method
def FullCache(*, bits: int | None = None) -> Policy:
    """Keeps the whole prompt: the yardstick of every other policy.

    Args:
      bits: see `Policy`.

    Returns:
      The policy.

    Raises:
      PolicyError: bits that cannot be stored.

    Example:
      >>> FullCache().keeps_all
      True
    """
    return Policy(name="full_cache", budget=1.0, bits=bits)
