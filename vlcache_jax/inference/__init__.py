"""From a batch of prompts to answers: prefill, decoding, sampling, contexts."""
