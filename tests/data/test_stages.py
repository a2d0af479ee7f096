"""Mixtures with stages: what a border moves and what it does not, and stages that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.batches import TrainingData, step_sample_ids
from data.config import DataConfig
from data.order import Order, StagedMixture
from data.stages import MixtureStage, Stage, describe_stages, stage_after
from tests.data.helpers import config_of, documents, prepared, write_jsonl

NAMES = ["web", "code", "books"]
WINDOWS = [700, 90, 33]
STAGES = [
    Stage("warm-up", 0, [1.0, 0.0, 0.0]),
    Stage("main", 137, [0.7, 0.3, 0.0]),
    Stage("annealing", 3456, [0.2, 0.0, 0.8]),
]
END = 5000


def located(names: list[str], windows: list[int], stages: list[Stage]) -> list[tuple[str, int, int]]:
    """Name of the source, epoch and window of the first ``END`` samples."""
    source, epoch, window = Order(names, windows, stages, seed=5).locate(np.arange(END))
    return [(names[s], e, w) for s, e, w in zip(source.tolist(), epoch.tolist(), window.tolist(), strict=True)]


def test_sources_go_on_counting_over_borders() -> None:
    """Borders lie within blocks: every window once an epoch, in epochs that end before the next begins."""
    source, epoch, window = Order(NAMES, WINDOWS, STAGES, seed=5).locate(np.arange(END))
    for number, windows in enumerate(WINDOWS):
        mine = source == number
        ordinals = np.arange(mine.sum())
        np.testing.assert_array_equal(epoch[mine], ordinals // windows)
        for this in range(int(epoch[mine].max()) + 1):
            drawn = window[mine & (epoch == this)]
            assert len(set(drawn.tolist())) == len(drawn)
    assert set(source[:137]) == {0} and set(source[137:3456]) == {0, 1} and set(source[3456:]) == {0, 2}
    assert epoch[source == 2].max() >= 30  # annealing goes through the small source many times


def test_each_stage_keeps_its_shares() -> None:
    source, _ = StagedMixture(STAGES, seed=5).locate(np.arange(END))
    for stage, end in zip(STAGES, [137, 3456, END], strict=True):
        blocks = (end - stage.first) // 1000 * 1000
        counts = np.bincount(source[stage.first : stage.first + blocks], minlength=3)
        assert (abs(counts - np.array(stage.weights) * blocks) < 1).all()


def test_any_slice_across_a_border_gives_the_same_samples() -> None:
    whole = np.stack(Order(NAMES, WINDOWS, STAGES, seed=5).locate(np.arange(END)))
    for first, count in ((136, 2), (137, 1), (3400, 100), (0, END)):
        part = np.stack(Order(NAMES, WINDOWS, STAGES, seed=5).locate(np.arange(first, first + count)))
        np.testing.assert_array_equal(part, whole[:, first : first + count])
    backwards = np.stack(Order(NAMES, WINDOWS, STAGES, seed=5).locate(np.arange(END)[::-1].copy()))
    np.testing.assert_array_equal(backwards[:, ::-1], whole)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_another_source_moves_no_sample_of_the_stages_before_its_own(place: int) -> None:
    """What a fork with other data relies on, wherever in the list the new source stands."""
    before = located(NAMES, WINDOWS, STAGES)
    names, windows = [*NAMES[:place], "new", *NAMES[place:]], [*WINDOWS[:place], 50, *WINDOWS[place:]]
    stages = [Stage(n, first, [*weights[:place], 0.0, *weights[place:]]) for n, first, weights in STAGES]
    added = Stage("fork", 4000, [*([1.0] * place), 5.0, *([1.0] * (3 - place))])
    after = located(names, windows, [*stages, added])
    assert after[:4000] == before[:4000]
    assert after[4000:] != before[4000:] and {name for name, _, _ in after[4000:]} == {*NAMES, "new"}


def test_a_stage_added_to_data_without_stages_moves_no_sample_before_it() -> None:
    plain = located(NAMES[:2], WINDOWS[:2], [Stage("", 0, [0.7, 0.3])])
    staged = located(NAMES, WINDOWS, [Stage("main", 0, [0.7, 0.3, 0.0]), Stage("annealing", 2345, [1.0, 1.0, 1.0])])
    assert staged[:2345] == plain[:2345]


@pytest.mark.parametrize("consumed", [0, 1, 137, 138, 2000, 4321])
@pytest.mark.parametrize("ranges", [[], [(100, 200), (3000, 3900)], [(4400, 4500)]])
def test_what_a_run_takes_is_what_its_samples_are(consumed: int, ranges: list[tuple[int, int]]) -> None:
    mixture = StagedMixture(STAGES, seed=5)
    ids = np.array([i for i in range(END + 2000) if not any(a <= i < b for a, b in ranges)][:consumed], np.int64)
    counted = np.zeros((3, 3), np.int64)
    source, _ = mixture.locate(ids)
    for number, stage in zip(source, np.searchsorted([0, 137, 3456], ids, side="right") - 1, strict=True):
        counted[stage, number] += 1
    np.testing.assert_array_equal(mixture.taken(consumed, ranges), counted)
    if consumed:
        expected = int(np.searchsorted([0, 137, 3456], ids[-1], side="right")) - 1
        assert stage_after(STAGES, consumed, ranges) == expected


def test_stages_are_told_with_epochs_and_without() -> None:
    taken = [("web", [137, 10, 0], 100), ("code", [0, 40, 0], None), ("books", [0, 0, 0], 7)]
    assert describe_stages(STAGES, taken, 10) == [
        "warm-up from token 0 on: web 1,370 tokens (1.37 epochs)",
        "main from token 1,370 on: web 100 tokens (0.10 epochs), code 400 tokens",
        "annealing from token 34,560 on: not reached by this run",
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder with three sources."""
    folder = tmp_path_factory.mktemp("stages")
    for seed, name in enumerate(("second", "third"), start=1):
        write_jsonl(folder / f"{name}.jsonl", documents(40 * seed, seed=seed))
    prepared(folder, **blocks(folder))
    return folder


