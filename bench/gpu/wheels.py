"""The packages that a borrowed machine lacks: collected where there is a network, installed where there is none.

    python -m bench.gpu.wheels wheels --have there.txt     # or: make wheels HAVE=there.txt

``there.txt`` is what ``python3 -m pip list --format=freeze`` prints on the borrowed machine; without it everything but
torch and its dependencies is collected. Versions are those of ``requirements.lock``. Packages published only as source
are built here, without compiled parts (this project uses none of DeepSpeed's). ``python -m bench.gpu --wheels``
installs only those that the machine lacks in any version, so its torch stays as it is.

This file and ``__main__.py`` import only the standard library at their top, because the others may be what is missing.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH = "torch"
_GLIBC = (39, 38, 36, 35, 34, 31, 28, 27, 26, 24, 17, 12, 5)
"""Minor versions of glibc 2 that wheels are tagged with, newest first."""
_LINE = re.compile(r"([A-Za-z0-9][\w.-]*)==([^\s;]+)")


def normal(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def distribution(wheel: Path) -> str:
    """Name of the distribution in a wheel."""
    return normal(wheel.name.partition("-")[0])


def install(folder: Path, target: Path) -> list[str]:
    """Install into ``target``, for PYTHONPATH, the wheels in ``folder`` that are not installed in any version.

    Returns:
        names of what was installed.

    Raises:
        ValueError: if there are no wheels, or pip refuses one.
    """
    wheels = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    if not wheels:
        raise ValueError(f"--wheels {folder} must be a folder of wheels and holds none; `make wheels` collects them")
    missing = [wheel for wheel in wheels if not _installed(distribution(wheel))]
    if missing:
        _pip(["install", "--no-index", "--no-deps", "--no-compile", "--target", str(target), *map(str, missing)])
    return [distribution(wheel) for wheel in missing]


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def collect(out: Path, python: str, glibc: int, have: frozenset[str], root: Path = ROOT) -> list[Path]:
    """Put the wheels that the other machine (Linux on x86-64) needs into ``out``.

    Args:
        out: folder, created if needed.
        python: version on the other machine, such as ``3.12``.
        glibc: its minor version of glibc 2.
        have: names of distributions that it has.
        root: of the project, with its requirements files.

    Raises:
        ValueError: if something cannot be resolved, fetched or built.
    """
    out.mkdir(parents=True, exist_ok=True)
    pins = _closure(_requirements(root), python, glibc, root)
    brought = _closure([line for line in _requirements(root) if line.startswith(f"{TORCH}==")], python, glibc, root)
    wanted = {name: pin for name, pin in pins.items() if name not in brought and name not in have}
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in _GLIBC if minor <= glibc]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
    target = ["--python-version", python, "--implementation", "cp", *(f"--platform={name}" for name in platforms)]
    if wanted:
        asked = [f"{name}=={pin}" for name, pin in wanted.items()]
        _pip(["download", "--no-deps", *target, "--dest", str(out), *asked])
    for source in [path for path in out.iterdir() if path.name.endswith((".tar.gz", ".zip"))]:
        _build(source, out)
    return sorted(path for path in out.glob("*.whl") if distribution(path) in wanted)


def _requirements(root: Path) -> list[str]:
    """Requirements for training and for running the tests."""
    lines = [*(root / "requirements.txt").read_text().splitlines()]
    lines += [line for line in (root / "requirements-dev.txt").read_text().splitlines() if line.startswith("pytest")]
    return [line for line in lines if _LINE.match(line)]


def _closure(requirements: Sequence[str], python: str, glibc: int, root: Path) -> dict[str, str]:
    """Names and locked versions of ``requirements`` and all their dependencies on the other machine."""
    uv = Path(sys.executable).with_name("uv")
    words = [str(uv), "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python-version", python]
    words += ["--python-platform", f"x86_64-manylinux_2_{glibc}", "--constraint", str(root / "requirements.lock"), "-"]
    done = subprocess.run(words, input="\n".join(requirements), text=True, capture_output=True, check=False)
    if done.returncode:
        raise ValueError(f"uv cannot resolve the requirements: {done.stderr.strip()}")
    return {normal(name): pin for name, pin in _LINE.findall(done.stdout)}


def _build(source: Path, out: Path) -> None:
    """Replace a source archive by its wheel.

    Raises:
        ValueError: if that wheel is specific to this machine.
    """
    with tempfile.TemporaryDirectory() as folder:
        _pip(["wheel", "--no-deps", "--wheel-dir", folder, str(source)], DS_BUILD_OPS="0")
        (wheel,) = Path(folder).glob("*.whl")
        if not wheel.name.endswith("-none-any.whl"):
            raise ValueError(
                f"{source.name} is published as source only, and the wheel built here, {wheel.name}, may not run on "
                f"another machine; build it on a machine like that one and put it into {out}"
            )
        (out / wheel.name).write_bytes(wheel.read_bytes())
    source.unlink()


def _pip(arguments: Sequence[str], **environment: str) -> None:
    """Run this Python's pip.

    Raises:
        ValueError: if it fails.
    """
    words = [sys.executable, "-m", "pip", arguments[0], "--quiet", "--disable-pip-version-check", *arguments[1:]]
    done = subprocess.run(words, env=os.environ | environment, text=True, capture_output=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or done.stderr.splitlines()[-1:]
        raise ValueError(f"pip {arguments[0]} failed: {' '.join(said)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Collect the wheels and list them."""
    options = parse(arguments)
    from settings import user_errors

    with user_errors():
        if not re.fullmatch(r"3\.\d+", options.python):
            raise ValueError(f"--python must be a version such as 3.12, got {options.python}")
        text = "" if options.have is None else options.have.read_text(encoding="utf-8")
        have = frozenset(normal(name) for name in re.findall(r"^[A-Za-z0-9][\w.-]*", text, re.MULTILINE))
        wheels = collect(options.out, options.python, options.glibc, have)
        for wheel in wheels:
            print(f"{wheel.stat().st_size / 1e6:8.1f} MB  {wheel.name}")
        print(
            f"{sum(wheel.stat().st_size for wheel in wheels) / 1e6:8.1f} MB  in {len(wheels)} wheels in {options.out}"
        )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.wheels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("out", type=Path, help="folder for the wheels, made if need be")
    parser.add_argument("--have", type=Path, help="what the machine has: its `pip list --format=freeze` in a file")
    parser.add_argument("--python", default="3.12", help="the machine's Python (default: %(default)s)")
    parser.add_argument(
        "--glibc", type=int, default=35, help="its glibc is 2.N, see `ldd --version` there (default: %(default)s)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
