"""Checkpoints: their layout, writing, finding, resuming and reading them, at any number of ranks."""
