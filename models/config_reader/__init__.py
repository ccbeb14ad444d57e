"""Reading `config.json` as transformers 4 and 5 write it for LLaVA, and writing it for transformers 5."""

from vlcache_jax.models.config_reader.reading import read_config
from vlcache_jax.models.config_reader.writing import write_config

__all__ = ["read_config", "write_config"]
