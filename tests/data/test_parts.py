"""Sources of several parts: how they are cut and shared, and that nobody sees who prepared what."""

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
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
import zstandard

from data.config import DataConfig, SourceConfig
from data.files import only_holder, write_json
from data.join import join, missing, outline
from data.part_processes import processes_for
from data.parts import Part, cut, share
from data.prepare import main, parts_of, prepare, verify
from data.shards import Manifest, read_model
from data.sources import Cursor, Source
from data.store import TokenStore
from data.tasks import ALONE, Task, task_of
from data.tokenizer import train_tokenizer
from settings.project import ROOT
from tests.data.helpers import config_of, contents, documents, write_jsonl

PART_BYTES = 2500


def cut_source(folder: Path, part_bytes: int, **options: object) -> list[Part]:
    return cut(Source(SourceConfig.model_validate({"name": "s", **options})), folder, part_bytes, {})


def texts_of(part: Part) -> list[str]:
    return [document.text.decode() for document in part.source.documents(part.start, part.end)]


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


def test_files_are_cut_between_files(tmp_path: Path) -> None:
    for number, size in enumerate((400, 300, 300, 2000, 10, 10)):
        (tmp_path / f"{number}.txt").write_text(str(number) * size)
    parts = cut_source(tmp_path, 1000, files=[str(tmp_path / "*.txt")])
    assert [(part.start, part.end, part.bytes) for part in parts] == [
        ((0, 0), (3, 0), 1000),
        ((3, 0), (4, 0), 2000),
        ((4, 0), (6, 0), 20),
    ]
    assert [[text[0] for text in texts_of(part)] for part in parts] == [["0", "1", "2"], ["3"], ["4", "5"]]
    assert [part.folder.name for part in parts] == ["part-00000", "part-00001", "part-00002"]
    (whole,) = cut_source(tmp_path, 10_000, files=[str(tmp_path / "*.txt")])
    assert whole.folder == tmp_path and len(texts_of(whole)) == 6


def test_parquet_is_cut_between_row_groups(tmp_path: Path) -> None:
    values = [str(number) for number in range(100)]
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet", row_group_size=7)
    (tmp_path / "b.txt").write_text("end")
    options = {"files": [str(tmp_path / "*")]}
    one = cut_source(tmp_path, 1, **options)
    assert [part.start for part in one] == [*(Cursor(0, row) for row in range(0, 100, 7)), Cursor(1, 0)]
    assert [text for part in one for text in texts_of(part)] == [*values, "end"]
    several = cut_source(tmp_path, 2 * one[0].bytes + 1, **options)
    assert len(several) < len(one) and [text for part in several for text in texts_of(part)] == [*values, "end"]
    middle = list(one[0].source.documents(Cursor(0, 40), Cursor(0, 50)))
    assert [document.text.decode() for document in middle] == values[40:50]
    assert middle[-1].after == Cursor(0, 50)


