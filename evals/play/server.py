"""The web server: the page, ``/v1/models`` and ``/v1/completions``.

One answer is generated at a time; requests wait for their turn, and one too many gets 429. If a client disconnects, its
answer ends after the current token. Other sites' pages cannot use a server on loopback through the browser: a request
must be JSON, for which browsers need a CORS permission that is not granted, and be addressed to this machine by name.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from evals.play.player import AnswerPart, Asked, Player
from evals.play.protocol import Answer, RequestError, event, read_request

BODY_BYTES = 1 << 20
"""Largest request."""
_HERE = Path(__file__).parent
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_LOOPBACK = ["localhost", "127.0.0.1", "[::1]"]


def application(
    player: Player, waiting: int, hosts: Sequence[str] | None = (), stopping: Callable[[], bool] = lambda: False
) -> Starlette:
    """The whole web application.

    Args:
        player: the model.
        waiting: requests that may wait while one is answered.
        hosts: names besides loopback's that it answers to; None for any.
        stopping: whether the server is about to end; answers then break off.
    """

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(player)]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] != player.name:
            raise RequestError(
                f"there is no model '{request.path_params['name']}'; there is: {player.name}", "model", 404
            )
        return JSONResponse(_model(player))

    routes = [
        *(Route(path, _file(name)) for path, name in (("/", "page.html"), ("/page.css", "page.css"))),
        Route("/page.js", _file("page.js")),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/completions", Completions(player, waiting, stopping), methods=["POST"]),
    ]
    allowed = ["*"] if hosts is None else [*_LOOPBACK, *hosts]
    handlers: dict[Any, Any] = {RequestError: _refused, HTTPException: _http_error, Exception: _fault}
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=allowed, www_redirect=False)]
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


class Completions:
    """``POST /v1/completions``, as an ASGI application: it must learn when the client disconnects."""

    def __init__(self, player: Player, waiting: int, stopping: Callable[[], bool]) -> None:
        self._player, self._waiting, self._stopping = player, waiting, stopping
        self._turn, self._here = asyncio.Lock(), 0
        self._thread = ThreadPoolExecutor(1, "generate")  # the model's passes, one after the other

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        asked = await asyncio.to_thread(self._player.asked, read_request(await _body(request)))
        answer = Answer(asked.request, self._player.name, len(asked.ids))
        with self._seat():
            if asked.request.stream:
                await _unless_gone(receive, self._stream(asked, answer, send))
            else:
                await _unless_gone(receive, self._whole(asked, answer, request, send))

    @contextmanager
    def _seat(self) -> Iterator[None]:
        if self._here > self._waiting:
            raise RequestError(
                f"one request is being answered and {self._waiting} wait, the maximum (--waiting); try again later",
                status=429,
            )
        self._here += 1
        try:
            yield
        finally:
            self._here -= 1

    async def _parts(self, asked: Asked) -> AsyncGenerator[AnswerPart]:
        """The answer's parts, once it is this request's turn."""
        async with self._turn:
            parts = self._player.answer(asked)
            run = asyncio.get_running_loop().run_in_executor
            while not self._stopping() and (part := await run(self._thread, next, parts, None)) is not None:
                yield part

    async def _stream(self, asked: Asked, answer: Answer, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def write(content: bytes) -> None:
            await send({"type": "http.response.body", "body": content, "more_body": True})

        counted, ended, refused = 0, False, _STOPPED
        try:
            async with aclosing(self._parts(asked)) as parts:  # to let the next one have its turn at once
                async for part in parts:
                    counted += part.token is not None
                    ended = part.reason is not None
                    tokens = [] if part.token is None else [part.token]
                    await write(event(answer.body(part.text, part.reason, tokens)))
        except RequestError as error:  # too late for an HTTP status
            refused = error
        for closing in answer.events_after(counted) if ended else [event(refused.body)]:
            await write(closing)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _whole(self, asked: Asked, answer: Answer, request: Request, send: Send) -> None:
        parts = [part async for part in self._parts(asked)]
        if not parts or parts[-1].reason is None:
            response: Response = _refusal(_STOPPED)
        else:
            tokens = [part.token for part in parts if part.token is not None]
            text = "".join(part.text for part in parts)
            response = JSONResponse(answer.body(text, parts[-1].reason, tokens, len(tokens)))
        await response(request.scope, request.receive, send)


_STOPPED = RequestError("the server was stopped", status=503)


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do ``work``, and cancel it as soon as the client disconnects."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(watch())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f"the content type must be application/json, got '{kind}'; set that header", status=415)
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_BYTES:
            raise RequestError(f"a request has at most {BODY_BYTES:,} bytes; shorten the prompt", "prompt", 413)
    return body


def _model(player: Player) -> dict[str, Any]:
    return {"id": player.name, "object": "model", "created": 0, "owned_by": "hopscotch", "details": player.facts}


def _file(name: str) -> Callable[[Request], Awaitable[Response]]:
    async def give(_: Request) -> Response:
        return FileResponse(_HERE / name, headers=_HEADERS)

    return give


def _refusal(refused: RequestError) -> Response:
    return JSONResponse(refused.body, refused.status, {"Retry-After": "1"} if refused.status in (429, 503) else None)


async def _refused(_: Request, refused: RequestError) -> Response:
    return _refusal(refused)


async def _http_error(request: Request, error: HTTPException) -> Response:
    text = f"{request.method} {request.url.path}: {error.detail}; there are GET /, GET /v1/models, POST /v1/completions"
    return _refusal(RequestError(text, status=error.status_code))


async def _fault(_: Request, error: Exception) -> Response:
    body = {"message": f"internal error of the server ({type(error).__name__}); its output has the traceback"}
    return JSONResponse({"error": {**body, "type": "server_error", "param": None, "code": None}}, 500)
