"""What becomes of the tokens that a layer does not keep: a rule a file."""
