"""Exact duplicates: the first of the source stays, whoever finds out, and however often they are killed."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from data.config import DataConfig
from data.files import holding
from data.prepare.__main__ import main
from data.prepare.duplicates import places_between
from data.prepare.parts import Part
from data.prepare.run import prepare
from data.prepare.tasks import Task
from data.sentencepiece_file import load_tokenizer
from data.shards import UNSAID_AT_FIRST, Manifest, read_model
from data.sources import Cursor
from data.tokenizer import train_tokenizer
from tests.data.helpers import Renames, config_of, contents, documents, write_jsonl


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, list[str]]:
    """Seven files, a part each, with duplicates within and between them; and the texts in order."""
    folder = tmp_path_factory.mktemp("corpus")
    rng, pool = random.Random(0), documents(60)
    files = [[rng.choice(pool) for _ in range(20)] for _ in range(6)]
    files += [[files[0][0], "", files[3][2]]]  # nothing of the last one is left
    for number, texts in enumerate(files):
        write_jsonl(folder / f"{number}.jsonl", texts)
    sources = [{"name": "main", "files": [str(folder / "?.jsonl")]}]
    config = config_of(folder, sources=sources, deduplicate="exact", shard_tokens=1000, part_bytes=1)
    train_tokenizer(config)
    return config, [text for texts in files for text in texts]


@pytest.fixture
def fresh(corpus: tuple[DataConfig, list[str]], tmp_path: Path) -> DataConfig:
    shutil.copytree(corpus[0].dir, tmp_path / "data")
    return corpus[0].model_copy(update={"dir": str(tmp_path / "data")})


@pytest.fixture(scope="module")
def expected(corpus: tuple[DataConfig, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file that one task of one process leaves."""
    folder = tmp_path_factory.mktemp("expected") / "data"
    shutil.copytree(corpus[0].dir, folder)
    prepare(corpus[0].model_copy(update={"dir": str(folder)}), workers=1)
    return contents(folder)


def texts_of(config: DataConfig) -> list[str]:
    """The documents of a prepared source."""
    folder, tokenizer, texts = Path(config.dir) / "train/main", load_tokenizer(config.dir), list[str]()
    for shard in read_model(folder / "manifest.json", Manifest).shards:
        tokens = np.fromfile(folder / f"{shard.name}.bin", "<u2")
        ends = np.fromfile(folder / f"{shard.name}.ends", "<u8").tolist()
        starts = [0, *ends[:-1]]
        texts += [tokenizer.decode(tokens[a : b - 1].tolist()) for a, b in zip(starts, ends, strict=True)]
    return texts


