"""Lines wait for room, and come out whole and in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.append_only import Lines


class Disk:
    """A file on a disk with room for so many bytes."""

    def __init__(self, file: Any, room: int):
        self.file, self.room = file, room

    def write(self, content: bytes) -> int:
        """As an unbuffered file does: a part if not all fits, an error if nothing does."""
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = min(self.room, len(content))
        self.room -= taken
        return int(self.file.write(content[:taken]))

    def close(self) -> None:
        self.file.close()


def test_a_line_cut_by_a_full_disk_is_finished_later(tmp_path: Path) -> None:
    said = list[str]()
    lines = Lines(tmp_path / "lines", said.append)
    lines._file = disk = Disk(lines._file, 7)  # type: ignore[assignment]
    for text in ("one", "second", "third"):
        lines.add(text)
    assert (tmp_path / "lines").read_text() == "one\nsec" and len(said) == 1
    assert said[0].startswith(f"{tmp_path / 'lines'} cannot be written (No space left on device); its lines wait in")
    disk.room = 100
    lines.add("fourth")
    assert (tmp_path / "lines").read_text() == "one\nsecond\nthird\nfourth\n"
    assert said[1:] == [f"{tmp_path / 'lines'} can be written again; no line is missing"]
    disk.room = 0
    lines.add("fifth")
    lines.close()
    assert len(said) == 4 and said[3] == f"1 lines of {tmp_path / 'lines'} could not be written and are lost"


def test_a_line_in_place_of_another_waits_for_the_disk_as_well(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("one\nold\n")
    said = list[str]()
    lines = Lines(tmp_path / "lines", said.append)
    whole = lines._file

    class Full:
        def truncate(self, size: int) -> int:
            raise OSError(28, "No space left on device")

    lines._file = Full()  # type: ignore[assignment]
    lines.add("new", 4)
    assert (tmp_path / "lines").read_text() == "one\nold\n" and "cannot be written" in said[0]
    lines._file = whole
    lines.add("three")
    assert (tmp_path / "lines").read_text() == "one\nnew\nthree\n" and len(said) == 2


def test_lines_are_appended(tmp_path: Path) -> None:
    for text in ("a", "b"):
        lines = Lines(tmp_path / "lines", print)
        lines.add(text)
        lines.close()
    assert (tmp_path / "lines").read_text() == "a\nb\n"
