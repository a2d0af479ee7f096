"""A page to play with a model, and an OpenAI-compatible endpoint; here, without torch, their defaults."""

HOST, PORT = "127.0.0.1", 8000
NEW_TOKENS = 512
"""Maximum number of new tokens per request, unless the user says otherwise."""
WAITING = 8
"""Requests that may wait while one is answered, unless the user says otherwise."""