def blocks(folder: Path, *names: str) -> dict[str, Any]:
    files = {"main": "raw", "second": "second", "third": "third"}
    wanted = names or files
    return {"sources": [{"name": name, "files": [str(folder / f"{files[name]}.jsonl")]} for name in wanted]}


def staged(folder: Path, stages: list[dict[str, Any]], *names: str, **changes: Any) -> DataConfig:
    return config_of(folder, **(blocks(folder, *names) | {"stages": stages} | changes))


MAIN = {"name": "main", "from_tokens": 0, "weights": {"main": 3, "second": 1}}
LAST = {"name": "last", "from_tokens": 16 * 50, "weights": {"third": 1, "main": 1}}


def test_the_same_tokens_at_any_world_size_across_a_border(folder: Path) -> None:
    config = staged(folder, [MAIN, LAST], sequence_tokens=16)
    global_batch, steps = 24, 4  # sample 50 lies within the third step
    expected = TrainingData(config).batch(range(steps * global_batch))
    assert expected.sources is not None
    assert 2 not in expected.sources[:50] and 1 not in expected.sources[50:] and 2 in expected.sources[50:]
    for world_size, micro_batch in ((1, 4), (2, 4), (3, 8), (24, 1)):
        accumulation = global_batch // (world_size * micro_batch)
        for step in range(steps):
            for rank in range(world_size):
                data = TrainingData(config)  # a fresh process at every step: nothing is remembered
                consumed = step * global_batch
                for ids in step_sample_ids(consumed, global_batch, rank, world_size, micro_batch, accumulation):
                    assert torch.equal(data.batch(ids).tokens, expected.tokens[list(ids)])


def test_another_source_at_a_fork_keeps_the_tokens_of_the_past(folder: Path) -> None:
    """``third`` was not there before; the fingerprint, which covers it, is another one, the past is not."""
    past = TrainingData(config_of(folder, **blocks(folder, "main", "second"), sequence_tokens=16))
    even = {**MAIN, "weights": {"main": 1, "second": 1}}
    fork = TrainingData(staged(folder, [even, LAST], "third", "main", "second", sequence_tokens=16))
    assert torch.equal(fork.batch(range(50)).tokens, past.batch(range(50)).tokens)
    assert not torch.equal(fork.batch(range(50, 90)).tokens, past.batch(range(50, 90)).tokens)
    assert fork.fingerprint != past.fingerprint


def test_skip_ranges_move_no_border(folder: Path) -> None:
    plain = TrainingData(staged(folder, [MAIN, LAST], sequence_tokens=16))
    skipping = TrainingData(staged(folder, [MAIN, LAST], sequence_tokens=16, skip_ranges=[(10, 20), (48, 52)]))
    batch = skipping.batch(range(36, 40))
    assert batch.sample_ids.tolist() == [46, 47, 52, 53]
    assert torch.equal(batch.tokens, plain.batch([46, 47, 52, 53]).tokens)
    assert skipping.fingerprint == plain.fingerprint
    assert [sum(entry.taken) for entry in skipping.summary(40)] == np.bincount(
        skipping.batch(range(40)).sources, minlength=3
    ).tolist()


def test_fingerprints_of_stages(folder: Path) -> None:
    """Of what decides a sample; so a single stage is no other data than the same weights without stages."""
    weights = [
        {**source, "weight": weight} for source, weight in zip(blocks(folder)["sources"], (3, 1, 2), strict=True)
    ]
    whole = {"name": "all", "from_tokens": 0, "weights": {"main": 3, "second": 1, "third": 2}}
    assert (
        TrainingData(config_of(folder, sources=weights)).fingerprint
        == TrainingData(staged(folder, [whole])).fingerprint
    )
    later, heavier = {**LAST, "from_tokens": 1600}, {**LAST, "weights": {"third": 2, "main": 1}}
    lists = [
        [whole],
        [MAIN, LAST],
        [MAIN, later],
        [MAIN, heavier],
        [{**MAIN, "weights": {"main": 1, "second": 1}}, LAST],
    ]
    assert len({TrainingData(staged(folder, stages)).fingerprint for stages in lists}) == len(lists)
    named, unnamed = ([{**MAIN, "name": name}, LAST] for name in ("one", "other"))
    assert TrainingData(staged(folder, named)).fingerprint == TrainingData(staged(folder, unnamed)).fingerprint


