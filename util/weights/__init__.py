"""Checkpoint files, and weights of any origin into a model."""
