"""Scores and counts are those of single passes, whatever the batches, duplicates and ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.decoder import Decoder
from model.flops import Routed, executed_flops
from tests.evals.tiny import ROUTERS, model
from tests.threads import one_thread as one_thread
from trainer.distributed import ALONE, World
from trainer.tasks.scorer import Scorer, Window


def _rows(lengths: list[int]) -> list[Window]:
    """Windows of random tokens; the last half of each is scored."""
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randint(4, 400, (n + 1,), generator=generator).tolist() for n in lengths]
    return [Window(ids[:-1], ids[1:][len(ids) // 2 :]) for ids in whole]


def _logits(decoder: Decoder, inputs: list[int]) -> tuple[Tensor, Any]:
    with torch.no_grad():
        output = decoder(torch.tensor([inputs]))
    assert output.logits is not None
    return output.logits[0], output.routing


@pytest.mark.parametrize("name", ROUTERS)
def test_scores_and_counts_are_those_of_single_passes(name: str) -> None:
    decoder, rows = model(name), _rows([5, 40, 12, 40, 1])
    scorer = Scorer(decoder, batch_tokens=80)
    scores, flops = scorer.score(rows), 0.0
    for row, scored in zip(rows, scores, strict=True):
        logits, routing = _logits(decoder, row.inputs)
        chosen = logits[-len(row.targets) :]
        expected = -chosen.log_softmax(-1).gather(1, torch.tensor(row.targets)[:, None]).squeeze(1)
        torch.testing.assert_close(scored.nll, expected, rtol=1e-4, atol=1e-4)
        assert scored.hit.tolist() == (chosen.argmax(-1) == torch.tensor(row.targets)).tolist()
        executed, keys = routing.executed_tokens.tolist(), routing.attended_keys.tolist()
        counts = Routed(len(row.inputs), int(routing.visible_keys), executed, keys, len(row.targets))
        flops += executed_flops(decoder.config, counts)
    ran, dense = scorer.flops
    assert ran == pytest.approx(flops, rel=1e-9)  # padding is not counted
    assert ran == dense if name == "dense" else 0 < ran < dense


def test_the_same_inputs_run_once() -> None:
    decoder, rows = model("layer"), _rows([12, 20])
    again = [Window(rows[0].inputs, [7]), rows[1], Window(rows[0].inputs, [8, 9]), rows[0]]
    scorer, single = Scorer(decoder, 64), Scorer(decoder, 1)
    scores = scorer.score(again)
    assert scorer.routed.tokens == 32 and scorer.routed.head_tokens == sum(len(row.targets) for row in again)
    for row, found in zip(again, scores, strict=True):
        torch.testing.assert_close(found.nll, single.score([row])[0].nll, rtol=1e-5, atol=1e-5)


def test_batches_hold_a_number_of_tokens_and_little_padding() -> None:
    scorer = Scorer(model("dense"), 48)
    rows = _rows([12, 3, 12, 60, 11, 4])
    shapes = []
    scorer.decoder.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    done: list[int] = []
    scorer.score(rows, done.append)
    assert shapes == [(1, 60), (3, 12), (2, 4)] and sum(done) == len(rows)  # a row that is too long runs alone
    assert scorer.padding == pytest.approx(1 - (60 + 12 + 12 + 11 + 4 + 3) / (60 + 36 + 8))
    with pytest.raises(ValueError, match="raise --batch-tokens"):
        Scorer(model("dense"), 0)


def _choices(lengths: list[tuple[int, int]], choices: int = 3) -> list[Window]:
    """Questions of some tokens, each followed by choices of some tokens and more."""
    generator = torch.Generator().manual_seed(4)
    draw = lambda n: torch.randint(4, 400, (n,), generator=generator).tolist()  # noqa: E731
    rows = []
    for question, choice in lengths:
        asked = draw(question)
        for number in range(choices):
            answer = draw(choice + number)
            rows.append(Window([*asked, *answer[:-1]], answer))
    return rows


@pytest.mark.parametrize("name", ROUTERS)
def test_what_rows_begin_with_runs_once(name: str) -> None:
    """With the scores and the counts of whole passes."""
    decoder, rows = model(name), _choices([(30, 2), (25, 4), (20, 1), (6, 2)])
    scorer, single = Scorer(decoder, 400), Scorer(decoder, 1)
    passes: list[tuple[int, ...]] = []
    hook = decoder.register_forward_pre_hook(lambda _, inputs: passes.append(tuple(inputs[0].shape)))
    scores = scorer.score(rows)
    hook.remove()
    # Of the last question too little is shared. The others' first 19 tokens run once, of each the last one predicts.
    assert passes == [(3, 19), (9, 14), (3, 9)]
    for row, found in zip(rows, scores, strict=True):
        (alone,) = single.score([row])
        torch.testing.assert_close(found.nll, alone.nll, rtol=1e-4, atol=1e-4)
        assert found.hit.tolist() == alone.hit.tolist()
    assert scorer.routed.tokens == 3 * 19 + sum(len(row.inputs) - 19 for row in rows[:9]) + 7 + 8 + 9
    assert scorer.routed.head_tokens == single.routed.head_tokens
    ran, dense = scorer.flops
    assert ran < single.flops[0] and (ran == dense if name == "dense" else ran < dense)


class _Rank(World):
    """One of several, alone: what the others would give is added by the test."""

    def all_gather_objects(self, value: Any) -> list[Any]:
        return [value]


def test_ranks_share_the_batches_and_run_equally_many_passes() -> None:
    """Each batch is in the same company as on one rank, so that scores are the same bits."""
    decoder, rows = model("layer"), _rows([9, 9, 8, 8, 7, 30, 6, 20])
    expected, passes, found = Scorer(decoder, 20).score(rows), [], {}
    for rank in range(2):
        scorer, count = Scorer(decoder, 20, _Rank(rank, 2, rank, 2, ALONE.device)), []
        hook = decoder.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        with pytest.raises(KeyError):  # the other rank's are missing
            scorer.score(rows)
        hook.remove()
        passes.append(len(count))
        batches = scorer._batches(rows)[rank::2]
        own = [scored for batch in batches for scored in scorer._score_batch(rows, batch)[0]]
        found |= dict(own)
    assert passes == [3, 2]  # of five batches; an engine would run one more
    for place, score in enumerate(expected):
        assert torch.equal(score.nll, found[place].nll)
