"""A file that grows line by line, and loses no line to a disk that is full for a while."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


class Lines:
    """Appends to a file; what cannot be written waits in memory until it can.

    Args:
        path: the file, which need not exist.
        tell: takes a sentence when writing fails, works again, or is given up with lines left.
    """

    def __init__(self, path: Path, tell: Callable[[str], None]):
        self.path, self.tell = path, tell
        # No buffer: of what a full disk refuses nothing must be written later, or twice, by anybody else.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  closed in close()
        self._waiting = b""
        self._cut_to: int | None = None
        self._failed = False

    def add(self, line: str, in_place_of_bytes_from: int | None = None) -> None:
        """Append ``line``, after those that still wait.

        Args:
            line: without its end.
            in_place_of_bytes_from: cut the file there before, for a line that is written anew.
        """
        if in_place_of_bytes_from is not None:
            self._cut_to = in_place_of_bytes_from
        self._waiting += f"{line}\n".encode()
        try:
            if self._cut_to is not None:
                self._file.truncate(self._cut_to)
                self._cut_to = None
            while self._waiting:  # a disk may take a part of a line and be full then; the rest follows where it stopped
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._failed:
                self.tell(
                    f"{self.path} cannot be written ({error.strerror}); its lines wait in memory, so make room there "
                    "before the run ends"
                )
            self._failed = True
        else:
            if self._failed:
                self.tell(f"{self.path} is written again, and no line is missing")
            self._failed = False

    def close(self) -> None:
        """Close the file."""
        if self._waiting:
            self.tell(f"{self._waiting.count(10)} lines of {self.path} could not be written and are lost")
        self._file.close()
