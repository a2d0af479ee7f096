"""A page in the browser to play with a model, and an OpenAI-compatible endpoint.

    python -m evals.play runs/books
    python -m evals.play runs/books --port 8080 --dial elsewhere/dial.json

MODEL is a run, a checkpoint or a folder of weights. The page shows a continuation of any prompt as it is generated,
each token coloured by the layers that ran for it; if the run has a compute dial (``evals.dial``), at any density, two
side by side; and for each token, which layers ran and how the late layers voted. ``/v1/completions`` answers OpenAI's
clients, with ``density`` as an extra field:

    curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' \\
        -d '{"prompt": "It was", "max_tokens": 40, "temperature": 0, "density": 0.4}'

Requests are answered one after the other. Only this machine can connect unless ``--host`` says otherwise; there is no
password. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import errno
import ipaddress
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from evals.dial import JSON, folder_of
from evals.placement import add_placement, check_placement, placed
from evals.play import HOST, NEW_TOKENS, PORT, WAITING
from settings import command_parser, path_argument, user_errors
from settings.project import install_command
from trainer import preflight

if TYPE_CHECKING:
    from evals.dial.file import Dial
    from evals.placement import Placement
    from evals.scoring import Opened

_STOP_S = 5
"""How long interrupted answers may take at shutdown."""


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("evals.play", __doc__)
    parser.add_argument("model", type=path_argument, metavar="MODEL", help="a run, a checkpoint or a folder of weights")
    parser.add_argument(
        "--dial", type=path_argument, metavar="FILE", help="thresholds for densities (default: RUN/dial/dial.json)"
    )
    parser.add_argument("--host", default=HOST, metavar="ADDRESS", help=f"address to listen on (default {HOST})")
    parser.add_argument(
        "--port", type=int, default=PORT, metavar="N", help=f"port to listen on, 0 for a free one (default {PORT})"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=NEW_TOKENS,
        metavar="N",
        help=f"largest max_tokens of a request (default {NEW_TOKENS})",
    )
    parser.add_argument(
        "--waiting",
        type=int,
        default=WAITING,
        metavar="N",
        help=f"requests that may wait while one is answered (default {WAITING})",
    )
    add_placement(parser)
    return parser


def _check(options: argparse.Namespace) -> None:
    for name, least, most in (("port", 0, 65_535), ("max_new_tokens", 1, None), ("waiting", 0, None)):
        value, option = getattr(options, name), name.replace("_", "-")
        if value < least or (most is not None and value > most):
            upper = "" if most is None else f" and at most {most}"
            raise ValueError(f"--{option} must be at least {least}{upper}, got {value}")
    check_placement(options)
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{error.name} is not installed; install it with: {install_command('requirements-dev.txt')}"
        ) from None


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, opened before the model is read, which takes longer: connections wait until then."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(
                f"port {port} of {host} is taken by another program; give another with --port, or 0 for a free one"
            ) from None
        raise ValueError(
            f"cannot listen on {host}, port {port} ({error.strerror}); give an address of this machine with --host, "
            "and a port above 1023"
        ) from None


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _dial(options: argparse.Namespace, opened: Opened) -> tuple[Dial | None, str]:
    """The model's dial; or why there is none, and how to get one.

    Raises:
        ValueError: the one that ``--dial`` names is not this model's.
    """
    from evals.dial.file import Dial
    from trainer.config import PretrainConfig, WeightsConfig

    config, step = opened.decoder.config, opened.loaded.step
    if options.dial is not None:
        return Dial.load(options.dial, config, step), ""
    if config.router is None or not config.router.learned:
        return None, "this model has no learned routers, so every token takes the same layers"
    if not isinstance(opened.loaded.config, PretrainConfig | WeightsConfig):
        return None, "the compute dial is for models of stage one, and this one was tuned"
    folder = folder_of(options.model)
    if folder is None:
        return None, "this model is not in a run; give its dial with --dial, from python -m evals.dial RUN"
    try:
        return Dial.load(folder / JSON, config, step), ""
    except ValueError as error:
        return None, str(error)


def main(arguments: Sequence[str] | None = None) -> int:
    """Open the model and serve it until Ctrl-C."""
    options = _parser().parse_args(arguments)
    with user_errors():
        _check(options)
        preflight.open_model(options.model)
        listening = _listen(options.host, options.port)
        with placed(options) as placement:
            _serve(options, placement, listening)
        print("stopped", flush=True)
    return 0


def _serve(options: argparse.Namespace, placement: Placement, listening: socket.socket) -> None:
    """Read the model and answer on ``listening``, until a signal."""
    import uvicorn

    from evals.play.player import Player
    from evals.play.server import application
    from evals.scoring import open_model

    opened = open_model(options.model, placement)
    dial, no_dial = _dial(options, opened)
    player = Player(opened, options.model.resolve().name, options.max_new_tokens, dial, no_dial)
    address, port = listening.getsockname()[:2]
    alone = _is_loopback(address)
    hosts = [address, options.host] if alone else None
    app = application(player, options.waiting, hosts, lambda: server.should_exit)
    how = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=_STOP_S)
    server = uvicorn.Server(how)
    if not alone:
        print(
            f"warning: {options.host} lets other machines in without a password: anyone who reaches port {port} can "
            "use the model",
            file=sys.stderr,
        )
    shown = f"[{address}]" if ":" in address else address
    print(f"{player.name}: http://{shown}:{port}/ (Ctrl-C ends it)", flush=True)
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listening])


if __name__ == "__main__":
    raise SystemExit(main())
