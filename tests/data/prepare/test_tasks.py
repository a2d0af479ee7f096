"""Sources of several parts, prepared by any number of tasks: nobody sees who prepared what."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
import zstandard

from data.config import DataConfig, SourceConfig
from data.files import only_holder
from data.prepare.__main__ import main
from data.prepare.join import join, missing
from data.prepare.parts import cut
from data.prepare.run import prepare, verify
from data.prepare.tasks import Task
from data.shards import Manifest, read_model
from data.sources import Source
from data.store import TokenStore
from data.tokenizer import train_tokenizer
from settings.project import ROOT
from tests.data.helpers import Renames, config_of, contents, documents, write_jsonl

PART_BYTES = 2500


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Nine files and a Parquet file of two sources, a validation set, a tokenizer; nothing prepared."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(9):
        text = write_jsonl(folder / "raw", documents(20, seed=number)).read_bytes()
        (folder / f"part{number}.jsonl.zst").write_bytes(zstandard.compress(text))
    write_jsonl(folder / "empty.jsonl", ["", ""])
    table = pyarrow.table({"text": documents(120, seed=9)})
    pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=20)
    write_jsonl(folder / "held.jsonl", documents(10, seed=11))
    config = config_of(
        folder,
        sources=[
            {"name": "main", "files": [str(folder / "*.zst"), str(folder / "empty.jsonl")]},
            {"name": "rows", "files": [str(folder / "rows.parquet")]},
        ],
        validation=[{"name": "held", "files": [str(folder / "held.jsonl")]}],
        shard_tokens=1500,
        part_bytes=PART_BYTES,
    )
    train_tokenizer(config)
    return config


@pytest.fixture
def fresh(corpus: DataConfig, tmp_path: Path) -> DataConfig:
    """The same with a folder of its own, the tokenizer in it."""
    shutil.copytree(corpus.dir, tmp_path / "data")
    return corpus.model_copy(update={"dir": str(tmp_path / "data")})


@pytest.fixture(scope="module")
def expected(corpus: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file that one task of one process leaves."""
    folder = tmp_path_factory.mktemp("expected") / "data"
    shutil.copytree(corpus.dir, folder)
    config = corpus.model_copy(update={"dir": str(folder)})
    prepare(config, workers=1)
    assert len(list((folder / "train/main").glob("part-*"))) > 3
    assert len(list((folder / "train/rows").glob("part-*"))) > 3
    assert not list((folder / "validation/held").glob("part-*"))
    assert {path.name for path in folder.rglob("*.json")} == {"manifest.json", "tokenizer.manifest.json"}
    return contents(folder)


