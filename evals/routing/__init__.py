"""A page that shows which tokens use how many layers."""

FEWEST = 64
"""Fewer tokens than this are too few for a report."""
