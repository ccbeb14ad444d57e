"""Sparse prefill: which blocks of keys each block of queries looks at. A pattern a file."""
