"""How the shipped demo checkpoint is trained."""
