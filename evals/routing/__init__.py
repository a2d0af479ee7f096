"""Which tokens use how many layers, as a page."""

FEWEST = 64
"""Fewer tokens than this say nothing about their classes."""
