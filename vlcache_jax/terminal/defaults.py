"""What is meant where nothing is typed."""

POLICY = "ranked_bits"
"""The policy of every command but `demo`, and of lmms-eval's model: docs/pretrained.md says why it is this one."""
