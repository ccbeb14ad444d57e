"""The compressed KV cache: where keys and values lie, which are chosen, how they are packed."""
