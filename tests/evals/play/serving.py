"""A server on loopback, inside of the test's process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from data.tokenization import load_text_tokenizer
from evals.dial.file import Dial, Point, fingerprint
from evals.scoring import Opened
from model.decoder import Decoder
from tests.evals.tiny import model
from trainer.config import WeightsConfig
from tune.load import Loaded

uvicorn = pytest.importorskip("uvicorn", reason="needs starlette and uvicorn: requirements-dev.txt")
pytest.importorskip("starlette")

from evals.play.player import Player  # noqa: E402
from evals.play.server import application  # noqa: E402

NAME = "tiny"


def opened(decoder: Decoder, corpus: dict[str, Any]) -> Opened:
    """A model with the corpus's tokenizer, as if it had been read."""
    config = WeightsConfig(model=decoder.config)
    return Opened(Loaded(decoder, config, None, Path("tiny")), load_text_tokenizer(corpus["dir"]))


def player(name: str, corpus: dict[str, Any], dial: bool = False, **sizes: Any) -> Player:
    """Of one of the models of tests/evals/tiny.py."""
    decoder = model(name, **sizes)
    return Player(opened(decoder, corpus), NAME, 1000, dial_for(decoder) if dial else None, "it has no dial")


def dial_for(decoder: Decoder) -> Dial:
    """From density 0.25, no site at all, to 1, all of them; 0.5 as trained."""
    sites = len(decoder.config.sites)

    def point(density: float, threshold: float | None, trained: bool = False) -> Point:
        return Point(
            density=density,
            trained=trained,
            thresholds=[threshold] * sites,
            site_targets=[density] * sites,
            calibration_density=density,
            held_out_density=density,
            held_out_site_densities=[density] * sites,
            flops_per_token=1.0,
            dense_flops_per_token=1.0,
            loss=1.0,
        )

    return Dial(
        model=fingerprint(decoder.config),
        step=0,
        validation_set="none",
        calibration_windows=1,
        held_out_windows=1,
        window_tokens=32,
        sites=decoder.config.sites,
        points=[point(0.25, 1e9), point(0.5, 0.0, trained=True), point(1.0, None)],
        lowest_margins=[-1e9] * sites,
    )


@contextmanager
def served(made: Player, waiting: int = 2) -> Iterator[str]:
    """The address at which ``made`` answers."""
    app = application(made, waiting, stopping=lambda: server.should_exit)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=10))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def counted(decoder: Decoder) -> Iterator[list[int]]:
    """Tokens of every pass from now on."""
    passes: list[int] = []
    hook = decoder.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0].shape[1]))
    yield passes
    hook.remove()


def greedy(made: Player, ids: list[int], count: int, thresholds: torch.Tensor | None = None) -> str:
    """What the model writes after ``ids``."""
    from model.generate import generate

    whole = generate(made.opened.decoder, torch.tensor([ids]), count, thresholds=thresholds)[0].tolist()
    return made.opened.tokenizer.decode(whole)[len(made.opened.tokenizer.decode(ids)) :]
