"""The demo: its data, the recipe of the shipped checkpoint and the study on it. Only the command line imports it."""
