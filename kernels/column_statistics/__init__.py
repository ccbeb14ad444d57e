"""What a slice of query rows says about every key: attention mass and sparsity."""

from vlcache_jax.kernels.column_statistics.api import IMPLEMENTATIONS, ColumnStatistics, column_statistics

__all__ = ["IMPLEMENTATIONS", "ColumnStatistics", "column_statistics"]
