"""Any number of requests through one running decode batch: images read ahead, prompts in buckets, rows filled anew."""
