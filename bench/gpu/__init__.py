"""Checks that need a GPU, in one time-limited command for a machine borrowed for minutes: ``make gpu``."""
