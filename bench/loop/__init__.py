"""Whole training loops, ours and that of ``transformers``; here what the command and its ranks call things."""

OURS, PEER = "ours", "hf_trainer"
WINDOWS = "windows.bin"
