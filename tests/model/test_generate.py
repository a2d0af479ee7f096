"""Sampling, ends and refusals of generation; greedy agreement with the full forward is in test_decoding.py."""

from __future__ import annotations

import pytest
import torch

from model.decoder import Decoder
from model.generate import generate, passes, pick
from tests.model.tiny import assert_close, config, decoder, random_tokens

LOGITS = torch.log(torch.tensor([[0.05, 0.5, 0.15, 0.3]]))


@pytest.fixture
def model() -> Decoder:
    return decoder(config()).eval()


def frequencies(temperature: float, top_p: float) -> torch.Tensor:
    picked = pick(LOGITS.expand(20_000, -1), temperature, top_p, torch.Generator().manual_seed(0))
    return torch.bincount(picked, minlength=4) / 20_000


def test_temperature() -> None:
    assert pick(LOGITS, 0.0, 1.0, None).tolist() == [1] == pick(LOGITS, 1e-38, 1.0, None).tolist()
    torch.testing.assert_close(frequencies(1.0, 1.0), LOGITS.exp()[0], rtol=0, atol=0.015)
    squared = LOGITS[0].exp().square()
    torch.testing.assert_close(frequencies(0.5, 1.0), squared / squared.sum(), rtol=0, atol=0.015)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, [1]), (0.49, [1]), (0.6, [1, 3]), (0.9, [1, 2, 3]), (1.0, range(4))]
)
def test_top_p(top_p: float, kept: list[int]) -> None:
    expected = torch.zeros(4)
    expected[list(kept)] = LOGITS[0, list(kept)].exp()
    torch.testing.assert_close(frequencies(1.0, top_p), expected / expected.sum(), rtol=0, atol=0.015)


def test_sampling_follows_its_generator(model: Decoder) -> None:
    runs = [generate(model, random_tokens(), 6, 1.0, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_rows_do_not_depend_on_each_other(model: Decoder) -> None:
    prompt = random_tokens(length=7)
    together = generate(model, prompt, 5)
    assert torch.equal(together[1:2], generate(model, prompt[1:2], 5))


def test_end_of_sequence(model: Decoder) -> None:
    prompt = random_tokens(length=7)
    free = generate(model, prompt, 12)
    eos = int(free[0, 9])  # what row 0 says third
    ended = generate(model, prompt, 12, eos_id=eos)
    assert ended.shape[1] <= free.shape[1]
    for row in range(3):
        said = free[row, 7:].tolist()
        stop = said.index(eos) + 1 if eos in said else len(said)
        assert ended[row, 7 : 7 + stop].tolist() == said[: min(stop, ended.shape[1] - 7)]
        assert (ended[row, 7 + stop :] == eos).all()
    alone = generate(model, prompt[:1], 12, eos_id=eos)
    assert alone.shape[1] == 7 + free[0, 7:].tolist().index(eos) + 1  # stops once every row has ended


def test_no_new_tokens(model: Decoder) -> None:
    assert torch.equal(generate(model, random_tokens(), 0), random_tokens())


def test_empty_prompt_is_refused(model: Decoder) -> None:
    with pytest.raises(ValueError, match="prompt is empty; give at least one token"):
        generate(model, torch.zeros(1, 0, dtype=torch.int64), 3)


@pytest.mark.parametrize("kind", ["dense", "learned", "random", "stride"])
def test_rows_of_unlike_length_are_as_each_alone(kind: str) -> None:
    """Whatever stands in the padding, and also where a row has none."""
    model, lengths = decoder(config(kind)).eval(), (9, 5, 1)
    rows = [random_tokens(1, length, seed=length) for length in lengths]
    padding = torch.tensor([max(lengths) - length for length in lengths])
    prompt = torch.cat(
        [torch.cat((torch.full((1, int(p)), 3), row), dim=1) for p, row in zip(padding, rows, strict=True)]
    )
    together = list(passes(model, prompt, 6, padding=padding))
    for place, row in enumerate(rows):
        for one, alone in zip(together, passes(model, row, 6), strict=True):
            assert one.chosen[place] == alone.chosen[0]
            assert_close(one.output.logits[place, -1], alone.output.logits[0, -1], 1e-4)
