"""Implementations that no default reaches until they were measured on their hardware; by name only."""
