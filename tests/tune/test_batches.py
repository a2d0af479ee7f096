"""Batches of examples: what is in a window, ranks, resuming, fingerprint, and what is scored."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from data.batches import IGNORE_INDEX, NO_SAMPLE, Batch, step_sample_ids
from data.placeholders import texts
from data.tokenization import TextTokenizer, load_text_tokenizer
from tests.data.test_tokenization import write_byte_level
from tests.tune.test_examples import write_lines
from tune.batches import ExampleSet, Scored, TuningData
from tune.config import ExamplesConfig

T = 32
CHOICES = [" yes", " no", " it is unknown"]
REAL = Path(texts()) / "tuning"


@pytest.fixture(scope="module", params=["ours", "byte level"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, Any]
) -> TextTokenizer:
    imported = request.param == "byte level"
    return load_text_tokenizer(write_byte_level(tmp_path_factory.mktemp("json")) if imported else corpus["dir"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    write_lines(folder / "sums.jsonl", pairs(60))
    write_lines(folder / "asked.jsonl", [{"prompt": f"is {n} even:", "response": CHOICES[n % 3]} for n in range(23)])
    return folder


def pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{n} and {'a' * (n % 9)}:", "response": f" {n + 1}" * (1 + n % 3)} for n in range(count)]


def blocks(folder: Path, **changes: Any) -> ExamplesConfig:
    block = {
        "sequence_tokens": T,
        "sources": [
            {"name": "sums", "files": [str(folder / "sums.jsonl")], "weight": 3.0},
            {"name": "asked", "files": [str(folder / "asked.jsonl")]},
        ],
        "validation": [{"name": "held", "files": [str(folder / "asked.jsonl")], "choices": CHOICES}],
    }
    return ExamplesConfig.model_validate(block | changes)


def written(folder: Path, tokenizer: TextTokenizer) -> Counter[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Ids and learned targets of every example, encoded here."""
    found: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    for name in ("sums", "asked"):
        for line in (folder / f"{name}.jsonl").read_text().splitlines():
            record = json.loads(line)
            response = (*tokenizer.encode(record["response"]), tokenizer.eos_id)
            found[(*tokenizer.prefix, *tokenizer.encode(record["prompt"]), *response), response] += 1
    return found


