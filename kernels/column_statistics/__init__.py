"""What a slice of query rows says about every key: attention mass and sparsity."""

from vlcache_jax.kernels.column_statistics.api import ColumnStatistics, column_statistics

__all__ = ["ColumnStatistics", "column_statistics"]
