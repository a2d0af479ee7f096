"""Whole training loops, ours and that of ``transformers``; here, the names that the command and its ranks share."""

OURS, PEER = "ours", "hf_trainer"
WINDOWS = "windows.bin"
