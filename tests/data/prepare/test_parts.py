"""How a source is cut into parts, and how tasks and processes share them."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data.config import SourceConfig
from data.files import write_json
from data.hub import _builder
from data.prepare.join import outline
from data.prepare.parts import Part, cut, share
from data.prepare.processes import processes_for
from data.prepare.run import parts_of, prepare, tokenizer_of
from data.prepare.tasks import ONLY_TASK, Task, task_of
from data.sources import Cursor, Source
from data.tokenizer import train_tokenizer
from tests.data.helpers import config_of, documents, write_jsonl


def cut_source(folder: Path, part_bytes: int, **options: object) -> list[Part]:
    return cut(Source(SourceConfig.model_validate({"name": "s", **options})), folder, part_bytes, {})


def texts_of(part: Part) -> list[str]:
    return [document.text.decode() for document in part.source.documents(part.start, part.end)]


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
        (parts,) = parts_of(config, tokenizer_of(config))
        assert parts[0].source.outline()["hub"]["revision"] == read
    parts[0].source_folder.mkdir(parents=True)
    write_json(parts[0].source_folder / "progress.json", outline(parts[0]))
    (parts,) = parts_of(config, tokenizer_of(config))
    assert len(parts) == 2 and parts[1].made_from()["hub"]["revision"] == "second"


def test_a_complete_hub_dataset_stays_as_it_is_after_another_commit_and_without_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = _builder
    monkeypatch.setattr("data.hub._builder", lambda *_: read(str(tmp_path / "set"), None, None))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_: SimpleNamespace(sha="first"))
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", documents(50))
    write_jsonl(tmp_path / "raw.jsonl", documents(100))
    config = config_of(tmp_path)
    train_tokenizer(config)
    hub = config.model_copy(update={"sources": [SourceConfig(name="hub", hub="nobody/nothing")]})
    prepare(hub, 1)
    both = config.model_copy(update={"sources": [*hub.sources, *config.sources]})
    for now in (SimpleNamespace(sha="second"), None):  # None: asked for its commit it fails
        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, now=now: now)
        assert [name for name, _ in prepare(both, 1)] == ["train/hub", "train/main"]


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


def test_the_share_is_said_by_an_option_or_by_slurm() -> None:
    array = {
        f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in (("COUNT", 3), ("MIN", 1), ("MAX", 5), ("STEP", 2))
    }
    step = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}
    assert task_of(None, {}) == ONLY_TASK
    assert task_of("2/7", {}) == Task(2, 7, "--part") == task_of("2/7", step)
    assert task_of(None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == ONLY_TASK, "a batch script without srun"
    assert task_of(None, step) == Task(1, 4, "SLURM's step")
    assert task_of(None, array | {"SLURM_ARRAY_TASK_ID": "3"}) == Task(1, 3, "SLURM's job array")
    assert task_of(None, array | step | {"SLURM_ARRAY_TASK_ID": "5"}) == Task(9, 12, "SLURM's job array and step")
    with pytest.raises(ValueError, match=r"the job array has 3 tasks with gaps between 1 and 9"):
        task_of(None, array | {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MAX": "9"})
    for wrong in ("1", "2/2", "-1/2", "a/b", "1/0"):
        with pytest.raises(ValueError, match=rf"--part {wrong} must be I/N"):
            task_of(wrong, {})
