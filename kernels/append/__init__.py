"""Writing one token of every row into buffers, each row at a slot of its own, in place."""

from vlcache_jax.kernels.append.api import IMPLEMENTATIONS, append

__all__ = ["IMPLEMENTATIONS", "append"]
