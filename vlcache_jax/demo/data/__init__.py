"""The pages of the demo: drawn, asked about, answered."""