@pytest.mark.parametrize(("tasks", "workers"), [(1, 2), (2, 1), (7, 1)])
def test_the_same_bytes_for_any_number_of_tasks(
    fresh: DataConfig, expected: dict[str, bytes], tasks: int, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    order = random.Random(tasks).sample(range(tasks), tasks)
    for done, number in enumerate(order, start=1):
        made = prepare(fresh, workers, Task(number, tasks, "a test"))
        assert (len(made) == 3) == (done == tasks), "the last one joins"
    said = capsys.readouterr().out
    assert ("not prepared yet" in said) == (tasks > 1) and (f"of {tasks} by a test" in said) == (tasks > 1)
    assert contents(Path(fresh.dir)) == expected
    verify(fresh)


def test_a_source_of_parts_reads_as_one_of_a_single_part(fresh: DataConfig, expected: dict[str, bytes]) -> None:
    """Shards end elsewhere, but tokens and document ends are the same."""
    whole = fresh.model_copy(update={"part_bytes": 10**9})
    prepare(whole, workers=1)
    singles = {}
    for name in ("main", "rows"):
        store = TokenStore(Path(fresh.dir) / "train" / name)
        windows = [store.window(number, 50) for number in range(store.windows(50))]
        singles[name] = (store.manifest, windows)
        shutil.rmtree(store.folder)
    prepare(fresh, workers=1)
    for name, (manifest, windows) in singles.items():
        parted = TokenStore(Path(fresh.dir) / "train" / name)
        assert parted.manifest.shards[-1].name.startswith("part-0000")
        changed = {"shards", "made_from"}
        assert parted.manifest.model_dump(exclude=changed) == manifest.model_dump(exclude=changed)
        assert parted.manifest.empty_documents == (2 if name == "main" else 0)
        for number, (tokens, ends) in enumerate(windows):
            np.testing.assert_array_equal(parted.window(number, 50)[0], tokens)
            np.testing.assert_array_equal(parted.window(number, 50)[1], ends)
    assert contents(Path(fresh.dir)) == expected


def test_tasks_killed_at_random_and_started_again_give_the_same_bytes(
    fresh: DataConfig, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Two tasks at once, one of them of several processes, until both have ended well."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"data": fresh.model_dump(mode="json")}))
    rng, kills, left, folder = random.Random(os.urandom(8)), 0, {"0/2": "1", "1/2": "2"}, Path(fresh.dir)
    while left:
        command = [sys.executable, "-m", "data.prepare", str(tmp_path / "run.yaml"), "--part"]
        started = {part: subprocess.Popen([*command, part, "--workers", left[part]], cwd=ROOT) for part in left}
        enough = len(contents(folder)) + rng.randint(10, 40)
        while any(process.poll() is None for process in started.values()) and len(list(folder.rglob("*"))) < enough:
            time.sleep(0.001)
        for process in started.values():
            process.kill()
            kills += process.wait() == -signal.SIGKILL
        assert all(process.returncode in (0, -signal.SIGKILL) for process in started.values())
        left = {part: left[part] for part, process in started.items() if process.returncode}
    assert kills >= 2
    assert contents(folder) == expected


@pytest.mark.parametrize("stop_after", [0, 1, 2, 3, 5, 8, 20, 40, 60, 90, 120])
def test_stopped_at_any_rename(
    fresh: DataConfig, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", Renames(stop_after))
        with pytest.raises(KeyboardInterrupt):
            prepare(fresh, workers=1)
    prepare(fresh, workers=1)
    assert contents(Path(fresh.dir)) == expected


def test_two_that_finish_together_both_join(
    fresh: DataConfig, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(fresh, workers=1)
    folder = Path(fresh.dir) / "train" / "main"
    common = {key: read_model(folder / "manifest.json", Manifest).made_from[key] for key in COMMON}
    (folder / "manifest.json").unlink()
    parts = cut(Source(fresh.sources[0]), folder, fresh.part_bytes, common)
    assert missing(parts) == []
    together, rename = threading.Barrier(2), os.replace

    def replace(old: str, new: Path) -> None:
        together.wait(10)  # both have written; the later one finds its file gone, or renames it over the other's
        rename(old, new)

    monkeypatch.setattr("os.replace", replace)
    names = iter(("one", "two"))
    monkeypatch.setattr("socket.gethostname", lambda: next(names))
    made: list[Manifest] = []
    threads = [threading.Thread(target=lambda: made.append(join(parts))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made[0] == made[1] and contents(Path(fresh.dir)) == expected


COMMON = ("format_version", "tokenizer_sha256", "vocabulary", "settings", "formats")


def test_two_tasks_with_one_part_are_refused(fresh: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.files._GRACE_S", 0.2)
    folder = Path(fresh.dir) / "train" / "main" / "part-00001"
    folder.mkdir(parents=True)
    with (
        only_holder(folder / "lock", "-"),
        pytest.raises(
            ValueError,
            match=rf"part-00001 is being prepared by another command \(process {os.getpid()} on .*\); "
            r"wait until it ends, or give each task parts of its own: --part I/N",
        ),
    ):
        prepare(fresh, workers=1)
    assert not (folder / "lock").exists()
    prepare(fresh, workers=1)


def test_a_holder_that_has_just_ended_is_waited_for(tmp_path: Path) -> None:
    holder, ended = only_holder(tmp_path / "lock", "-"), list[bool]()
    holder.__enter__()

    def end() -> None:
        ended.append(True)
        holder.__exit__(None, None, None)

    threading.Timer(0.3, end).start()
    with only_holder(tmp_path / "lock", "held"):
        assert ended and f"process {os.getpid()}" in (tmp_path / "lock").read_text()
    assert not (tmp_path / "lock").exists()


@pytest.fixture
def changing(tmp_path: Path) -> Iterator[tuple[DataConfig, Path]]:
    """Three files, a part each, of which the tasks 0 and 1 of 3 have prepared theirs; and the file of task 0."""
    for number in range(3):
        write_jsonl(tmp_path / f"{number}.jsonl", documents(20, seed=number))
    config = config_of(tmp_path, sources=[{"name": "main", "files": [str(tmp_path / "?.jsonl")]}], part_bytes=1)
    train_tokenizer(config)
    for number in (0, 1):
        prepare(config, 1, Task(number, 3, "a test"))
    done = next(path.parent for path in Path(config.dir).rglob("part-*/manifest.json"))
    yield config, tmp_path / f"{int(done.name[-1])}.jsonl"


@pytest.mark.parametrize("deduplicate", ["none", "exact"])
@pytest.mark.parametrize("part_bytes", [1, 10**9], ids=["parts", "one part"])
def test_what_an_error_tells_to_change_may_be_changed(tmp_path: Path, deduplicate: str, part_bytes: int) -> None:
    for number in range(3):
        write_jsonl(tmp_path / f"{number}.jsonl", documents(20, seed=number))
    source = {"name": "main", "files": [str(tmp_path / "?.jsonl")]}
    changes = {"sources": [source], "part_bytes": part_bytes, "deduplicate": deduplicate}
    config = config_of(tmp_path, **changes)
    train_tokenizer(config)
    wrong = config_of(tmp_path, **changes | {"sources": [{**source, "text_field": "body"}]})
    with pytest.raises(ValueError, match=r"line 1 has no field 'body' \(found: text\); name the one with the text"):
        prepare(wrong, 1)
    assert len(prepare(config, 1)) == 1
    with pytest.raises(ValueError, match="train/main was prepared from something else"):
        prepare(wrong, 1)


@pytest.mark.parametrize("deduplicate", ["none", "exact"])
def test_a_broken_file_may_be_corrected(tmp_path: Path, deduplicate: str) -> None:
    """Its size changes; the parts that are finished are of others, and stay."""
    for number in range(3):
        write_jsonl(tmp_path / f"{number}.jsonl", documents(20 + number, seed=number))
    source = {"name": "main", "files": [str(tmp_path / "?.jsonl")]}
    config = config_of(tmp_path, sources=[source], part_bytes=1, deduplicate=deduplicate)
    train_tokenizer(config)
    whole = (tmp_path / "0.jsonl").read_bytes()  # the smallest, so the last one in turn
    (tmp_path / "0.jsonl").write_bytes(whole + b'{"text": "cut of')
    with pytest.raises(ValueError, match=r"0\.jsonl: line 21 is not JSON"):
        prepare(config, 1)
    folder = Path(config.dir) / "train/main"
    done = {path: path.stat().st_mtime_ns for path in folder.glob("part-*/manifest.json")}
    assert len(done) == (2 if deduplicate == "none" else 0)
    (tmp_path / "0.jsonl").write_bytes(whole)
    assert len(prepare(config, 1)) == 1
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in done.items())


def test_a_part_whose_files_changed_is_refused_by_every_task(changing: tuple[DataConfig, Path]) -> None:
    config, file = changing
    content = file.read_bytes()
    file.write_bytes(content + b'{"text": "more"}\n')
    for number in range(3):  # by its size, before any file is opened
        with pytest.raises(
            ValueError, match=rf"train/main was prepared from something else.*1 source file .*{file.name}"
        ):
            prepare(config, 1, Task(number, 3, "a test"))
    file.write_bytes(content.replace(b"quick", b"QUICK"))  # of the same size: whoever joins notices at the latest
    with pytest.raises(
        ValueError, match=rf"main/part-0000. was prepared from something else.*1 source file .*{file.name}"
    ):
        for number in range(3):
            prepare(config, 1, Task(number, 3, "a test"))
    assert not (Path(config.dir) / "train/main/manifest.json").exists()
    file.write_bytes(content)
    assert len(prepare(config, 1)) == 1


def test_what_parts_do_not_agree_on_is_refused_before_any_work(changing: tuple[DataConfig, Path]) -> None:
    config, file = changing
    before = contents(Path(config.dir))
    for changes, sentence in (
        ({"shard_tokens": 5000}, r"settings \(.*1000.* -> .*5000"),
        ({"part_bytes": 10**6}, r"parts \(3 -> None\)"),
    ):
        with pytest.raises(ValueError, match=rf"train/main was prepared from something else.*{sentence}"):
            prepare(config.model_copy(update=changes), 1, Task(2, 3, "a test"))
    file.with_name("4.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"parts \(3 -> 4\)"):
        prepare(config, 1, Task(2, 3, "a test"))
    assert contents(Path(config.dir)) == before


def test_a_complete_source_is_not_taken_for_one_of_another_cut(fresh: DataConfig) -> None:
    prepare(fresh, workers=1)
    with pytest.raises(ValueError, match=r"train/main was prepared from something else.*parts \(5 -> None\)"):
        prepare(fresh.model_copy(update={"part_bytes": 10**9}), workers=1)


def test_a_source_without_text_is_refused_when_its_parts_are_joined(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "raw.jsonl", documents(100))
    config = config_of(tmp_path)
    train_tokenizer(config)
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.json", ["", ""])
    sources = [SourceConfig(name="main", files=[str(tmp_path / "?.json")])]
    with pytest.raises(ValueError, match="train/main: no part has a document with text"):
        prepare(config.model_copy(update={"sources": sources, "part_bytes": 1}), 1)


def test_a_mistake_in_one_part_ends_all_with_one_sentence(
    fresh: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": \n')
    files = [*fresh.sources[0].files, str(tmp_path / "bad.jsonl")]
    broken = fresh.model_copy(update={"sources": [SourceConfig(name="main", files=files)]})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"data": broken.model_dump(mode="json")}))
    monkeypatch.setattr("sys.argv", ["data.prepare", str(tmp_path / "run.yaml"), "--workers", "2"])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capfd.readouterr().err
    assert stopped.value.code == 1 and said.count("\n") == 1
    assert said.startswith("error: source 'main': cannot read") and "bad.jsonl: line 1 is not JSON" in said


def _killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_of_a_part_is_told_in_a_sentence(fresh: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.prepare.processes._do", _killed)  # pickled by name
    with pytest.raises(ValueError, match="a process that prepares a part was killed, probably for memory"):
        prepare(fresh, workers=2)


def test_made_from_says_which_part_it_is(fresh: DataConfig) -> None:
    prepare(fresh, workers=1)
    manifest = json.loads((Path(fresh.dir) / "train/rows/part-00001/manifest.json").read_text())
    assert manifest["made_from"]["part"]["number"] == 1 and manifest["made_from"]["part"]["start"][0] == 0
    assert [file["name"] for file in manifest["made_from"]["files"]] == ["rows.parquet"]
