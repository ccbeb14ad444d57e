"""No compression."""

from vlcache_jax.policies.base import Policy


def FullCache() -> Policy:
    """Keeps the whole prompt: the yardstick of every other policy.

    Example:
      >>> FullCache().keeps_all
      True
    """
    return Policy(name="full_cache", budget=1.0)
