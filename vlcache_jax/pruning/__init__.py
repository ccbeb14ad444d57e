"""Dropping visual tokens in front of the decoder and between its layers: a method a file, in `methods`."""
