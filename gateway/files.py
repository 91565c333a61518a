"""Files of an edge: replaced whole, so that nobody ever reads half of one."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from mesh_client.core.errors import ConfigError

TEMPORARY = ".tmp-"
"""What the names of files that are being written begin with."""


def write_atomically(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Replaces a file by renaming another one over it, in the same directory.

    Raises:
        OSError: it cannot be written; the file is what it was.
    """
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(content)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def private_directory(path: Path, option: str) -> None:
    """Makes a directory that its owner alone may enter, or checks one that is there.

    Args:
        path: which.
        option: that named it, for the error.

    Raises:
        ConfigError: it cannot be made, belongs to somebody else, or others may enter it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
    except OSError as error:
        raise ConfigError(f"{option}: {path} cannot be used: {error.strerror}") from None
    if found.st_uid not in (os.geteuid(), 0):
        raise ConfigError(f"{option}: {path} belongs to user {found.st_uid}: chown it to this user")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(f"{option}: others may enter {path}, which holds keys: chmod 700 {path}")
