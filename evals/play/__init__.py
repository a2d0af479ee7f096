"""A page to play with a model, and an endpoint in OpenAI's form beside it; here, without torch, what both may ask."""

HOST, PORT = "127.0.0.1", 8000
NEW_TOKENS = 512
"""Most new tokens of a request unless the user says otherwise."""
WAITING = 8
"""Requests that may wait while one is answered, unless the user says otherwise."""
