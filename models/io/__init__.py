"""Checkpoint folders to models and back."""
