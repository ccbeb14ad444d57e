"""InternVL3 in the form of transformers."""
