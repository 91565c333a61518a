"""Where Kong finds its protos. Kong keeps what it has parsed by file name, so a changed one has another name."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from gateway.errors import PushFailedError
from gateway.files import TEMPORARY, write_atomically
from gateway.kong_proto import KongProto

KEPT = 24 * 3_600.0
"""Seconds for which a proto is kept that no configuration names any more: a Kong that was away may go by it."""
_OURS = re.compile(r"[A-Za-z0-9_.]+-[0-9a-f]{8,64}\.proto")


class ProtoDirectory:
    """Writes protos before the configuration that names them, and removes those that were not named for long.

    The time at which a file was last named is its modification time, so that it holds for processes to come.

    Args:
        path: of the directory, made when needed. Kong's user must be able to read it.
        clock: seconds since the epoch, as of files.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._named: frozenset[str] = frozenset()

    def write(self, protos: Iterable[KongProto]) -> None:
        """Makes sure that these are there. Blocks shortly.

        Raises:
            PushFailedError: one cannot be written.
        """
        try:
            self.path.mkdir(mode=0o755, parents=True, exist_ok=True)
            for proto in protos:
                file = self.path / proto.file_name
                if file.exists() and file.read_text(encoding="utf-8") == proto.text:
                    self._touch(file)
                else:
                    write_atomically(file, proto.text.encode())
        except OSError as error:
            raise PushFailedError(f"protos cannot be written into {self.path}: {error.strerror}") from None

    def named(self, protos: Iterable[KongProto]) -> None:
        """The configuration in force names these alone. Those that none has named for `KEPT` go. Blocks shortly."""
        now = frozenset(proto.file_name for proto in protos)
        kept, self._named = self._named | now, now
        try:
            for file in self.path.iterdir():
                if file.name in kept:
                    self._touch(file)
                elif self._is_old(file):
                    file.unlink(missing_ok=True)
        except OSError:
            # Somebody else tidies up too, or may not be tidied up after: neither is worth a failed push.
            return

    def _is_old(self, file: Path) -> bool:
        ours = _OURS.fullmatch(file.name) is not None or file.name.startswith(TEMPORARY)
        return ours and file.stat().st_mtime < self._clock() - KEPT

    def _touch(self, file: Path) -> None:
        now = self._clock()
        os.utime(file, (now, now))
