"""Preparing shards: the same bytes whatever happens, and refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from data import tokenizer
from data.config import DataConfig
from data.files import only_writer
from data.prepare.__main__ import main
from data.prepare.run import changed_since, files_twice, prepare, verify
from data.sentencepiece_file import load_tokenizer
from data.shards import Manifest, read_model
from data.tokenizer import train_tokenizer
from tests.data.helpers import Renames, config_of, contents, documents, prepared, write_jsonl

ROOT = Path(__file__).parents[3]


def folder_of(config: DataConfig) -> Path:
    return Path(config.dir) / "train" / "main"


def test_shards_hold_the_documents(tmp_path: Path) -> None:
    texts = [*documents(100), "", "  ", *documents(50, seed=1), ""]
    config = prepared(tmp_path, texts, shard_tokens=1000)
    manifest = read_model(folder_of(config) / "manifest.json", Manifest)
    tokenizer = load_tokenizer(config.dir)
    read: list[str] = []
    for shard in manifest.shards:
        tokens = np.fromfile(folder_of(config) / f"{shard.name}.bin", "<u2")
        ends = np.fromfile(folder_of(config) / f"{shard.name}.ends", "<u8").astype(int)
        assert len(tokens) == shard.tokens == ends[-1]
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            assert tokens[end - 1] == manifest.eos_id == 2
            read.append(tokenizer.decode(tokens[start : end - 1].tolist()))
    kept = [text for text in texts if text]
    assert read == kept
    assert len(manifest.shards) > 3 and max(shard.tokens for shard in manifest.shards) <= 1000
    assert manifest.empty_documents == 2 and manifest.documents == len(kept)
    assert manifest.text_bytes == sum(len(text.encode()) for text in kept)
    assert sorted(path.suffix for path in folder_of(config).iterdir() if path.suffix not in (".bin", ".ends")) == [
        ".json"
    ], "only the manifest stays"


def test_a_document_longer_than_a_shard_stays_whole(tmp_path: Path) -> None:
    config = prepared(tmp_path, [*documents(20), "long words here " * 2000, *documents(20, seed=1)])
    manifest = read_model(folder_of(config) / "manifest.json", Manifest)
    assert [shard.documents for shard in manifest.shards if shard.tokens > 1000] == [1]


def test_a_file_that_two_sets_read_is_told(tmp_path: Path) -> None:
    for name in ("raw", "more", "other"):
        write_jsonl(tmp_path / f"{name}.jsonl", documents(2))
    (tmp_path / "link.jsonl").symlink_to("raw.jsonl")
    os.link(tmp_path / "more.jsonl", tmp_path / "same.jsonl")
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("raw", "more", "other", "link", "same")}
    sources = [{"name": "a", "files": [files["raw"], files["more"]]}, {"name": "b", "files": [files["same"]]}]
    fine = [{"name": "a", "files": [files["other"]]}]
    link = [{"name": "a", "files": [files["link"], files["other"]]}]
    assert files_twice(config_of(tmp_path, sources=sources[:1], validation=fine)) == []
    assert files_twice(config_of(tmp_path, sources=sources, validation=link)) == [
        f"train/a and train/b share 1 file, such as {files['same']}",
        f"train/a and validation/a share 1 file, such as {files['link']}; "
        "the validation loss then measures text that was trained on",
    ]


def test_large_vocabulary_takes_four_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.prepare.one_part.token_dtype", lambda _: np.dtype("<u4"))
    config = prepared(tmp_path)
    manifest = read_model(folder_of(config) / "manifest.json", Manifest)
    assert manifest.dtype == "uint32"
    assert manifest.shards[0].files["shard-00000.bin"].bytes == 4 * manifest.shards[0].tokens
    verify(config)


def test_same_bytes_with_any_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.prepare.one_part.BATCH_BYTES", 2000)
    write_jsonl(tmp_path / "raw.jsonl", documents(300))
    config = config_of(tmp_path)
    train_tokenizer(config)
    prepare(config, workers=1)
    alone = contents(Path(config.dir))
    shutil.rmtree(folder_of(config))
    prepare(config, workers=3)
    assert contents(Path(config.dir)) == alone


def test_killed_and_started_again_gives_the_same_bytes(tmp_path: Path) -> None:
    texts = documents(6000, longest=200)
    texts[::7] = [""] * len(texts[::7])  # documents without text are counted the same, too
    write_jsonl(tmp_path / "raw.jsonl", texts)
    config = config_of(tmp_path, shard_tokens=20_000)
    train_tokenizer(config)
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump({"data": config.model_dump(mode="json")}))
    command = [sys.executable, "-m", "data.prepare", str(run), "--workers", "2"]

    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    folder = folder_of(config)
    deadline_s = time.monotonic() + 60
    while len(list(folder.glob("shard-*.json"))) < 3 and started.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.002)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    started.send_signal(signal.SIGKILL)
    started.wait()
    finished = len(list(folder.glob("shard-*.json")))
    assert finished >= 3 and not (folder / "manifest.json").exists(), "the kill came too early or too late"
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.bin")}

    resumed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"going on after {finished} finished shards" in resumed.stdout
    for name in sorted(kept)[:finished]:
        assert (folder / name).stat().st_mtime_ns == kept[name], "a finished shard was written again"
    resumed_bytes = contents(Path(config.dir))
    shutil.rmtree(folder)
    prepare(config, workers=1)
    assert contents(Path(config.dir)) == resumed_bytes
    assert not [pid for pid in children if _alive(int(pid))], "tokenizing processes outlived their parent"


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize("stop_after", range(12))
def test_stopped_at_any_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int) -> None:
    """Each file that gets its name is a point where a kill may fall: what lies there then must be enough."""
    whole = prepared(tmp_path, documents(60))
    expected = contents(Path(whole.dir))
    shutil.rmtree(folder_of(whole))
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", Renames(stop_after))
        try:
            prepare(whole, workers=1)
        except KeyboardInterrupt:
            assert not (folder_of(whole) / "manifest.json").exists()
    prepare(whole, workers=1)
    assert contents(Path(whole.dir)) == expected


def test_complete_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = prepared(tmp_path)
    (folder_of(config) / "shard-00099.bin.tmp").write_bytes(b"left over")
    before = contents(Path(config.dir))
    prepare(config, workers=1)
    assert "complete already" in capsys.readouterr().out
    assert before.keys() - contents(Path(config.dir)).keys() == {"train/main/shard-00099.bin.tmp"}


def test_touched_sources_are_the_same_but_edited_ones_are_not(tmp_path: Path) -> None:
    config = prepared(tmp_path)
    os.utime(tmp_path / "raw.jsonl", (1, 1))
    prepare(config, workers=1)
    write_jsonl(tmp_path / "raw.jsonl", documents(201))
    with pytest.raises(ValueError, match=r"train/main was prepared from something else.*1 source file .*raw\.jsonl"):
        prepare(config, workers=1)


def test_changes_since_an_interrupted_run_are_refused(tmp_path: Path) -> None:
    config = prepared(tmp_path)
    folder = folder_of(config)
    manifest = read_model(folder / "manifest.json", Manifest)
    for shard in manifest.shards[:2]:
        (folder / f"{shard.name}.json").write_text(shard.model_dump_json())
    (folder / "manifest.json").unlink()
    (folder / "progress.json").write_text(json.dumps(manifest.made_from))
    with pytest.raises(ValueError, match=r"settings \(.*'shard_tokens': 1000.* -> .*'shard_tokens': 2000"):
        prepare(config_of(tmp_path, shard_tokens=2000), workers=1)
    (Path(config.dir) / "tokenizer.model").unlink()
    other = config_of(tmp_path, tokenizer={"vocab_size": 330, "train_bytes": 20_000})
    train_tokenizer(other)
    with pytest.raises(ValueError, match="changed since: the tokenizer"):
        prepare(other, workers=1)


def test_changed_text_is_named_with_what_changed(tmp_path: Path) -> None:
    for name in "abc":
        write_jsonl(tmp_path / f"{name}.jsonl", documents(60, seed=ord(name)))
    config = config_of(tmp_path, sources=[{"name": "main", "files": [str(tmp_path / "[abd].jsonl")]}])
    train_tokenizer(config)
    assert changed_since(config) == {}  # nothing is prepared yet
    prepare(config, workers=1)

    def changes() -> str:
        (said,) = changed_since(config).values()
        return said

    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    text, status = first.read_text(), first.stat()
    os.utime(first)
    assert changed_since(config) == {}  # newer, but the same
    first.write_text(text + "\n" * 1000)
    os.utime(first, ns=(0, 0))
    assert changes() == f"1 source file (a.jsonl: {status.st_size:,} -> {status.st_size + 1000:,} bytes)"
    with pytest.raises(ValueError, match=re.escape(f"; changed since: {changes()}. ")):
        prepare(config, workers=1)
    first.write_text(text.swapcase())
    assert changes() == "1 source file (a.jsonl: other content of the same size)"
    with pytest.raises(ValueError, match=re.escape(f"; changed since: {changes()}. ")):
        prepare(config, workers=1)
    (tmp_path / "d.jsonl").write_text(second.read_text())
    assert changes() == "2 source files (first: a.jsonl: other content of the same size)"
    first.write_text(text)
    assert changes() == "1 source file (d.jsonl is new)"
    second.unlink()
    assert changes() == "1 source file (b.jsonl -> d.jsonl)"
    (tmp_path / "d.jsonl").unlink()
    assert changes() == "1 source file (b.jsonl is gone)"
    first.unlink()
    assert changed_since(config) == {}  # shards do not need it


def test_another_format_of_the_same_files_is_another_source(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "raw.txt", documents(200))
    source = {"name": "main", "files": [str(tmp_path / "raw.txt")]}
    config, lines = config_of(tmp_path, sources=[source]), config_of(tmp_path, sources=[{**source, "format": "json"}])
    train_tokenizer(config)
    prepare(config, workers=1)
    with pytest.raises(ValueError, match=r"train/main was .*; changed since: formats \(\['text'\] -> \['json'\]\)\. "):
        prepare(lines, workers=1)
    prepare(config_of(tmp_path, sources=[{**source, "format": "text"}]), workers=1)  # as inferred
    forget(folder_of(config), "formats")
    prepare(config, workers=1)


def forget(folder: Path, key: str) -> None:
    """Make the manifest one of before ``key`` was in it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["made_from"][key]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_finished_shard_whose_file_was_lost_is_made_again(tmp_path: Path) -> None:
    config = prepared(tmp_path)
    expected = contents(Path(config.dir))
    folder = folder_of(config)
    manifest = read_model(folder / "manifest.json", Manifest)
    for shard in manifest.shards[:3]:
        (folder / f"{shard.name}.json").write_text(shard.model_dump_json())
    (folder / "progress.json").write_text(json.dumps(manifest.made_from))
    (folder / "manifest.json").unlink()
    (folder / "shard-00001.bin").write_bytes(b"cut")
    prepare(config, workers=1)
    assert contents(Path(config.dir)) == expected


