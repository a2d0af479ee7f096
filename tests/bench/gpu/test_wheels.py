"""What a borrowed machine lacks is collected and installed, offline, from an index of made-up packages."""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.gpu import wheels
from bench.gpu.__main__ import main

METADATA = "Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
SETUP = "from setuptools import setup\nsetup(name='{name}', version='1.0', py_modules=['{name}'])\n"


def _wheel(
    folder: Path, name: str, version: str = "1.0", tag: str = "py3-none-any", needs: tuple[str, ...] = ()
) -> None:
    """A package of one module."""
    info = f"{name}-{version}.dist-info"
    lines = "".join(f"Requires-Dist: {need}\n" for need in needs)
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as archive:
        archive.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        archive.writestr(f"{info}/METADATA", METADATA.format(name=name, version=version, needs=lines))
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")


def _source(folder: Path, name: str) -> None:
    """The same, as source."""
    files = {
        "PKG-INFO": METADATA.format(name=name, version="1.0", needs=""),
        "setup.py": SETUP.format(name=name),
        f"{name}.py": "",
    }
    with tarfile.open(folder / f"{name}-1.0.tar.gz", "w:gz") as archive:
        for file, text in files.items():
            entry = tarfile.TarInfo(f"{name}-1.0/{file}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip and uv take packages from, and from nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # that is: do not isolate; setuptools is here already
    settings = tmp_path / "uv.toml"
    settings.write_text(f'offline = true\nno-index = true\nfind-links = ["{folder}"]\ncache-dir = "{tmp_path}/cache"\n')
    monkeypatch.setenv("UV_CONFIG_FILE", str(settings))
    for name in ("UV_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX", "UV_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """What a project needs: torch with its own, a trainer of two packages, a test runner."""
    root = tmp_path / "project"
    root.mkdir()
    (root / "requirements.txt").write_text("# to train\ntorch==2.0\nzoo-trainer==1.0\n")
    (root / "requirements-dev.txt").write_text("-r requirements.txt\npytest==9.0\nzoo-lint==1.0\n")
    (root / "requirements.lock").write_text("torch==2.0\nzoo-cuda==1.0\nzoo-trainer==1.0\nzoo-leaf==1.0\npytest==9.0\n")
    return root


def _fill(index: Path) -> None:
    _wheel(index, "torch", "2.0", needs=("zoo-cuda", "zoo-shared"))
    _wheel(index, "zoo_cuda")
    _wheel(index, "zoo_shared")
    _wheel(index, "zoo_trainer", needs=("torch", "zoo-leaf", "zoo-shared", "zoo-there; python_version >= '3.12'"))
    _wheel(index, "zoo_leaf", "2.0")  # newer than the locked one
    _wheel(index, "zoo_leaf", tag="cp312-cp312-manylinux_2_28_x86_64")
    _wheel(index, "zoo_there")
    _wheel(index, "pytest", "9.0")


def test_all_that_is_needed_there_but_torch_and_what_it_brings(index: Path, project: Path, tmp_path: Path) -> None:
    _fill(index)
    found = wheels.collect(tmp_path / "out", "3.12", 35, frozenset({"zoo-there"}), project)
    assert [path.name for path in found] == [
        "pytest-9.0-py3-none-any.whl",
        "zoo_leaf-1.0-cp312-cp312-manylinux_2_28_x86_64.whl",  # for its Python, in the locked version
        "zoo_trainer-1.0-py3-none-any.whl",
    ]
    assert sorted((tmp_path / "out").iterdir()) == found


def test_a_wheel_for_a_newer_glibc_is_not_taken(index: Path, project: Path, tmp_path: Path) -> None:
    _fill(index)
    with pytest.raises(ValueError, match=r"uv cannot resolve|pip download failed: ERROR: No matching distribution"):
        wheels.collect(tmp_path / "out", "3.12", 17, frozenset(), project)


def test_a_missing_package_is_told(index: Path, project: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"uv cannot resolve the requirements: (?s:.*)torch"):
        wheels.collect(tmp_path / "out", "3.12", 35, frozenset(), project)


def test_what_is_published_as_source_is_built(index: Path, tmp_path: Path) -> None:
    _source(tmp_path, "zoo_source")
    wheels._build(tmp_path / "zoo_source-1.0.tar.gz", tmp_path)
    assert (tmp_path / "zoo_source-1.0-py3-none-any.whl").is_file()
    assert not (tmp_path / "zoo_source-1.0.tar.gz").exists()


def test_what_would_hold_code_for_this_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(words: list[str], **_: str) -> None:
        _wheel(Path(words[words.index("--wheel-dir") + 1]), "zoo_c", tag="cp311-cp311-linux_x86_64")

    monkeypatch.setattr(wheels, "_pip", pip)
    (tmp_path / "zoo_c-1.0.tar.gz").touch()
    with pytest.raises(
        ValueError, match=r"zoo_c-1.0.tar.gz is published as source only, and the wheel built here, zoo_c-1"
    ):
        wheels._build(tmp_path / "zoo_c-1.0.tar.gz", tmp_path)


def test_only_what_is_missing_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("zoo_one", "zoo_two"):
        _wheel(tmp_path, name)
    _wheel(tmp_path, "torch", "1.0")
    _wheel(tmp_path, "PyYAML", "1.0")
    site = tmp_path / "site"
    assert wheels.install(tmp_path, site) == ["zoo-one", "zoo-two"]
    assert (site / "zoo_one.py").is_file() and not (site / "torch.py").exists()
    monkeypatch.syspath_prepend(str(site))
    assert wheels.install(tmp_path, site) == []  # they are here now


@pytest.mark.parametrize("kind", ["no folder", "empty", "another Python's"])
def test_wheels_that_cannot_be_installed_are_one_sentence(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "wheels"
    if kind != "no folder":
        folder.mkdir()
    if kind == "another Python's":
        _wheel(folder, "zoo_other", tag="cp27-cp27m-win32")
    assert main(["--wheels", str(folder), "--out", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    expected = (
        "is not a supported wheel on this platform" if kind == "another Python's" else "holds none; `make wheels`"
    )
    assert out == "" and err.startswith("error: ") and expected in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the command says, with ``collect`` told what it got."""

    def start(*words: str) -> str:
        def note(out: Path, python: str, glibc: int, have: frozenset[str]) -> list[Path]:
            print(python, glibc, sorted(have))
            return []

        monkeypatch.setattr(wheels, "collect", note)
        wheels.main([*words])
        return capsys.readouterr().out

    return start


def test_what_the_machine_has_is_read_from_pips_list(ask: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "there.txt").write_text("torch==2.11.0+cu130\nPyYAML==6.0\njaraco.text @ file:///x\n# comment\n")
    said = ask(str(tmp_path / "out"), "--have", str(tmp_path / "there.txt"), "--python", "3.13")
    assert "3.13 35 ['jaraco-text', 'pyyaml', 'torch']" in said and "in 0 wheels" in said


def test_a_version_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        wheels.main(["out", "--python", "three"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: --python must be a version such as 3.12, got three\n"


def test_it_starts_with_the_standard_library_alone() -> None:
    """What else there is may be what is missing: no package of others may be imported before the installation."""
    import subprocess

    code = "import sys; import bench.gpu.__main__; print({'yaml', 'pydantic', 'tqdm', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True, cwd=wheels.ROOT)
    assert done.stdout == "set()\n"
