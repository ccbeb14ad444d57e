"""Which rows of a prompt score its keys."""
