"""Dropping visual tokens between layers: a method a file."""
