"""Whole training loops, ours and that of ``transformers``; here, the names that the command and its ranks share."""

OURS, PEER = "ours", "hf_trainer"
WINDOWS = "windows.bin"
"""In the data folder: the windows of the whole run, T + 1 tokens each, in training order."""
