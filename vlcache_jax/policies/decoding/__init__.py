"""What becomes of generated tokens: a rule a file."""
