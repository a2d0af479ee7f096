"""An append-only file of lines that loses none while the disk is temporarily full."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


class Lines:
    """Appends to a file; what cannot be written waits in memory until it can.

    Args:
        path: the file, which need not exist.
        tell: called with a sentence when writing fails, works again, or is given up with lines left.
    """

    def __init__(self, path: Path, tell: Callable[[str], None]):
        self.path, self.tell = path, tell
        # Unbuffered: what a full disk refuses must not be written later, or twice, by a buffer.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  closed in close()
        self._waiting = b""
        self._cut_to: int | None = None
        self._failed = False

    def add(self, line: str, in_place_of_bytes_from: int | None = None) -> None:
        """Append ``line``, after those that still wait.

        Args:
            line: without the newline.
            in_place_of_bytes_from: first truncate the file there, for a line that is rewritten.
        """
        if in_place_of_bytes_from is not None:
            self._cut_to = in_place_of_bytes_from
        self._waiting += f"{line}\n".encode()
        try:
            if self._cut_to is not None:
                self._file.truncate(self._cut_to)
                self._cut_to = None
            while self._waiting:  # a disk may fill up within a line; the rest is written from there later
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
                self.tell(f"{self.path} can be written again; no line is missing")
            self._failed = False

    def close(self) -> None:
        """Close the file."""
        if self._waiting:
            self.tell(f"{self._waiting.count(10)} lines of {self.path} could not be written and are lost")
        self._file.close()
