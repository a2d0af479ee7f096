"""Scores of candidates and oracle against full logits, one response at a time; any number of ranks; nothing to score.

Dimension letters: E examples, O choices, T tokens of a window, k late layers, C candidates.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data.batches import IGNORE_INDEX, Batch
from model.config import EnsembleConfig
from model.decoder import Decoder
from model.head import Scores
from tests.model import tiny
from tests.ranks import Processes
from trainer.deepspeed_internals import import_deepspeed
from trainer.distributed import ALONE, join, leave
from tune.batches import Scored
from tune.config import TuneConfig
from tune.evaluate import Agreement, ExamplesEvaluation, evaluate_examples

CLASSES = (["even", "odd", "never"], torch.arange(tiny.VOCABULARY) % 2)
WINDOW = 48


class Examples:
    """E random prompts with O responses or one fewer each, one of them right; two responses packed in a window."""

    def __init__(self, examples: int = 9, choices: int = 3, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.name, self.examples, self.most_choices = "toy", examples, choices
        self.choices = np.array([choices - (choices > 2 and example % 2) for example in range(examples)])
        self.right = generator.integers(self.choices)
        self.responses = []
        for example in range(examples):
            prompt = generator.integers(tiny.VOCABULARY, size=generator.integers(2, 9))
            for choice in range(self.choices[example]):
                response = generator.integers(tiny.VOCABULARY, size=generator.integers(1, 9))
                self.responses.append((example, choice, prompt, response))

    def scored_batches(self, rank: int, world_size: int, batch_samples: int) -> Iterator[tuple[Batch, Scored]]:
        windows = [self.responses[first : first + 2] for first in range(0, len(self.responses), 2)]
        for first in range(0, len(windows), batch_samples * world_size):
            start = first + rank * batch_samples
            own = windows[start : start + batch_samples]
            yield self._batch(own + [[]] * (batch_samples - len(own)))

    def _batch(self, windows: list[list[Any]]) -> tuple[Batch, Scored]:
        tokens, positions = (np.zeros((len(windows), WINDOW), np.int64) for _ in range(2))
        documents, targets = np.full_like(tokens, 2), np.full_like(tokens, IGNORE_INDEX)
        scored = []
        for row, window in enumerate(windows):
            place = 0
            for document, (example, choice, prompt, response) in enumerate(window):
                text = np.concatenate([prompt, response])
                part = slice(place, place + len(text) - 1)
                tokens[row, part], documents[row, part] = text[:-1], document
                targets[row, part.stop - len(response) : part.stop] = response
                positions[row, part] = np.arange(len(text) - 1)
                scored += [(example, choice, choice == self.right[example], token) for token in response]
                place = part.stop
        columns = np.array(scored, np.int64).reshape(-1, 4).T
        ids = [row if window else -1 for row, window in enumerate(windows)]
        parts = [torch.from_numpy(part) for part in (tokens, targets, np.array(ids), documents, positions)]
        return Batch(*parts, scored_targets=len(scored)), Scored(columns[0], columns[1], columns[2] > 0, columns[3])


def build(ensemble: EnsembleConfig | None = None, router: str = "dense") -> tuple[Decoder, TuneConfig]:
    """A tiny decoder whose late layers differ much, and the config of a run with it."""
    model_config = tiny.config(router)
    decoder = tiny.decoder(model_config)
    if ensemble is not None:
        decoder.add_ensemble(ensemble)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in decoder.ensemble.named_parameters():
                low, high = (0.5, 1.5) if "norm" in name else (-0.5, 0.5)
                parameter.uniform_(low, high, generator=generator)
    block = {
        "base": {"path": "base"},
        "model": model_config.model_dump(),
        "ensemble": None if ensemble is None else ensemble.model_dump(),
        "data": {"sequence_tokens": WINDOW, "sources": [{"name": "toy", "files": ["toy.jsonl"]}]},
        "train": {"steps": 1, "global_batch_samples": 4, "micro_batch_samples": 2},
    }
    return decoder, TuneConfig.model_validate(block)


def _states(decoder: Decoder, text: np.ndarray) -> list[Tensor]:
    """Residual stream [T, D] after every layer, for one sequence alone."""
    states: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, out: states.append(out[0][0])) for layer in decoder.layers]
    decoder.eval()
    with torch.no_grad():
        decoder(torch.from_numpy(text)[None])
    for hook in hooks:
        hook.remove()
    return states


@torch.no_grad()
def brute_force(decoder: Decoder, examples: Examples) -> dict[str, Any]:
    """Everything that an evaluation says, token by token from full logits."""
    late = decoder.ensemble
    k = 1 if late is None else late.config.layers
    names = [f"layer-{n:02d}" for n in range(len(decoder.layers) - k, len(decoder.layers))]
    names += [] if late is None else ["ensemble", "oracle"]
    nll: dict[Any, list[float]] = {}
    hit: dict[Any, list[bool]] = {}
    votes: list[tuple[int, list[float]]] = []
    for example, choice, prompt, response in examples.responses:
        text = np.concatenate([prompt, response])
        states = _states(decoder, text[:-1])[-k:]
        for offset, token in enumerate(response.tolist()):
            place = len(prompt) - 1 + offset
            norms = [decoder.norm] if late is None else [*late.norms, decoder.norm]
            normed = [norm(state[place]) for norm, state in zip(norms, states, strict=True)]
            logits = [n.double() @ decoder.lm_head.weight.double().T for n in normed]
            if late is not None:
                w = (normed[-1] @ late.router.weight.T + late.router.bias).double().softmax(-1)
                logits.append(sum(share * z for share, z in zip(w, logits, strict=True)))
                if choice == examples.right[example]:
                    votes.append((token, w.tolist()))
            losses = [-float(z.log_softmax(-1)[token]) for z in logits]
            hits = [int(z.argmax()) == token for z in logits]
            if late is not None:
                losses, hits = [*losses, min(losses[:k])], [*hits, any(hits[:k])]
            for name, one_nll, one_hit in zip(names, losses, hits, strict=True):
                nll.setdefault((name, example, choice), []).append(one_nll)
                hit.setdefault((name, example, choice), []).append(one_hit)
    right = list(enumerate(examples.right.tolist()))
    found: dict[str, Any] = {"names": names, "votes": votes}
    for name in names:
        values = [value for e, r in right for value in nll[name, e, r]]
        sums = [[sum(nll[name, e, o]) for o in range(examples.choices[e])] for e, _ in right]
        found[name] = {
            "loss": sum(values) / len(values),
            "exact": [all(hit[name, e, r]) for e, r in right],
            "chosen": [one.index(min(one)) == r for one, (_, r) in zip(sums, right, strict=True)],
            "per token": [
                min(range(examples.choices[e]), key=lambda o, e=e: np.mean(nll[name, e, o])) == r for e, r in right
            ],
        }
    if late is not None:
        for kind in ("chosen", "per token"):
            layers = zip(*(found[name][kind] for name in names[:k]), strict=True)
            found["oracle"][kind] = [any(which) for which in layers]
    return found


def _agrees(evaluation: ExamplesEvaluation, expected: dict[str, Any], with_choices: bool) -> None:
    assert [candidate.name for candidate in evaluation.candidates] == expected["names"]
    for candidate in evaluation.candidates:
        brute = expected[candidate.name]
        assert candidate.loss == pytest.approx(brute["loss"], rel=1e-5)
        assert candidate.exact_match.share == pytest.approx(np.mean(brute["exact"]))
        assert (candidate.choice_accuracy is not None) == with_choices
        shown = "exact"
        if candidate.choice_accuracy is not None:
            assert candidate.choice_accuracy.share == pytest.approx(np.mean(brute["chosen"]))
            shown = "chosen"
        assert (candidate.per_token_accuracy is not None) == with_choices
        if candidate.per_token_accuracy is not None:
            assert candidate.per_token_accuracy.share == pytest.approx(np.mean(brute["per token"]))
        assert candidate.right.tolist() == brute[shown]
        final = expected[[name for name in expected["names"] if name.startswith("layer-")][-1]][shown]
        others = [own for own, theirs in zip(brute[shown], final, strict=True) if not theirs]
        assert candidate.alone == pytest.approx(np.mean(others) if others else 0.0)
        share = np.mean(brute[shown])
        assert candidate.accuracy.error == pytest.approx(math.sqrt(share * (1 - share) / len(brute[shown])))


ENSEMBLES = [EnsembleConfig(layers=2), EnsembleConfig(layers=3), EnsembleConfig(layers=1)]


@pytest.mark.parametrize("ensemble", ENSEMBLES, ids=lambda e: f"k{e.layers}")
@pytest.mark.parametrize("choices", [3, 1])
@pytest.mark.parametrize("router", ["dense", "learned"])
def test_candidates_and_oracle_agree_with_full_logits(ensemble: EnsembleConfig, choices: int, router: str) -> None:
    decoder, config = build(ensemble, router)
    examples = Examples(choices=choices)
    _make_some_exact(decoder, examples)
    modes = []
    hook = decoder.register_forward_hook(lambda *_: modes.append(decoder.training))
    evaluation = evaluate_examples(decoder, examples, CLASSES, config, ALONE)
    hook.remove()
    assert decoder.training and not any(modes)
    expected = brute_force(decoder, examples)
    _agrees(evaluation, expected, choices > 1)
    lengths = [len(r) for e, c, _, r in examples.responses if c == examples.right[e]]
    assert (evaluation.examples, evaluation.choices, evaluation.tokens) == (9, choices, sum(lengths))
    of_layers = [expected[n]["chosen" if choices > 1 else "exact"] for n in expected["names"][: ensemble.layers]]
    right = np.sum(of_layers, axis=0)
    assert evaluation.agreement is not None
    assert evaluation.sentence().startswith(f"ensemble loss {evaluation.candidates[-2].loss:.4f}, ")
    shares = [np.mean(right == ensemble.layers), np.mean((right > 0) & (right < ensemble.layers)), np.mean(right == 0)]
    assert list(dataclasses.astuple(evaluation.agreement)) == pytest.approx(shares)


def _make_some_exact(decoder: Decoder, examples: Examples) -> None:
    """Replace half of the right responses by what some candidate continues the prompt with, one token long or more."""
    late = decoder.ensemble
    assert late is not None
    for number, (example, choice, prompt, _) in enumerate(examples.responses):
        if choice != examples.right[example] or example % 2:
            continue
        norms = [*late.norms, decoder.norm]
        text = prompt
        for step in range(2):
            states = _states(decoder, text)[-len(norms) :]
            # Odd: one layer all along; every fourth: another layer at each token, which the oracle alone gets right.
            layer = (example // 2 + step * (example % 4 == 0)) % len(norms)
            with torch.no_grad():
                token = int(decoder.lm_head(norms[layer](states[layer][-1])).argmax())
            text = np.append(text, token)
        examples.responses[number] = (example, choice, prompt, text[len(prompt) :])


def test_the_oracle_is_no_worse_than_any_layer_and_here_better() -> None:
    """The cases above would prove little if all candidates said the same."""
    decoder, config = build(ENSEMBLES[1])
    examples = Examples(examples=24, choices=1)
    _make_some_exact(decoder, examples)
    *layers, _, oracle = evaluate_examples(decoder, examples, CLASSES, config, ALONE).candidates
    assert oracle.loss < min(layer.loss for layer in layers) - 0.1
    assert oracle.exact_match.share > max(layer.exact_match.share for layer in layers) > 0


def test_the_oracle_chooses_among_the_layers_without_the_ensemble() -> None:
    """Two layers that prefer one wrong response each can make an ensemble that prefers the right one."""

    class OneTokenEach(Examples):
        def __init__(self) -> None:
            self.name, self.examples, self.most_choices = "toy", 1, 3
            self.choices, self.right = np.array([3]), np.array([2])
            self.responses = [(0, choice, np.array([5]), np.array([choice])) for choice in range(3)]

    class ToldScores(torch.nn.Module):
        nll: ClassVar = torch.tensor([[1.0, 3.0, 2.0], [3.0, 1.0, 2.0], [2.0, 2.0, 1.0]])

        def forward(self, tokens: Tensor, targets: Tensor, **_: Any) -> SimpleNamespace:
            told = targets[targets != IGNORE_INDEX]
            weights = torch.full((len(told), 2), 0.5)
            return SimpleNamespace(
                scores=Scores(self.nll[:, told], self.nll[:, told] < 1.5), vote=SimpleNamespace(weights=weights)
            )

    _, config = build(ENSEMBLES[0])
    evaluation = evaluate_examples(ToldScores(), OneTokenEach(), CLASSES, config, ALONE)
    assert [c.choice_accuracy.share for c in evaluation.candidates if c.choice_accuracy] == [0, 0, 1, 0]
    assert [c.exact_match.share for c in evaluation.candidates] == [0, 0, 1, 0]
    assert [c.loss for c in evaluation.candidates] == [2, 2, 1, 2]
    assert evaluation.agreement == Agreement(every=0, some=0, none=1)


@pytest.mark.parametrize("choices", [3, 1])
def test_logits_that_are_not_finite_choose_nothing(choices: int) -> None:
    decoder, config = build(ENSEMBLES[0])
    examples = Examples(choices=choices)
    broken = 4
    examples.right[broken] = 0  # which NaN would be taken for
    spoilt = next(prompt for example, _, prompt, _ in examples.responses if example == broken)
    spoilt[0] = tiny.VOCABULARY - 1
    for part in [part for example, _, *parts in examples.responses if example != broken for part in parts]:
        part[part == spoilt[0]] = 0
    sound = evaluate_examples(decoder, examples, CLASSES, config, ALONE)
    with torch.no_grad():
        decoder.embed_tokens.weight[spoilt[0]] = math.nan
    evaluation = evaluate_examples(decoder, examples, CLASSES, config, ALONE)
    assert evaluation.not_finite == broken + 1 and sound.not_finite == 0
    assert evaluation.sentence().endswith("; the logits of example 5 are not finite")
    for before, after in zip(sound.candidates, evaluation.candidates, strict=True):
        assert all(map(math.isnan, dataclasses.astuple(after.accuracy))) and not after.right[broken]
        others = [example for example in range(examples.examples) if abs(example - broken) > 1]  # of other windows
        assert after.right[others].equal(before.right[others])


def test_votes_are_counted_by_class_of_the_right_responses_tokens() -> None:
    decoder, config = build(ENSEMBLES[0])
    examples = Examples()
    votes = evaluate_examples(decoder, examples, CLASSES, config, ALONE).votes
    brute = brute_force(decoder, examples)["votes"]
    assert votes is not None and votes.layers == ["layer-01", "layer-02"]
    assert votes.classes == ["even", "odd", "all"]  # and not the one that never occurs
    for row, wanted in enumerate((0, 1, None)):
        w = np.array([weights for token, weights in brute if wanted in (None, token % 2)])
        assert votes.tokens[row] == len(w)
        np.testing.assert_allclose(votes.weight[row], w.mean(0), rtol=1e-5)
        np.testing.assert_allclose(votes.largest[row], np.eye(2)[w.argmax(1)].mean(0))
        np.testing.assert_allclose(votes.entropy[row], -(w * np.log(w)).sum(1).mean(), rtol=1e-5)


@pytest.mark.parametrize("choices", [3, 1])
def test_without_an_ensemble_the_final_layer_stands_alone(choices: int) -> None:
    decoder, config = build()
    examples = Examples(choices=choices)
    evaluation = evaluate_examples(decoder, examples, CLASSES, config, ALONE)
    assert [candidate.name for candidate in evaluation.candidates] == ["layer-02"]
    assert evaluation.agreement is None and evaluation.votes is None
    assert evaluation.sentence().startswith("layer-02 loss ") and "(" not in evaluation.sentence()
    _agrees(evaluation, brute_force(decoder, examples), choices > 1)


@pytest.mark.parametrize("ensemble", [None, ENSEMBLES[0]], ids=["final", "ensemble"])
def test_a_batch_with_nothing_to_score_adds_nothing(ensemble: EnsembleConfig | None) -> None:
    class WithFilling(Examples):
        def scored_batches(self, *arguments: int) -> Iterator[tuple[Batch, Scored]]:
            yield self._batch([[], []])
            yield from super().scored_batches(*arguments)

    decoder, config = build(ensemble)
    plain = evaluate_examples(decoder, Examples(), CLASSES, config, ALONE)
    filled = evaluate_examples(decoder, WithFilling(), CLASSES, config, ALONE)
    assert as_json(filled) == as_json(plain)


def test_a_response_that_no_batch_holds_is_noticed() -> None:
    class WithHole(Examples):
        def scored_batches(self, *arguments: int) -> Iterator[tuple[Batch, Scored]]:
            yield from list(super().scored_batches(*arguments))[:-1]

    decoder, config = build()
    with pytest.raises(AssertionError, match="not scored"):
        evaluate_examples(decoder, WithHole(), CLASSES, config, ALONE)


def as_json(evaluation: ExamplesEvaluation) -> str:
    """All of it, to compare."""
    return json.dumps(dataclasses.asdict(evaluation), default=lambda tensor: tensor.tolist())


def test_two_ranks_find_what_one_does_with_zero_3_too(tmp_path: Path) -> None:
    """Rank 1 has less to score than rank 0, and in the last batch nothing."""
    with Processes(_rank, tmp_path, count=2) as ranks:
        assert ranks.end() == [0, 0], ranks.output
    decoder, config = build(ENSEMBLES[0], "learned")
    one = json.loads(as_json(evaluate_examples(decoder, Examples(11), CLASSES, config, ALONE)))
    for rank in (0, 1):
        for kind in ("bare", "zero-3"):
            found = json.loads((tmp_path / f"{kind}-{rank}.json").read_text())
            words, numbers = _flat(found)
            assert words == _flat(one)[0] and numbers == pytest.approx(_flat(one)[1], rel=1e-5), (kind, rank)


def _rank(folder: Path) -> None:
    world = join(60.0)
    rank = world.rank
    decoder, config = build(ENSEMBLES[0], "learned")
    last = list(Examples(11).scored_batches(1, 2, config.train.micro_batch_samples))[-1][0]
    assert world.size == 2 and last.scored_targets == 0
    evaluation = evaluate_examples(decoder, Examples(11), CLASSES, config, world)
    (folder / f"bare-{rank}.json").write_text(as_json(evaluation))
    engine, *_ = import_deepspeed().initialize(
        model=decoder,
        optimizer=torch.optim.AdamW(decoder.parameters()),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        },
    )
    evaluation = evaluate_examples(engine, Examples(11), CLASSES, config, world)
    (folder / f"zero-3-{rank}.json").write_text(as_json(evaluation))
    engine.destroy()
    dist.barrier()
    leave()


def _flat(value: Any) -> tuple[list[str], list[float]]:
    """The leaves of nested dictionaries and lists: words, and numbers."""
    if isinstance(value, str):
        return [value], []
    if not isinstance(value, dict | list):
        return [], [value]
    leaves = [_flat(one) for one in (value.values() if isinstance(value, dict) else value)]
    return [word for words, _ in leaves for word in words], [number for _, numbers in leaves for number in numbers]
