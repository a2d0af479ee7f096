"""The model behind the page: which requests it can answer, and its tokens with what each one cost.

Dimension letters: T tokens of a pass, S routed sites, k late layers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.detokenizer import Detokenizer
from evals.dial.file import Dial
from evals.generate import prompt_ids
from evals.placement import NO_TOKEN
from evals.play.protocol import CompletionRequest, RequestError
from evals.scoring import Opened, layer_shares
from model.decoder import DecoderOutput
from model.flops import Routed, dense_flops, executed_flops
from model.generate import Pass, passes
from settings import did_you_mean


class Asked(NamedTuple):
    """A request that the model can answer."""

    request: CompletionRequest
    ids: list[int]
    """Of the prompt."""
    before: str
    """Text to return before the continuation."""
    thresholds: Tensor | None
    """fp32 [S], the compute dial."""


class AnswerPart(NamedTuple):
    """A part of the answer."""

    text: str
    token: dict[str, Any] | None
    """Details of a new token, empty unless requested; None for the text after the last one."""
    reason: str | None
    """Why the answer ends here: ``stop`` or ``length``."""


class Player:
    """A model that answers requests.

    Args:
        opened: the model and its tokenizer.
        name: its name.
        most_new_tokens: limit per request.
        dial: its compute dial, if it has one.
        no_dial: why it has none, and how to get one.
    """

    def __init__(self, opened: Opened, name: str, most_new_tokens: int, dial: Dial | None, no_dial: str = "") -> None:
        self.opened, self.name, self.most_new_tokens = opened, name, most_new_tokens
        self.dial, self.no_dial = dial, no_dial
        self.config = opened.decoder.config

    @property
    def facts(self) -> dict[str, Any]:
        """What the page needs to know in advance."""
        ensemble, router = self.opened.decoder.ensemble, self.config.router
        return {
            "step": self.opened.loaded.step,
            "layers": self.config.layers,
            "routed_layers": list(self.config.routed_layers),
            "late_layers": self._late_layers if ensemble is not None else [],
            "positions": self.config.max_positions,
            "max_tokens": self.most_new_tokens,
            "density": None if router is None else self.dial.trained.density if self.dial else router.density,
            "densities": None if self.dial is None else [self.dial.points[place].density for place in (0, -1)],
            "no_dial": self.no_dial,
        }

    def asked(self, request: CompletionRequest) -> Asked:
        """``request``, if the model can answer it.

        Raises:
            RequestError: it cannot.
        """
        if request.model not in (None, self.name):
            hint = did_you_mean(str(request.model), [self.name])
            raise RequestError(f"there is no model '{request.model}'; {hint}", "model", 404)
        if request.max_tokens > self.most_new_tokens:
            raise RequestError(
                f"max_tokens must be at most {self.most_new_tokens}, got {request.max_tokens}; ask for fewer, or start "
                "the server with a larger --max-new-tokens",
                "max_tokens",
            )
        prompt = request.given
        if isinstance(prompt, list):
            beyond = next((token for token in prompt if token >= self.config.vocab_size), None)
            if beyond is not None:
                raise RequestError(
                    f"prompt: the id {beyond} is not one of the model's {self.config.vocab_size}; correct it", "prompt"
                )
        try:
            ids = prompt_ids(self.opened, prompt, request.max_tokens, "max_tokens")
        except ValueError as error:
            raise RequestError(str(error), "prompt") from None
        before = ""
        if request.echo:
            before = prompt if isinstance(prompt, str) else self.opened.tokenizer.decode(prompt)
        return Asked(request, ids, before, self._thresholds(request.density))

    def answer(self, asked: Asked) -> Iterator[AnswerPart]:
        """The answer to what was asked, token by token; stop iterating to stop it.

        Raises:
            RequestError: at a token whose logits are not finite.
        """
        request, tokenizer = asked.request, self.opened.tokenizer
        device = self.opened.decoder.embed_tokens.weight.device
        random = torch.Generator(device)
        random.seed() if request.seed is None else random.manual_seed(request.seed)
        made = passes(
            self.opened.decoder, torch.tensor([asked.ids], device=device), request.max_tokens, request.temperature,
            request.top_p, tokenizer.eos_id, random, asked.thresholds,
        )  # fmt: skip
        detokenizer, stopper, before = Detokenizer(tokenizer, asked.ids), _Stopper(request.stops), asked.before
        start = time.perf_counter()
        for done in made:
            if not bool(done.finite):
                raise RequestError(NO_TOKEN, status=500)
            token = int(done.chosen)
            details = self._details(token, done, start) if request.details else {}
            text, stopped = stopper.add(detokenizer.add(token))
            yield AnswerPart(before + text, details, "stop" if stopped else None)
            if stopped:
                return
            if token == tokenizer.eos_id:
                yield AnswerPart(stopper.rest(detokenizer.rest())[0], None, "stop")
                return
            before = ""
        text, stopped = stopper.rest(detokenizer.rest())
        yield AnswerPart(text, None, "stop" if stopped else "length")

    def _thresholds(self, density: float | None) -> Tensor | None:
        if density is None:
            return None
        if self.dial is None:
            raise RequestError(f"density cannot be set: {self.no_dial}", "density")
        least, most = (self.dial.points[place].density for place in (0, -1))
        if not least <= density <= most:
            raise RequestError(
                f"density must be from {least:.3f} to {most:.3f}, what the dial was calibrated for, got {density:g}; "
                "calibrate it with python -m evals.dial RUN --densities ...",
                "density",
            )
        return self.dial.thresholds(density)

    @torch.inference_mode()
    def _details(self, token: int, done: Pass, start: float) -> dict[str, Any]:
        """What the page shows about a new token; costs and layers are those of the pass that chose it."""
        executed = done.output.routing.executed[:, 0, -1]
        ran, spent = self._ran(executed), self._flops(done.output)
        return {
            "id": token,
            "piece": self.opened.tokenizer.piece(token),
            "layers": float(layer_shares(self.config, executed)) * self.config.layers,
            "ran": ran,
            "votes": self._votes(done.output),
            "flops": spent[0],
            "dense_flops": spent[1],
            "seconds": time.perf_counter() - start,
        }

    def _ran(self, executed: Tensor) -> list[float]:
        """How much of each layer ran: 0 or 1, or a half where one of two modules did."""
        routed = list(self.config.routed_layers)
        shares = executed.float().view(len(routed), -1).mean(1).tolist() if routed else []
        known = dict(zip(routed, shares, strict=True))
        return [known.get(layer, 1.0) for layer in range(self.config.layers)]

    def _flops(self, output: DecoderOutput) -> tuple[float, float]:
        """FLOPs of a pass, and of the same tokens without routers."""
        routing, tokens = output.routing, output.logits.shape[1] if output.logits is not None else 0
        visible = int(routing.visible_keys)
        ran = Routed(tokens, visible, routing.executed_tokens.tolist(), routing.attended_keys.tolist())
        return executed_flops(self.config, ran), dense_flops(self.config, tokens, visible)

    def _votes(self, output: DecoderOutput) -> list[dict[str, Any]]:
        """Each late layer's weight, and the token that it alone would predict."""
        if output.vote is None:
            return []
        votes = []
        for layer, weight, state in zip(
            self._late_layers, output.vote.weights[0, -1].tolist(), output.vote.normed, strict=True
        ):
            probability, likeliest = self.opened.decoder.lm_head(state[0, -1:]).float().softmax(-1).max(-1)
            votes.append(
                {
                    "layer": layer,
                    "weight": weight,
                    "says": self.opened.tokenizer.piece(int(likeliest)),
                    "probability": float(probability),
                }
            )
        return votes

    @property
    def _late_layers(self) -> list[int]:
        ensemble = self.opened.decoder.ensemble
        count = 0 if ensemble is None else ensemble.config.layers
        return list(range(self.config.layers - count, self.config.layers))


class _Stopper:
    """Holds text back while it may be the start of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = stops, ""

    def add(self, text: str) -> tuple[str, bool]:
        """What can be returned once ``text`` is added, and whether a stop string was found."""
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            return self._held[: min(found)], True
        begun = [n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])]
        certain = len(self._held) - max(begun, default=0)
        out, self._held = self._held[:certain], self._held[certain:]
        return out, False

    def rest(self, text: str) -> tuple[str, bool]:
        """What was held back, with the end of the text, and whether a stop string was found in it."""
        out, stopped = self.add(text)
        return (out, True) if stopped else (out + self._held, False)
