"""Tokenizers, chat templates, and tokens back to text."""