def test_compressed_parquet_and_one_without_rows_are_one_part(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "raw", row_group_size=1)
    (tmp_path / "a.parquet.zst").write_bytes(zstandard.compress((tmp_path / "raw").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "b.parquet")
    parts = cut_source(tmp_path, 1, files=[str(tmp_path / "*parquet*")])
    assert [texts_of(part) for part in parts] == [["a", "b"], []]


def test_a_hub_dataset_is_cut_between_its_files(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for number in range(3):
        write_jsonl(tmp_path / "set" / f"train-{number}.jsonl", [f"f{number} d{index}" for index in range(70)])
    everything = [f"f{number} d{index}" for number in range(3) for index in range(70)]
    parts = cut_source(tmp_path, 1, hub=str(tmp_path / "set"))
    assert [len(texts_of(part)) for part in parts] == [70, 70, 70]
    assert [text for part in parts for text in texts_of(part)] == everything
    after = parts[1].source.documents(Cursor(1, 65), parts[1].end)
    assert [document.text.decode() for document in after] == everything[135:140]
    (whole,) = cut_source(tmp_path, 10**6, hub=str(tmp_path / "set"))
    assert texts_of(whole) == everything


def test_a_hub_dataset_that_moves_on_is_read_at_the_commit_it_was_begun_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks of an array start at different times."""
    commits = iter(["first", "second", "third"])
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_: SimpleNamespace(sha=next(commits)))
    monkeypatch.setattr("data.hub.HubDataset.file_sizes", lambda _: [10, 10])
    write_jsonl(tmp_path / "raw.jsonl", documents(100))
    config = config_of(tmp_path)
    train_tokenizer(config)
    source = SourceConfig(name="main", hub="nobody/nothing")
    config = config.model_copy(update={"sources": [source], "part_bytes": 10})
    for read in ("first", "second"):  # nothing has begun yet
        (parts,) = parts_of(config)
        assert parts[0].source.outline()["hub"]["revision"] == read
    parts[0].source_folder.mkdir(parents=True)
    write_json(parts[0].source_folder / "progress.json", outline(parts[0]))
    (parts,) = parts_of(config)
    assert len(parts) == 2 and parts[1].made_from()["hub"]["revision"] == "second"


@pytest.mark.parametrize(
    ("sizes", "workers", "processes"),
    [
        ([100, 1, 1], 8, [8]),  # nearly all is in one: the others wait
        ([10, 10, 10], 8, [3, 2, 3]),
        ([10, 10], 8, [4, 4]),
        ([10] * 9, 4, [1, 1, 1, 1]),
        ([0, 0], 2, [1, 1]),
    ],
)
def test_the_fewer_parts_the_more_processes_a_part(
    tmp_path: Path, sizes: list[int], workers: int, processes: list[int]
) -> None:
    (tmp_path / "a.txt").write_text("x")
    (part,) = cut_source(tmp_path, 10, files=[str(tmp_path / "a.txt")])
    waiting, free, given = [replace(part, bytes=size) for size in sizes], workers, []
    while waiting and free:
        given.append(processes_for(waiting, free))
        free -= given[-1]
        waiting.pop(0)
    assert given == processes


@pytest.mark.parametrize("tasks", [1, 2, 3, 7, 50])
def test_every_part_is_of_one_task_and_tasks_have_about_the_same(tmp_path: Path, tasks: int) -> None:
    (tmp_path / "a.txt").write_text("x")
    (part,) = cut_source(tmp_path, 10, files=[str(tmp_path / "a.txt")])
    rng = random.Random(tasks)
    parts = [Part(part.source, tmp_path, n, 40, part.start, part.end, rng.randint(0, 100), {}) for n in range(40)]
    shares = [share(parts, task, tasks) for task in range(tasks)]
    assert sorted(part.number for mine in shares for part in mine) == list(range(40))
    loads = [sum(part.bytes for part in mine) for mine in shares]
    assert max(loads) - min(loads) <= 101


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
        enough = len(contents(folder)) + rng.randint(30, 90)
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
    renames, rename = 0, os.replace

    def stop(old: Path, new: Path) -> None:
        nonlocal renames
        if renames == stop_after:
            raise KeyboardInterrupt
        renames += 1
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", stop)
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


COMMON = ("format_version", "tokenizer_sha256", "settings")


def test_two_tasks_with_one_part_are_refused(fresh: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.files._GRACE_S", 0.2)
    folder = Path(fresh.dir) / "train" / "main" / "part-00001"
    folder.mkdir(parents=True)
    with (
        only_holder(folder / "lock", "-"),
        pytest.raises(
            ValueError,
            match=rf"part-00001 is being prepared by another command \(process {os.getpid()} on .*\); "
            r"wait for its end, or give each task parts of its own: --part I/N",
        ),
    ):
        prepare(fresh, workers=1)
    assert not (folder / "lock").exists()
    prepare(fresh, workers=1)


def test_a_holder_that_has_just_ended_is_waited_for(tmp_path: Path) -> None:
    holder = only_holder(tmp_path / "lock", "-")
    holder.__enter__()
    ends = threading.Timer(0.3, lambda: holder.__exit__(None, None, None))
    ends.start()
    with only_holder(tmp_path / "lock", "held"):
        assert not ends.is_alive() or ends.finished.is_set()
        assert f"process {os.getpid()}" in (tmp_path / "lock").read_text()
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


def test_a_part_whose_files_changed_is_refused_by_every_task(changing: tuple[DataConfig, Path]) -> None:
    config, file = changing
    content = file.read_bytes()
    file.write_bytes(content + b'{"text": "more"}\n')
    for number in range(3):  # by its size, before any file is opened
        with pytest.raises(
            ValueError, match=rf"train/main was prepared from something else.*1 source files.*{file.name}"
        ):
            prepare(config, 1, Task(number, 3, "a test"))
    file.write_bytes(content.replace(b"quick", b"QUICK"))  # of the same size: whoever joins notices at the latest
    with pytest.raises(
        ValueError, match=rf"main/part-0000. was prepared from something else.*1 source files.*{file.name}"
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
    monkeypatch.setattr("data.part_processes._do", _killed)  # pickled by name
    with pytest.raises(ValueError, match="a process that prepares a part was killed, probably for memory"):
        prepare(fresh, workers=2)


def test_the_share_is_said_by_an_option_or_by_slurm() -> None:
    array = {
        f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in (("COUNT", 3), ("MIN", 1), ("MAX", 5), ("STEP", 2))
    }
    step = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}
    assert task_of(None, {}) == ALONE
    assert task_of("2/7", {}) == Task(2, 7, "--part") == task_of("2/7", step)
    assert task_of(None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == ALONE, "a batch script without srun"
    assert task_of(None, step) == Task(1, 4, "SLURM's step")
    assert task_of(None, array | {"SLURM_ARRAY_TASK_ID": "3"}) == Task(1, 3, "SLURM's job array")
    assert task_of(None, array | step | {"SLURM_ARRAY_TASK_ID": "5"}) == Task(9, 12, "SLURM's job array and step")
    with pytest.raises(ValueError, match=r"the job array has 3 tasks with gaps between 1 and 9"):
        task_of(None, array | {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MAX": "9"})
    for wrong in ("1", "2/2", "-1/2", "a/b", "1/0"):
        with pytest.raises(ValueError, match=rf"--part {wrong} must be I/N"):
            task_of(wrong, {})


def test_made_from_says_which_part_it_is(fresh: DataConfig) -> None:
    prepare(fresh, workers=1)
    manifest = json.loads((Path(fresh.dir) / "train/rows/part-00001/manifest.json").read_text())
    assert manifest["made_from"]["part"]["number"] == 1 and manifest["made_from"]["part"]["start"][0] == 0
    assert [file["name"] for file in manifest["made_from"]["files"]] == ["rows.parquet"]
