"""Checkpoints whose weights are codes already: AWQ, GPTQ and compressed-tensors, by their layouts."""
