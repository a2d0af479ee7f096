"""Norms that begin at the final layer's normed state: against least squares by hand, one dimension at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from data.batches import Batch
from model.chunks import IGNORE_INDEX
from model.config import EnsembleConfig
from model.decoder import Decoder
from tests.model import tiny
from trainer.distributed import ALONE
from tune.late_norms import fit_norms

T, PROMPT, PADDING = 16, 3, 5


class Stream:
    """Windows of a prompt, what is learned, and padding; notes which were asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def batch(self, consumed: list[int] | range) -> Batch:
        """The windows of these numbers."""
        self.asked += consumed
        tokens = torch.stack([tiny.random_tokens(1, T, seed=number)[0] for number in consumed])
        targets = tokens.roll(-1, 1)
        targets[:, :PROMPT] = IGNORE_INDEX
        targets[:, T - PADDING :] = IGNORE_INDEX
        documents = torch.tensor([0] * 6 + [1] * (T - PADDING - 6) + [2] * PADDING).expand_as(tokens)
        return Batch(tokens, targets, torch.tensor(consumed), documents=documents, positions=None)


def built(kind: str = "learned", layers: int = 3) -> Decoder:
    """A decoder in training mode with an ensemble whose norms are copies."""
    decoder = tiny.decoder(tiny.config(kind))
    decoder.add_ensemble(EnsembleConfig(layers=layers))
    return decoder


def late_states(decoder: Decoder, stream: Stream, windows: int) -> list[Tensor]:
    """Residual streams after each late layer of every token with a target, [N, D] each."""
    seen: list[list[Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: seen[-1].append(out[0][:, PROMPT : T - PADDING].flatten(0, 1)))
        for layer in decoder.layers
    ]
    with torch.no_grad():
        for number in range(windows):
            seen.append([])
            batch = stream.batch([number])
            decoder.eval()(batch.tokens, documents=batch.documents, sample_ids=batch.sample_ids)
    for hook in hooks:
        hook.remove()
    return [torch.cat(states) for states in zip(*seen, strict=True)]


@pytest.mark.parametrize("kind", ["learned", "dense"])
def test_the_fit_is_least_squares(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tune.late_norms.TOKENS", 6 * T - 1)
    decoder, stream = built(kind), Stream()
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    fit_norms(decoder, stream, T, ALONE)
    assert stream.asked == list(range(6)) and decoder.training
    *late, last = late_states(decoder, Stream(), 6)
    final = decoder.norm(last).detach()
    assert decoder.ensemble is not None
    for norm, x in zip(decoder.ensemble.norms, late, strict=True):
        unit = torch.nn.functional.rms_norm(x, x.shape[-1:], None, decoder.norm.epsilon)
        by_hand = [np.linalg.lstsq(unit[:, [d]], final[:, d], rcond=None)[0][0] for d in range(unit.shape[1])]
        tiny.assert_close(norm.weight, torch.tensor(np.array(by_hand)).float())
    changed = {name for name, value in decoder.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"ensemble.norms.0.weight", "ensemble.norms.1.weight"}


def test_parts_run_where_the_rank_computes_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for a GPU: who is moved where and in which order, one layer at a time."""
    moves: list[tuple[str, str]] = []
    decoder = built()
    names = {module: name for name, module in decoder.named_modules()}
    monkeypatch.setattr("tune.late_norms.TOKENS", T)
    monkeypatch.setattr("tune.late_norms._move", lambda part, device: moves.append((names[part], str(device))))
    here = torch.device("cpu", 0)
    fit_norms(decoder, Stream(), T, replace(ALONE, device=here))
    assert moves[:7] == [
        ("norm", "cpu:0"), ("embed_tokens", "cpu:0"), ("embed_tokens", "cpu"), ("layers.0", "cpu:0"),
        ("layers.0", "cpu"), ("layers.1", "cpu:0"), ("layers.1", "cpu"),
    ]  # fmt: skip
    assert dict(moves) == dict.fromkeys(["norm", "embed_tokens", "layers.0", "layers.1", "layers.2"], "cpu")


def test_a_dimension_without_a_signal_keeps_its_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tune.late_norms.TOKENS", T)
    decoder = built(layers=2)
    assert decoder.ensemble is not None
    copy = decoder.norm.weight[7].item()
    for name, parameter in decoder.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data[7] = 0
    decoder.embed_tokens.weight.data[:, 7] = 0
    fit_norms(decoder, Stream(), T, ALONE)
    (norm,) = decoder.ensemble.norms
    assert norm.weight[7].item() == copy and norm.weight[8].item() != decoder.norm.weight[8].item()


def test_the_hooks_are_gone_when_a_pass_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = built()
    monkeypatch.setattr(Decoder, "_run_layers", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit_norms(decoder, Stream(), T, ALONE)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in decoder.modules())
