"""Idefics3, SmolVLM and SmolVLM2."""
