"""A file that is kept for the next start: replaced whole, checked whole, not believed if others can write it."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import DecodeError

from mesh_client.core.errors import InvalidPolicyError, InvalidValueError

log = logging.getLogger(__name__)

_DIGEST = 32
MAX_BYTES = 256 * 1024 * 1024
"""A larger file is not ours."""

_T = TypeVar("_T")


class CheckedFile:
    """One file. Trouble with it is logged once and never raised.

    Args:
        path: the file. Its directory is made when needed, readable by its owner only.
        what: it is, for the log.
        magic: begins it, and ends with a line end; another one is another version's.
    """

    def __init__(self, path: Path, what: str, magic: bytes) -> None:
        self.path = path
        self._what = what
        self._magic = magic
        self._warned = False

    def load(self, decode: Callable[[bytes], _T]) -> _T | None:
        """What ``decode`` makes of what was saved last; None when there is nothing, or when it is damaged.

        It is set aside then. None too when somebody else could have written it: it says who may do what.

        Args:
            decode: may raise DecodeError, InvalidValueError or InvalidPolicyError.
        """
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
                    raise PermissionError(errno.EPERM, "others can write it, so it is not believed")
                if status.st_size > MAX_BYTES:
                    raise InvalidValueError("cache", self.path.name, f"a file of at most {MAX_BYTES} bytes")
                raw = file.read()
            return decode(self._body(raw))
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn("cannot read", error)
        except (DecodeError, InvalidValueError, InvalidPolicyError) as error:
            log.warning("%s %s is damaged and set aside: %s", self._what, self.path, error)
            self._set_aside()
        return None

    def save(self, body: bytes) -> bool:
        """Replaces the file; False when that failed. Blocks: call it in a thread."""
        temporary = None
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(self._magic + hashlib.sha256(body).digest() + body)
            Path(temporary).replace(self.path)
        except OSError as error:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            self._warn("cannot write", error)
            return False
        return True

    def _body(self, raw: bytes) -> bytes:
        if not raw.startswith(self._magic):
            raise InvalidValueError("cache", raw[:16], f"a {self._what} written by this version")
        digest, body = raw[len(self._magic) :][:_DIGEST], raw[len(self._magic) + _DIGEST :]
        if hashlib.sha256(body).digest() != digest:
            raise InvalidValueError("cache", "checksum", "content that was written whole")
        return body

    def _set_aside(self) -> None:
        try:
            self.path.replace(self.path.with_suffix(".damaged"))
        except OSError as error:
            self._warn("cannot set aside", error)

    def _warn(self, what: str, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            log.warning("%s the %s %s, going on without: %s", what, self._what, self.path, error.strerror)


def file_of_mesh(directory: Path, addresses: tuple[str, ...], name: str) -> Path:
    """Where something of one mesh is kept: other meshes have other files.

    Args:
        directory: of all such files.
        addresses: control planes.
        name: with ``{mesh}`` in it.
    """
    mesh = hashlib.sha256(",".join(sorted(addresses)).encode()).hexdigest()[:12]
    return directory / name.format(mesh=mesh)