def taken_apart(batch: Batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Ids and learned targets of every example in a batch's windows; checks what holds of every row."""
    assert batch.documents is not None and batch.positions is not None
    found = []
    for tokens, targets, documents, positions in zip(
        batch.tokens, batch.targets, batch.documents, batch.positions, strict=True
    ):
        assert documents[0] == 0 and bool(((steps := documents.diff()) >= 0).all() and (steps <= 1).all())
        for document in range(int(documents[-1]) + 1):
            here = documents == document
            assert positions[here].tolist() == list(range(int(here.sum())))
            learned = tuple(targets[here][targets[here] != IGNORE_INDEX].tolist())
            if learned:
                found.append(((*tokens[here].tolist(), learned[-1]), learned))
            else:  # filling: the last document, all the same token
                assert document == documents[-1] and len(set(tokens[here].tolist())) == 1
    return found


@pytest.mark.parametrize("pack", [True, False])
def test_an_epoch_holds_every_example_whole_and_once(folder: Path, tokenizer: TextTokenizer, pack: bool) -> None:
    found: Counter[Any] = Counter()
    for source in blocks(folder).sources:
        data = TuningData(blocks(folder, sources=[source], pack=pack), tokenizer)
        (entry,) = data.summary(8)
        batch = data.batch(range(entry.windows))
        assert batch.tokens.shape == (entry.windows, T) and batch.tokens.dtype == torch.int64
        assert batch.scored_targets == int((batch.targets != IGNORE_INDEX).sum()) == entry.learned_tokens
        found += Counter(taken_apart(batch))
        assert pack or entry.windows == entry.examples
    assert found == written(folder, tokenizer)


def test_filling_is_a_document_without_targets(folder: Path, tokenizer: TextTokenizer) -> None:
    data = TuningData(blocks(folder, pack=False), tokenizer)
    batch = data.batch(range(10))
    assert batch.documents is not None
    filling = batch.documents == 1
    assert filling.any(dim=1).all()  # one example a window, none of which is full
    assert (batch.tokens[filling] == tokenizer.eos_id).all() and (batch.targets[filling] == IGNORE_INDEX).all()


def test_same_samples_at_any_world_size_and_after_a_resume(folder: Path, tokenizer: TextTokenizer) -> None:
    data, again = (TuningData(blocks(folder), tokenizer) for _ in range(2))
    whole = data.batch(range(48))
    for world_size, micro_batch in ((1, 24), (2, 3), (4, 6)):
        accumulation = 24 // (world_size * micro_batch)
        for step in range(2):
            for rank in range(world_size):
                for places in step_sample_ids(24 * step, 24, rank, world_size, micro_batch, accumulation):
                    part = again.batch(places)
                    assert torch.equal(part.tokens, whole.tokens[list(places)])
                    assert torch.equal(part.targets, whole.targets[list(places)])
                    assert part.sample_ids.tolist() == list(places)


def test_skip_ranges_pass_over_samples(folder: Path, tokenizer: TextTokenizer) -> None:
    plain, skipping = (TuningData(blocks(folder, skip_ranges=r), tokenizer) for r in ([], [(2, 5)]))
    batch = skipping.batch(range(4))
    assert batch.sample_ids.tolist() == [0, 1, 5, 6]
    sources = skipping._order.locate(np.array([0, 1, 5, 6]))[0]
    assert batch.sources is not None and batch.sources.tolist() == sources.tolist()
    assert torch.equal(batch.tokens, plain.batch([0, 1, 5, 6]).tokens)
    assert plain.fingerprint == skipping.fingerprint


def test_the_fingerprint_changes_with_all_that_decides_a_sample(
    folder: Path, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    base = blocks(folder)
    sources = [source.model_dump() for source in base.sources]
    other = write_lines(tmp_path / "sums.jsonl", [*pairs(59), {"prompt": "59 and aaaaa:", "response": " 61"}])

    def fingerprint(config: ExamplesConfig) -> str:
        return TuningData(config, tokenizer).fingerprint

    same = fingerprint(base)
    assert fingerprint(blocks(folder, too_long="leave_out")) == same  # nothing is too long
    assert fingerprint(blocks(folder, validation=[])) == same
    changed = [
        blocks(folder, seed=1),
        blocks(folder, sequence_tokens=T + 1),
        blocks(folder, pack=False),
        blocks(folder, sources=[sources[0] | {"weight": 2.0}, sources[1]]),
        blocks(folder, sources=[sources[0] | {"name": "other"}, sources[1]]),
        blocks(folder, sources=[sources[0] | {"files": [str(other)]}, sources[1]]),
        blocks(folder, sources=sources[:1]),
    ]
    assert len({same, *map(fingerprint, changed)}) == len(changed) + 1


def test_what_is_learned_changes_the_fingerprint(folder: Path, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    lines = {"two": {"prompt": "x:", "response": "12"}, "one": {"prompt": "x:1", "response": "2"}}
    paths = [write_lines(tmp_path / f"{name}.jsonl", [line]) for name, line in lines.items()]
    two, one = (TuningData(blocks(folder, sources=[{"name": "it", "files": [str(path)]}]), tokenizer) for path in paths)
    assert torch.equal(two.batch([0]).tokens, one.batch([0]).tokens)
    assert two.fingerprint != one.fingerprint


def test_another_tokenizer_changes_the_fingerprint(folder: Path, corpus: dict[str, Any], tmp_path: Path) -> None:
    tokenizers = [load_text_tokenizer(f) for f in (corpus["dir"], write_byte_level(tmp_path))]
    assert len({TuningData(blocks(folder), tokenizer).fingerprint for tokenizer in tokenizers}) == 2


def test_summary(folder: Path, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    long = write_lines(tmp_path / "long.jsonl", [{"prompt": "x" * 99, "response": "y"}, *pairs(3)])
    sources = [{"name": "long", "files": [str(long)], "weight": 3}, blocks(folder).sources[1].model_dump()]
    data = TuningData(blocks(folder, sources=sources, too_long="leave_out"), tokenizer)
    first, second = data.summary(4000)
    assert (first.name, first.examples, first.left_out, first.cut_texts) == ("long", 3, 1, 0)
    assert (second.examples, second.left_out, first.share) == (23, 0, 0.75)
    assert first.epochs == 3000 / first.windows
    assert 0 < first.fill <= 1 and second.fill > 0.7
    assert first.tokens - first.examples == pytest.approx(first.fill * first.windows * T)
    assert data.vocab_size == tokenizer.vocab_size
    assert first.sentence().startswith("long: 3 examples, 1 left out, ") and "left out" not in second.sentence()
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 40)
    data = TuningData(blocks(folder, sources=[{"name": "t", "files": [str(text)], "format": "text"}]), tokenizer)
    assert ", 1 texts cut, " in data.summary(8)[0].sentence()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("limit", [None, 1, 4, 1000])
def test_every_rank_gets_as_many_batches(
    folder: Path, tokenizer: TextTokenizer, world_size: int, limit: int | None
) -> None:
    config = blocks(folder)
    example_set = ExampleSet(config, config.validation[0], tokenizer)
    ranks = [list(example_set.batches(rank, world_size, 2, limit)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    ids = [number for batches in ranks for batch in batches for number in batch.sample_ids.tolist()]
    samples = min(limit or example_set.samples, example_set.samples)
    assert sorted(number for number in ids if number != NO_SAMPLE) == [
        place * example_set.samples // samples for place in range(samples)
    ]
    for batches in ranks:
        for batch in batches:
            assert batch.tokens.shape == (2, T)
            filling = batch.sample_ids == NO_SAMPLE
            assert (batch.targets[filling] == IGNORE_INDEX).all()
            assert batch.scored_targets == int((batch.targets != IGNORE_INDEX).sum())


def test_batches_hold_the_right_responses_only(folder: Path, tokenizer: TextTokenizer) -> None:
    config = blocks(folder)
    example_set = ExampleSet(config, config.validation[0], tokenizer)
    assert (example_set.name, example_set.examples, example_set.most_choices) == ("held", 23, 3)
    assert (example_set.choices == 3).all() and "23 examples of 3 choices" in example_set.sentence()
    assert example_set.right.tolist() == [n % 3 for n in range(23)]
    assert example_set.source is config.validation[0]
    found = [example for batch in example_set.batches(0, 1, 4) for example in taken_apart(batch)]
    assert len(found) == 23 and set(found) <= set(written(folder, tokenizer))


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_example_is_scored_with_every_choice(folder: Path, tokenizer: TextTokenizer, world_size: int) -> None:
    config = blocks(folder)
    example_set = ExampleSet(config, config.validation[0], tokenizer)
    ranks = [list(example_set.scored_batches(rank, world_size, 2)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    tokens: dict[tuple[int, int], list[int]] = {}
    for batch, scored in (pair for batches in ranks for pair in batches):
        assert len(scored.token) == len(scored.example) == len(scored.choice) == batch.scored_targets
        assert np.array_equal(scored.token, batch.targets[batch.targets != IGNORE_INDEX].numpy())
        assert np.array_equal(scored.right, scored.choice == example_set.right[scored.example])
        for example, choice, token in zip(*map(np.ndarray.tolist, parts(scored)), strict=True):
            tokens.setdefault((example, choice), []).append(token)
    assert tokens == {
        (example, choice): [*tokenizer.encode(CHOICES[choice]), tokenizer.eos_id]
        for example in range(23)
        for choice in range(3)
    }


def parts(scored: Scored) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return scored.example, scored.choice, scored.token


def test_without_choices_every_example_is_scored_once(folder: Path, tokenizer: TextTokenizer) -> None:
    config = blocks(folder)
    example_set = ExampleSet(config, config.sources[0], tokenizer)
    assert example_set.most_choices == 1 and not example_set.right.any()
    scored = [scored for _, scored in example_set.scored_batches(0, 1, 4)]
    assert set(np.concatenate([part.example for part in scored])) == set(range(60))
    assert all(part.right.all() and not part.choice.any() for part in scored)


def test_what_does_not_fit_is_told_of_evaluation_sets(tuning: dict[str, Any], base_run: str, examples: Path) -> None:
    tokenizer = load_text_tokenizer(yaml.safe_load((Path(base_run) / "config.yaml").read_text())["data"]["dir"])
    lines = (examples / "held.jsonl").read_text().splitlines()
    lengths = sorted(len(tokenizer.encode("".join(json.loads(line).values()))) for line in lines)
    config = copy.deepcopy(tuning["data"]) | {"sequence_tokens": lengths[len(lengths) // 2], "too_long": "leave_out"}
    data = ExamplesConfig.model_validate(config)
    held = ExampleSet(data, data.validation[0], tokenizer)
    assert 0 < held.left_out == len(lines) - held.examples
    assert f"parity: {held.examples} examples of 2 choices, {held.left_out} left out" in held.sentence()


def test_windows_of_real_data_are_full(tokenizer: TextTokenizer) -> None:
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is absent")
    source = {"name": "polarity", "files": [str(REAL / "polarity-validation.jsonl")]}
    config = ExamplesConfig.model_validate({"sequence_tokens": 512, "sources": [source], "too_long": "refuse"})
    (entry,) = TuningData(config, tokenizer).summary(8)
    assert entry.examples == 500 and entry.fill > 0.9
