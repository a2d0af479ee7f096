"""The wire format: OpenAI's completions, with ``density`` and ``details`` as extras.

A request is refused in OpenAI's form, too: a 4xx whose body names the field, the rule, the values and the fix. Fields
of OpenAI's that have no meaning here are accepted with their neutral values, and refused with others.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, ValidationError

from settings import Strict, did_you_mean

MOST_STOPS = 4
_STOP = Annotated[str, Field(min_length=1)]


class RequestError(Exception):
    """A request that is not answered.

    Args:
        sentence: rule, values, fix.
        field: the request's field at fault; None if none is.
        status: HTTP status.
    """

    def __init__(self, sentence: str, field: str | None = None, status: int = 400) -> None:
        super().__init__(sentence)
        self.sentence, self.field, self.status = sentence, field, status

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        kind = "rate_limit_error" if self.status == 429 else "invalid_request_error"
        return {"error": {"message": self.sentence, "type": kind, "param": self.field, "code": None}}


class StreamOptions(Strict):
    """OpenAI's ``stream_options``."""

    include_usage: bool = False
    """A last chunk without choices counts the tokens."""


class CompletionRequest(Strict):
    """The body of ``POST /v1/completions``."""

    model: str | None = None
    """The name that ``/v1/models`` gives."""
    prompt: str | list[Annotated[int, Field(ge=0)]] | Annotated[list[str], Field(min_length=1, max_length=1)] = ""
    """To continue: one text, alone or in a list, or one list of ids; empty for the start of a document."""
    max_tokens: int = Field(16, ge=1)
    """New tokens."""
    temperature: float = Field(1.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Probability to sample from."""
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    """Of the sampling; another one each time unless given."""
    stop: _STOP | Annotated[list[_STOP], Field(max_length=MOST_STOPS)] | None = None
    """The text ends before any of these."""
    stream: bool = False
    """Server-sent events, one per token."""
    stream_options: StreamOptions = StreamOptions()
    """With ``stream``."""
    echo: bool = False
    """Return the prompt before its continuation."""
    density: float | None = Field(None, gt=0, le=1)
    """The compute dial: mean density; as trained unless given."""
    details: bool = False
    """For every token, return which layers ran, what it cost, and how the late layers voted."""
    n: int | None = Field(None, ge=1, le=1)
    best_of: int | None = Field(None, ge=1, le=1)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    logprobs: None = None
    suffix: None = None
    user: str | None = None

    @property
    def given(self) -> str | list[int]:
        """The prompt."""
        if isinstance(self.prompt, str):
            return self.prompt
        ids = [token for token in self.prompt if isinstance(token, int)]
        return ids if len(ids) == len(self.prompt) else str(self.prompt[0])

    @property
    def stops(self) -> list[str]:
        """The strings of ``stop``."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


def read_request(body: bytes) -> CompletionRequest:
    """The request in ``body``.

    Raises:
        RequestError: it is invalid.
    """
    try:
        content = json.loads(body)
        json.dumps(content, ensure_ascii=False).encode()  # a lone surrogate is not text
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body must be JSON in UTF-8 ({error}); correct it") from None
    if not isinstance(content, dict):
        raise RequestError(
            f"the body must be a JSON object, got {type(content).__name__}; see /v1/completions of OpenAI"
        )
    if unknown := [key for key in content if key not in CompletionRequest.model_fields]:
        hint = did_you_mean(unknown[0], CompletionRequest.model_fields)
        raise RequestError(f"there is no field '{unknown[0]}'; {hint}", unknown[0])
    try:
        return CompletionRequest.model_validate({key: value for key, value in content.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        got = repr(content[field])
        raise RequestError(
            f"{field}: {first['msg'][:1].lower()}{first['msg'][1:]}, got {got if len(got) <= 80 else got[:80] + '...'}"
            f"; {_fix(field)}",
            field,
        ) from None


def _fix(field: str) -> str:
    description = CompletionRequest.model_fields[field].description
    return f"{field} is: {description}" if description else "it is not supported; leave it out"


class Answer:
    """The bodies of one answer.

    Args:
        request: what was asked.
        model: name of the model.
        prompt_tokens: of the prompt.
    """

    def __init__(self, request: CompletionRequest, model: str, prompt_tokens: int) -> None:
        self._request, self._prompt_tokens = request, prompt_tokens
        self._common = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def body(
        self, text: str, reason: str | None, tokens: Sequence[dict[str, Any]], counted: int | None = None
    ) -> dict[str, Any]:
        """A chunk of the answer, or all of it, with ``counted`` new tokens in total."""
        choice: dict[str, Any] = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
        if self._request.details:
            choice["details"] = {"tokens": list(tokens)}
        usage = {} if counted is None else {"usage": self._usage(counted)}
        return {**self._common, "choices": [choice], **usage}

    def events_after(self, counted: int) -> list[bytes]:
        """The events that end a stream."""
        usage = [{**self._common, "choices": [], "usage": self._usage(counted)}]
        return [*(map(event, usage) if self._request.stream_options.include_usage else ()), b"data: [DONE]\n\n"]

    def _usage(self, counted: int) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": counted,
            "total_tokens": self._prompt_tokens + counted,
        }


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"