def test_summary_tells_epochs_by_stage(folder: Path) -> None:
    data = TrainingData(staged(folder, [MAIN, LAST], sequence_tokens=16))
    entries = {entry.name: entry for entry in data.summary(50 + 1000)}
    assert entries["third"].taken == [0, 500] and entries["second"].taken[1] == 0
    assert entries["main"].taken[1] == 500 and sum(sum(entry.taken) for entry in entries.values()) == 1050
    assert list(entries["third"].taken) == [0, 500]
    assert entries["third"].epochs == 500 / entries["third"].windows
    assert entries["third"].share == pytest.approx(500 / 1050)


def part(name: str = "later", **fields: Any) -> dict[str, Any]:
    return {"name": name, "weights": {"main": 1, "second": 1, "third": 1}} | fields


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        ([part(from_tokens=64)], "the first stage, 'later', begins at token 64, which leaves a gap before it; set its"),
        ([part(from_share=0.1)], "the first stage, 'later', begins at 0.1 of the run, which leaves a gap before it"),
        (
            [part("one", from_tokens=0), part("two", from_tokens=640), part(from_tokens=320)],
            r"'two' begins at token 640 and 'later', the next one, at token 320, so they overlap; let each begin at "
            r"least one window \(16 tokens",
        ),
        (
            [part("one", from_tokens=0), part("two", from_tokens=641), part(from_tokens=656)],
            "'two' begins at token 641 and 'later', the next one, at token 656, so they overlap",
        ),
        (
            [part("one", from_tokens=0), part("two", from_share=0.5), part(from_share=0.5)],
            "'two' begins at 0.5 of the run and 'later', the next one, at 0.5 of the run, so they overlap",
        ),
        ([part(from_tokens=0, from_share=0)], "'later' must give exactly one of from_tokens and from_share"),
        ([part()], "'later' must give exactly one of from_tokens and from_share"),
        ([part(from_tokens=0), part(from_tokens=640)], "the names later are used more than once"),
        ([part(from_tokens=0, weights={"mian": 1})], "has a weight for 'mian', which is not in data.sources; did you"),
        ([part(from_tokens=0, weights={"main": 1})], "no stage has a weight for second, third of data.sources; give"),
        ([part(from_tokens=0, weights={})], "at least 1 item"),
        ([part(from_tokens=0, weights={"main": 0})], "greater than 0"),
        ([part(from_tokens=0, weights={"main": True, "second": 1, "third": 1})], "must be a number, got"),
        ([part(from_tokens=0), part("x", from_share=1.0)], "less than 1"),
    ],
)  # fmt: skip
def test_stages_that_do_not_fit(tmp_path: Path, stages: list[dict[str, Any]], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        staged(tmp_path, stages, sequence_tokens=16)


def test_a_weight_too_small_names_its_stage(folder: Path) -> None:
    tiny = part("last", from_tokens=640, weights={"main": 1, "third": 1e-9})
    with pytest.raises(ValueError, match=r"data\.stages: 'last': weight 1e-09 is less than a millionth of the sum"):
        TrainingData(staged(folder, [MAIN, tiny], sequence_tokens=16))


def test_a_share_needs_a_run(folder: Path) -> None:
    config = staged(folder, [MAIN, {"name": "last", "from_share": 0.9, "weights": {"third": 1}}], sequence_tokens=16)
    with pytest.raises(
        ValueError, match=r"'last' begins at 0\.9 of the run, but this command knows no run, and so no leng"
    ):
        TrainingData(config)
    resolved = config.in_tokens(run_samples=1000)
    assert resolved.stages[1] == MixtureStage(name="last", from_tokens=900 * 16, weights={"third": 1})
    assert [stage.first for stage in resolved.mixture()] == [0, 900]
    assert resolved.in_tokens(run_samples=9) == resolved  # a longer or shorter run moves no border
    with pytest.raises(ValueError, match="'main' begins at token 0 and 'last', the next one, at token 0, so they over"):
        config.in_tokens(run_samples=0)


def test_a_share_beside_a_token_is_compared_once_the_run_is_known(folder: Path) -> None:
    middle = part("middle", from_share=0.5)
    config = staged(folder, [MAIN, middle, part(from_tokens=16 * 100)], sequence_tokens=16)
    assert [stage.first for stage in config.in_tokens(run_samples=150).mixture()] == [0, 75, 100]
    with pytest.raises(ValueError, match="'middle' begins at token 1,600 and 'later', the next one, at token 1,600"):
        config.in_tokens(run_samples=200)
