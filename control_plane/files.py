"""Files that hold secrets: refused when others can read or replace them, and written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
import time
from pathlib import Path
from typing import IO

from mesh_client.core.errors import ConfigError

MAX_BYTES = 1024 * 1024
"""Larger files are no keys, certificates or states."""
TEMPORARY = ".tmp-"
"""What the names of files that are being written begin with."""


def secret_directory(path: Path) -> None:
    """Makes a directory for secrets with mode 0700, or checks one that is there.

    Raises:
        ConfigError: it cannot be made, is a link, belongs to somebody else, or others may enter it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise ConfigError(f"directory {path} cannot be used: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{path} is a link: name the directory itself")
    _check_owner(path, found)
    if found.st_mode & 0o077:
        raise ConfigError(f"others may enter {path}, which holds secrets: chmod 700 {path}")


def data_directory(path: Path) -> None:
    """Makes a directory for state with mode 0700, or checks that nobody else could replace what is in it.

    Raises:
        ConfigError: it cannot be made, belongs to somebody else, or others may write in it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
    except OSError as error:
        raise ConfigError(f"data directory {path} cannot be used: {error.strerror}") from None
    _check_owner(path, found)
    if found.st_mode & 0o022:
        raise ConfigError(f"others may write in {path}, which holds keys: chmod 700 {path}")


def read_secret(path: Path) -> bytes:
    """What a file holds that its owner alone may read.

    The file is opened once and looked at through what was opened, so that nobody can exchange it in between.

    Raises:
        ConfigError: it cannot be read, is a link or no file, belongs to somebody else, or others may read it.
    """
    return _read(path, os.O_NOFOLLOW, 0o077, "others may read or write")


def read_given_secret(path: Path) -> bytes:
    """The same for a file that somebody else made, such as an orchestrator: links are followed to it.

    Raises:
        ConfigError: it cannot be read, is no file, belongs to somebody else, or others may read it.
    """
    return _read(path, 0, 0o077, "others may read or write")


def read_public(path: Path) -> bytes:
    """What a file holds that anybody may read and nobody else may write; links are followed.

    Raises:
        ConfigError: it cannot be read, is no file, belongs to somebody else, or others may write it.
    """
    return _read(path, 0, 0o022, "others may write")


def write_atomically(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Replaces a file: after a crash it holds what it did before, or all of ``content``.

    Raises:
        OSError: it cannot be written; the file is what it was.
    """
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_directory(path.parent)


def remove_unfinished(directory: Path) -> None:
    """Removes what `write_atomically` left behind when its process was killed. Nobody may be writing there."""
    for path in directory.glob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Removes a file that may not be there, for good.

    Raises:
        OSError: it cannot be removed.
    """
    path.unlink(missing_ok=True)
    _sync_directory(path.parent)


def lock_directory(directory: Path, name: str, timeout: float = 5.0) -> IO[bytes]:
    """Keeps other control planes out of a data directory until the returned file is closed or the process ends.

    Args:
        directory: the data directory.
        name: of the lock's file.
        timeout: seconds to wait for a process that still has it.

    Raises:
        ConfigError: another process has it, or the lock cannot be made.
    """
    path = directory / name
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"{path} cannot be used: {error.strerror}") from None
    lock = os.fdopen(descriptor, "r+b")
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                lock.close()
                raise ConfigError(
                    f"data directory {directory} is in use by another control plane; stop it, or name another one"
                ) from None
            time.sleep(0.02)
        else:
            return lock


def _read(path: Path, flags: int, forbidden: int, words: str) -> bytes:
    try:
        # Opening a pipe would wait for a writer without O_NONBLOCK.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)
    except OSError as error:
        if path.is_symlink():
            raise ConfigError(f"{path} is a link: a secret has to be a file of its own") from None
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{path} is not a file")
        _check_owner(path, found)
        if found.st_mode & forbidden:
            raise ConfigError(f"{words} {path}: chmod {'600' if forbidden == 0o077 else '644'} {path}")
        content = os.read(descriptor, MAX_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_BYTES} bytes")
    return content


def _check_owner(path: Path, found: os.stat_result) -> None:
    # Root can replace whatever it likes anyway.
    if found.st_uid not in (os.geteuid(), 0):
        raise ConfigError(f"{path} belongs to user {found.st_uid}, who could replace it: chown it to this user")


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
