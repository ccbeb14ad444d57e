"""From a layer's attention, keys and values to a score for every token."""