def test_two_commands_at_once_are_refused(tmp_path: Path) -> None:
    config = prepared(tmp_path)
    with only_writer(Path(config.dir)), pytest.raises(ValueError, match=r"another command is writing to .*data"):
        prepare(config, workers=1)
    prepare(config, workers=1)


def test_refusals(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "raw.jsonl", documents(200))
    config = config_of(tmp_path)
    with pytest.raises(ValueError, match=r"holds neither tokenizer\.json nor tokenizer\.model"):
        prepare(config, workers=1)
    train_tokenizer(config)
    write_jsonl(tmp_path / "raw.jsonl", ["", ""])
    with pytest.raises(ValueError, match="train/main: the source has no document with text"):
        prepare(config, workers=1)
    (tmp_path / "raw.jsonl").unlink()
    with pytest.raises(ValueError, match="source 'main': no file matches"):
        prepare(config, workers=1)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "raw.jsonl", [*documents(100), ""])
    (tmp_path / "bad.txt").write_bytes(b"words and \xff" * 20)
    config = config_of(tmp_path, validation=[{"name": "held", "files": [str(tmp_path / "bad.txt")]}])
    train_tokenizer(config)
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump({"data": config.model_dump(mode="json")}))
    monkeypatch.setattr("sys.argv", ["data.prepare", str(run), "--workers", "1"])
    main()
    said = capsys.readouterr().out
    assert "train/main: " in said and "100 documents" in said and "left out 1 document" in said
    assert "validation/held: replaced invalid Unicode by U+FFFD in 1 document" in said

    monkeypatch.setattr("sys.argv", ["data.prepare", str(run), "--verify"])
    main()
    assert "verified" in capsys.readouterr().out
    path = Path(config.dir) / "validation" / "held" / "shard-00000.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    for arguments, message in (
        ([str(run), "--verify"], "held/shard-00000.bin is damaged: its SHA-256 differs"),
        ([str(run), "data.shard_token=5"], "did you mean 'data.shard_tokens'?"),
    ):
        monkeypatch.setattr("sys.argv", ["data.prepare", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 1
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1


@pytest.mark.parametrize("command", [main, tokenizer.main])
@pytest.mark.parametrize("config", ["configs/tune_mine.yaml", "configs/tune_lora.yaml"])
def test_a_config_of_stage_two_needs_no_preparation(
    command: Callable[[], None], config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["data", str(ROOT / config)])
    with pytest.raises(SystemExit, match="1"):
        command()
    assert capsys.readouterr().err == (
        f"error: {ROOT / config} is a config of stage two, as it has a block 'base', and needs no preparation; "
        "tune.train reads its examples as they are\n"
    )


def test_a_killed_worker_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "raw.jsonl", documents(50))
    config = config_of(tmp_path)
    train_tokenizer(config)
    monkeypatch.setattr("data.prepare.encode._encode", os.kill)  # pickled by name: the worker runs os.kill(...)
    monkeypatch.setattr("data.prepare.encode._begin", os._exit)
    with pytest.raises(ValueError, match="a tokenizing process was killed"):
        prepare(config, workers=2)


def test_plain_lines_in_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("data.prepare.progress.LOG_EVERY_S", 0.0)
    prepared(tmp_path)
    said = capsys.readouterr()
    assert "tokens/s, reading raw.jsonl (1 of 1)" in said.out
    assert "\r" not in said.out + said.err
