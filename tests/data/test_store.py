"""Opening prepared sources: windows across shards, and every kind of damage named by its file."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.batches import TrainingData, ValidationSet
from data.config import DataConfig, SourceConfig
from data.files import sha256_of
from data.open_files import Column, OpenFiles
from data.store import TokenStore
from data.tokenization import tokenizer_sha256
from data.tokenizer import train_tokenizer
from settings.project import ROOT
from tests.data.helpers import config_of, documents, prepared


def everything(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """All tokens and all document ends of a source, read the simple way."""
    tokens = [np.fromfile(path, "<u2").astype(np.int64) for path in sorted(folder.glob("*.bin"))]
    offsets = np.cumsum([0, *[len(part) for part in tokens]])
    ends = [
        np.fromfile(path, "<u8").astype(np.int64) + o
        for path, o in zip(sorted(folder.glob("*.ends")), offsets[:-1], strict=True)
    ]
    return np.concatenate(tokens), np.concatenate(ends)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of several shards; tests that damage it take a copy."""
    return Path(prepared(tmp_path_factory.mktemp("pristine"), shard_tokens=1000).dir) / "train" / "main"


@pytest.mark.parametrize("length", [2, 16, 999, 1000, 2500])
def test_windows_are_slices_of_all_shards(pristine: Path, length: int) -> None:
    store = TokenStore(pristine)
    tokens, ends = everything(store.folder)
    assert store.tokens == len(tokens) and store.windows(length) == (len(tokens) - 1) // length
    assert len(tokens) - store.windows(length) * length <= length, "more than the tail is left out"
    for number in range(store.windows(length)):
        first = number * length
        window, inside = store.window(number, length)
        assert window.dtype == np.int64
        np.testing.assert_array_equal(window, tokens[first : first + length + 1])
        np.testing.assert_array_equal(inside, [e - first for e in ends if 1 <= e - first <= length])


