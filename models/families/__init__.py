"""Families of models: what each of them reads, computes and writes."""
