"""What a model, a batch and a prompt need on a TPU slice, from the TPU's own compiler; no TPU is needed."""