def edit_manifest(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return edit


def cut(name: str, keep: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut("shard-00001.bin", 10), r"shard-00001\.bin has 10 bytes, but the manifest says"),
        (cut("shard-00000.ends", 0), r"shard-00000\.ends has 0 bytes"),
        (lambda folder: (folder / "shard-00001.bin").unlink(), r"shard-00001\.bin is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), r"manifest\.json does not exist; prepare"),
        (cut("manifest.json", 100), r"manifest\.json is not valid JSON"),
        (cut("manifest.json", 0), r"manifest\.json is not valid JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), r"manifest\.json must hold a JSON object"),
        (edit_manifest(lambda m: m.update(format_version=9)), r"manifest\.json has format version 9"),
        (edit_manifest(lambda m: m.update(dtype="int8")), r"manifest\.json is damaged: dtype"),
        (edit_manifest(lambda m: m.pop("shards")), r"manifest\.json is damaged: shards"),
        (edit_manifest(lambda m: m.update(tokens=5)), r"manifest\.json is damaged: it counts 5 tokens"),
        (edit_manifest(lambda m: m["shards"][0].update(tokens=5)), r"shard-00000\.bin has .* the manifest says 10"),
        (edit_manifest(lambda m: m["shards"].pop(0)), r"manifest\.json is damaged: it counts"),
        (edit_manifest(lambda m: m["shards"][0]["files"].clear()), r"shard-00000\.bin has"),
    ],
)
def test_damage_is_named(pristine: Path, tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    folder = shutil.copytree(pristine, tmp_path / "copy")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        TokenStore(folder)


@pytest.mark.parametrize("name", ["shard-00001.bin", "shard-00000.ends"])
def test_a_flipped_byte_is_found_by_verify(pristine: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(pristine, tmp_path / "copy")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    store = TokenStore(folder)
    with pytest.raises(ValueError, match=f"{name} is damaged: its SHA-256"):
        store.verify()


def test_a_shard_that_changes_while_it_is_read_is_named(pristine: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pristine, tmp_path / "copy")
    shard, last = folder / "shard-00000.bin", TokenStore(pristine).windows(10) - 1
    whole = shard.read_bytes()
    store = TokenStore(folder)
    window, _ = store.window(0, 10)

    copied = folder / "shard.new"
    copied.write_bytes(whole)
    copied.rename(shard)  # the same bytes in another file
    np.testing.assert_array_equal(store.window(0, 10)[0], window)

    for damaged in (whole[:50], whole[2:] + whole[:2]):
        with shard.open("r+b") as file:  # in place, as it is mapped
            file.write(damaged)
            file.truncate(len(damaged))
        with pytest.raises(ValueError, match=f"{shard} was changed after it was prepared: its SHA-256 differs"):
            store.window(0, 10)
        store.window(last, 10)  # of another shard
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard} is gone; restore it, or remove {folder} and prepare again"):
        store.window(0, 10)
    shard.write_bytes(whole)
    np.testing.assert_array_equal(store.window(0, 10)[0], window)


def test_a_shard_newer_than_its_manifest_is_compared_at_first_use(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a copy that did not keep the times; touching the manifest says that it was meant."""
    said = list[str]()
    monkeypatch.setattr(logging.getLogger("hopscotch"), "info", said.append)
    folder = shutil.copytree(pristine, tmp_path / "copy")
    shard = folder / "shard-00000.bin"
    content = shard.read_bytes()
    TokenStore(folder).window(0, 10)
    assert not said
    shard.write_bytes(content)
    store = TokenStore(folder)
    for _ in range(2):
        store.window(0, 10)
    assert len(said) == 1 and f"touch {folder / 'manifest.json'} to skip this" in said[0]
    shard.write_bytes(content[2:] + content[:2])
    with pytest.raises(ValueError, match=f"{shard} was changed after it was prepared"):
        TokenStore(folder).window(0, 10)
    (folder / "manifest.json").touch()
    TokenStore(folder).window(0, 10)
    assert len(said) == 2


def test_other_tokenizer_and_mixed_tokenizers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = prepared(tmp_path / "one")
    two = prepared(tmp_path / "two", documents(200, seed=5), tokenizer={"vocab_size": 330, "train_bytes": 20_000})
    (Path(two.dir) / "train" / "main").rename(Path(one.dir) / "train" / "other")
    mixed = one.model_copy(
        update={"sources": [*one.sources, one.sources[0].model_copy(update={"name": "other"})]},
    )
    with pytest.raises(ValueError, match=r"train/other/manifest\.json: the shards were made with tokenizer"):
        TrainingData(mixed)
    (Path(one.dir) / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer: it holds neither"):
        TrainingData(one)
    train_tokenizer(config_of(tmp_path / "one", tokenizer={"vocab_size": 330, "train_bytes": 20_000}))
    assert tokenizer_sha256(one.dir)
    with pytest.raises(ValueError, match=r"train/main/manifest\.json: the shards were made with tokenizer"):
        TrainingData(one)


@pytest.fixture
def without_sources(tmp_path: Path) -> DataConfig:
    """A prepared source and validation set whose files are gone."""
    held = [{"name": "held", "files": [str(tmp_path / "raw.jsonl")]}]
    config = prepared(tmp_path, validation=held)
    (tmp_path / "raw.jsonl").unlink()
    return config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text_field": "body"}, "text_field text -> body"),
        ({"format": "text"}, r"formats \['json'\] -> \['text'\]"),
        ({"tokens": {}}, r"text_field text -> none, tokens none -> \{'dtype': None"),
        ({"files": [], "hub": "some/other"}, "hub none -> some/other, split none -> train"),
    ],
    ids=["text_field", "format", "tokens", "hub"],
)
def test_shards_of_other_settings_than_the_configs_are_refused(
    without_sources: DataConfig, changes: dict[str, Any], said: str
) -> None:
    said = rf"main was prepared with settings that differ from the config's \({said}.*\); undo the change, or choose"
    changed = SourceConfig.model_validate(without_sources.sources[0].model_dump() | changes)
    with pytest.raises(ValueError, match=f"train/{said}"):
        TrainingData(without_sources.model_copy(update={"sources": [changed]}))
    held = changed.model_copy(update={"name": "held"})
    with pytest.raises(ValueError, match=f"validation/{said.replace('main', 'held', 1)}"):
        ValidationSet(without_sources.model_copy(update={"validation": [held]}), "held")


def test_what_leaves_the_tokens_of_shards_as_they_are_may_change(without_sources: DataConfig) -> None:
    fingerprint = TrainingData(without_sources).fingerprint
    same = without_sources.sources[0].model_copy(update={"format": "json", "weight": 2.0, "files": ["moved/raw.jsonl"]})
    moved = without_sources.model_copy(update={"sources": [same], "shard_tokens": 5000, "part_bytes": 1})
    assert len(TrainingData(moved).fingerprint) == len(fingerprint)
    deduplicated = without_sources.model_copy(update={"deduplicate": "exact"})
    with pytest.raises(ValueError, match=r"deduplicate none -> exact"):
        TrainingData(deduplicated)
    path = Path(without_sources.dir) / "train/main/manifest.json"
    manifest = json.loads(path.read_text())
    for forgotten in ("formats", "vocabulary"):  # as in the first manifests
        del manifest["made_from"][forgotten]
        path.write_text(json.dumps(manifest))
        assert TrainingData(without_sources).fingerprint == fingerprint


def test_shards_of_another_dataset_of_the_hub_are_refused(without_sources: DataConfig) -> None:
    path = Path(without_sources.dir) / "train/main/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["made_from"]["files"]
    manifest["made_from"]["formats"] = []
    manifest["made_from"]["hub"] = {"name": "some/set", "config": None, "split": "train", "revision": "first"}
    path.write_text(json.dumps(manifest))
    for changes, said in (
        ({}, "hub some/set -> none"),
        ({"hub": "some/other"}, r"\(hub some/set -> some/other\)"),
        ({"hub": "some/set", "split": "test"}, r"\(split train -> test\)"),
        ({"hub": "some/set", "hub_config": "en"}, r"\(hub_config None -> en\)"),
    ):
        source = without_sources.sources[0] if not changes else SourceConfig.model_validate({"name": "main", **changes})
        with pytest.raises(ValueError, match=said):
            TrainingData(without_sources.model_copy(update={"sources": [source]}))
    same = SourceConfig(name="main", hub="some/set")
    assert TrainingData(without_sources.model_copy(update={"sources": [same]})).vocab_size == 320
    manifest["made_from"]["hub"]["revision"] = None
    path.write_text(json.dumps(manifest))
    moved = SourceConfig(name="main", hub="elsewhere/set")
    assert TrainingData(without_sources.model_copy(update={"sources": [moved]})).vocab_size == 320


UNDER_A_LIMIT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from data.store import TokenStore
store, digest = TokenStore(sys.argv[1]), 0
for number in range(store.windows(7)):
    tokens, ends = store.window(number, 7)
    digest = (digest * 1_000_003 + int(tokens.sum()) * 31 + int(ends.sum())) % (1 << 61)
print(digest)
"""


def test_two_thousand_shards_under_a_limit_of_256_open_files(tmp_path: Path) -> None:
    """Every window, the same tokens; three shards a window, as they are short."""
    generator = np.random.default_rng(0)
    shards, numbers = [], []
    for number in range(2000):
        tokens = generator.integers(3, 300, 3).astype("<u2")
        for kind, values in (("bin", tokens), ("ends", np.array([2], "<u8"))):
            (tmp_path / f"shard-{number:05d}.{kind}").write_bytes(values.tobytes())
        files = {
            f"shard-{number:05d}.{kind}": {
                "bytes": (tmp_path / f"shard-{number:05d}.{kind}").stat().st_size,
                "sha256": sha256_of(tmp_path / f"shard-{number:05d}.{kind}"),
            }
            for kind in ("bin", "ends")
        }
        counts = {"tokens": 3, "documents": 1, "text_bytes": 3, "repaired_documents": 0, "empty_documents": 0}
        shards.append({"name": f"shard-{number:05d}", **counts, "after": [0, number + 1], "files": files})
        numbers.append(tokens)
    totals = {key: 2000 * counts[key] for key in ("tokens", "documents", "text_bytes")}
    rest = {"repaired_documents": 0, "empty_documents": 0, "made_from": {}, "shards": shards}
    head = {"format_version": 1, "dtype": "uint16", "vocab_size": 300, "eos_id": 2}
    (tmp_path / "manifest.json").write_text(json.dumps({**head, **totals, **rest}))
    done = subprocess.run(
        [sys.executable, "-c", UNDER_A_LIMIT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    every, expected = np.concatenate(numbers).astype(np.int64), 0
    for number in range((6000 - 1) // 7):
        first = 7 * number
        ends = [3 * shard + 2 - first for shard in range(2000) if 1 <= 3 * shard + 2 - first <= 7]
        window = every[first : first + 8]
        expected = (expected * 1_000_003 + int(window.sum()) * 31 + sum(ends)) % (1 << 61)
    assert int(done.stdout) == expected


def test_a_shard_that_is_cut_while_it_is_read_is_an_error_and_no_signal(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(100)))
    column = Column(str(tmp_path / "a"), np.dtype("u1"), 100)
    assert column.part(10, 12).tolist() == [10, 11] and column.place(50) == 50 and column.place(500) == 100
    (tmp_path / "a").write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match="ends at byte 20, 80 bytes before what its manifest says"):
        column.part(0, 100)


def test_few_descriptors_stay_open(tmp_path: Path) -> None:
    files = OpenFiles(kept=2)
    for name in "abcab":
        (tmp_path / name).write_bytes(name.encode() * 4)
        assert files.read(str(tmp_path / name), 1, 2) == name.encode() * 2
    assert [Path(path).name for path in files._open] == ["a", "b"]
    files.forget(str(tmp_path / "a"))
    assert [Path(path).name for path in files._open] == ["b"]