@pytest.mark.parametrize("part_bytes", [1, 10**9], ids=["parts", "one part"])
def test_the_first_of_every_text_stays(
    fresh: DataConfig, corpus: tuple[DataConfig, list[str]], part_bytes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(fresh.model_copy(update={"part_bytes": part_bytes}), workers=1)
    texts = [text for text in corpus[1] if text]
    kept = list(dict.fromkeys(texts))
    assert texts_of(fresh) == kept
    manifest = read_model(Path(fresh.dir) / "train/main/manifest.json", Manifest)
    assert manifest.duplicate_documents == len(texts) - len(kept) > 50
    assert (manifest.documents, manifest.empty_documents) == (len(kept), 1)
    assert manifest.made_from["settings"]["deduplicate"] == "exact"
    assert not (Path(fresh.dir) / "train/main/duplicates").exists()


def test_nothing_is_left_out_unless_asked_for(fresh: DataConfig, corpus: tuple[DataConfig, list[str]]) -> None:
    prepare(fresh.model_copy(update={"deduplicate": "none"}), workers=1)
    assert texts_of(fresh) == [text for text in corpus[1] if text]
    with pytest.raises(ValueError, match=r"changed since: settings \(.*'deduplicate': 'exact'"):
        prepare(fresh, workers=1)


@pytest.mark.parametrize(("tasks", "workers"), [(1, 2), (2, 1), (7, 1)])
def test_the_same_bytes_for_any_number_of_tasks(
    fresh: DataConfig, expected: dict[str, bytes], tasks: int, workers: int
) -> None:
    for number in random.Random(tasks).sample(range(tasks), tasks):
        prepare(fresh, workers, Task(number, tasks, "a test"))
    assert contents(Path(fresh.dir)) == expected


def test_the_same_bytes_for_tasks_at_the_same_time(fresh: DataConfig, expected: dict[str, bytes]) -> None:
    """Forked, so that they begin together: each waits for the parts that the other is hashing."""
    children = []
    for number in range(2):
        if not (child := os.fork()):
            try:
                prepare(fresh, 1, Task(number, 2, "a test"))
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert contents(Path(fresh.dir)) == expected


@pytest.mark.parametrize("stop_after", [0, 1, 4, 7, 8, 9, 15, 30])
def test_stopped_at_any_rename(
    fresh: DataConfig, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", Renames(stop_after))
        with pytest.raises(KeyboardInterrupt):
            prepare(fresh, 1, Task(0, 2, "a test"))
            prepare(fresh, 1, Task(1, 2, "a test"))
    for number in (1, 0):
        prepare(fresh, 1, Task(number, 2, "a test"))
    assert contents(Path(fresh.dir)) == expected


def test_hashes_are_compared_a_range_at_a_time(
    fresh: DataConfig, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.prepare.duplicates._COMPARED_BYTES", 100)
    prepare(fresh, workers=1)
    assert contents(Path(fresh.dir)) == expected


def test_parts_that_another_task_is_hashing_are_waited_for(
    fresh: DataConfig, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.prepare.duplicates._LOOK_EVERY_S", 0.05)
    folder = Path(fresh.dir) / "train/main/duplicates"
    folder.mkdir(parents=True)
    with holding(folder / "00003.lock") as holder:
        assert holder is None
        task = threading.Thread(target=prepare, args=(fresh, 1))
        task.start()
        task.join(1)
        waited, hashed = task.is_alive(), {path.name[:5] for path in folder.glob("*.hashes")}
    task.join()
    assert waited and hashed == {f"0000{number}" for number in (0, 1, 2, 4, 5, 6)}
    assert contents(Path(fresh.dir)) == expected


def test_a_part_that_changes_after_it_was_compared_is_refused(
    fresh: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same size, so that only its fingerprint tells."""
    for number in range(2):
        write_jsonl(tmp_path / f"{number}.jsonl", [f"some text {number}"] * 3)
    sources = [fresh.sources[0].model_copy(update={"files": [str(tmp_path / "?.jsonl")]})]
    changing = fresh.model_copy(update={"sources": sources})
    for number in (0, 1):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("data.prepare.run.prepare_part", _interrupt)
            prepare(changing, 1)
        write_jsonl(tmp_path / f"{number}.jsonl", [f"SOME text {number}"] * 3)
        with pytest.raises(
            ValueError, match=rf"the files of part {number} of .*train/main changed after their documents"
        ):
            prepare(changing, 1)
        shutil.rmtree(Path(fresh.dir) / "train")
    prepare(changing, 1)
    assert texts_of(fresh) == ["SOME text 0", "SOME text 1"]


@pytest.mark.parametrize("stop_after", [4, 10])
def test_what_an_older_version_left_half_done_is_gone_on_from(
    stop_after: int,
    fresh: DataConfig,
    corpus: tuple[DataConfig, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It did not say what the files are read as, nor which vocabulary, and named its hashes without."""
    whole = Part.made_from
    with monkeypatch.context() as older:
        older.setattr(
            Part, "made_from", lambda part: {k: v for k, v in whole(part).items() if k not in UNSAID_AT_FIRST}
        )
        older.setattr("os.replace", Renames(stop_after))
        with pytest.raises(KeyboardInterrupt):
            prepare(fresh, 1)
    prepare(fresh, 1)
    assert texts_of(fresh) == list(dict.fromkeys(text for text in corpus[1] if text))


def test_hashes_of_two_states_of_a_part_are_refused(fresh: DataConfig) -> None:
    folder = Path(fresh.dir) / "train/main/duplicates"
    folder.mkdir(parents=True)
    for state in ("one", "two"):
        (folder / f"00003-{state}.hashes").touch()
    with pytest.raises(ValueError, match=r"the files of part 3 of .*train/main changed after their documents"):
        prepare(fresh, 1)


def test_the_folder_of_hashes_is_listed_once_a_pass(fresh: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    listed, listing = list[Path](), Path.glob

    def glob(folder: Path, pattern: str) -> Iterator[Path]:
        if folder.name == "duplicates":
            listed.append(folder)
        return listing(folder, pattern)

    monkeypatch.setattr(Path, "glob", glob)
    prepare(fresh, 1)
    assert len(listed) == 3, "before and after the hashing, and to compare; not once for each of seven parts"


def test_places_beyond_what_a_float_holds_are_told_apart() -> None:
    """Of a file's documents from the 8,192nd file on: each is its own part's."""
    file = 9000
    places = np.array([file << 40 | document for document in range(1000, 1008)], "<u8")
    for start in range(1000, 1007):
        first, last = places_between(places, Cursor(file, start), Cursor(file, start + 1))
        assert places[first:last].tolist() == [file << 40 | start + 1]


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_the_command_says_how_many_were_left_out(
    fresh: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"data": fresh.model_dump(mode="json")}))
    monkeypatch.setattr("sys.argv", ["data.prepare", str(tmp_path / "run.yaml"), "--workers", "1"])
    main()
    manifest = read_model(Path(fresh.dir) / "train/main/manifest.json", Manifest)
    expected = f"train/main: left out {manifest.duplicate_documents} documents with the text of an earlier one\n"
    assert expected in capsys.readouterr().out
