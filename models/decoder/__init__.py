"""The decoder: embeddings, layers, rotary positions, and how its weights lie."""
