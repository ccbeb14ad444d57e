"""Input processing: images and text to a `vlcache_jax.batch.Batch`."""

from vlcache_jax.models.processing.processor import Processor

__all__ = ["Processor"]
