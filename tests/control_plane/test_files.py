"""Files that hold secrets."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from control_plane import files
from mesh_client.core.errors import ConfigError


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "a.key"
    path.write_bytes(b"secret")
    path.chmod(0o600)
    return path


def linked(path: Path) -> Path:
    link = path.with_name("link.key")
    link.symlink_to(path)
    return link


def piped(path: Path) -> Path:
    pipe = path.with_name("pipe.key")
    os.mkfifo(pipe, 0o600)
    return pipe


def opened(mode: int) -> Callable[[Path], Path]:
    def change(path: Path) -> Path:
        path.chmod(mode)
        return path

    return change


def grown(path: Path) -> Path:
    path.write_bytes(b"x" * (files.MAX_BYTES + 1))
    return path


def test_a_secret_is_read(key: Path) -> None:
    assert files.read_secret(key) == b"secret"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (opened(0o640), "others may read or write .*chmod 600"),
        (opened(0o604), "others may read"),
        (opened(0o620), "others may read"),
        (linked, "is a link"),
        (piped, "is not a file"),
        (grown, "is larger than"),
        (lambda path: path.parent, "is not a file"),
        (lambda path: path.with_name("missing.key"), "cannot be read: No such file"),
    ],
)
def test_a_secret_that_is_not_safe_is_refused(key: Path, change: Callable[[Path], Path], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        files.read_secret(change(key))


def test_a_public_file_may_be_read_by_others_but_not_written(key: Path) -> None:
    key.chmod(0o644)
    assert files.read_public(key) == b"secret"
    assert files.read_public(linked(key)) == b"secret"
    key.chmod(0o664)
    with pytest.raises(ConfigError, match="others may write .*chmod 644"):
        files.read_public(key)


def test_files_of_other_users_are_refused(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chown(key, 4711, -1) if os.geteuid() == 0 else monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(ConfigError, match="belongs to user"):
        files.read_secret(key)


def test_a_directory_for_secrets_is_made_and_checked(tmp_path: Path) -> None:
    made = tmp_path / "data" / "ca"
    files.secret_directory(made)
    assert made.stat().st_mode & 0o777 == 0o700
    files.secret_directory(made)
    made.chmod(0o750)
    with pytest.raises(ConfigError, match="chmod 700"):
        files.secret_directory(made)
    made.chmod(0o700)
    link = tmp_path / "link"
    link.symlink_to(made)
    with pytest.raises(ConfigError, match="is a link"):
        files.secret_directory(link)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        files.secret_directory(tmp_path / "file")


def test_a_data_directory_may_be_looked_into_but_not_written_by_others(tmp_path: Path) -> None:
    made = tmp_path / "data"
    files.data_directory(made)
    made.chmod(0o755)
    files.data_directory(made)
    made.chmod(0o775)
    with pytest.raises(ConfigError, match="others may write"):
        files.data_directory(made)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        files.data_directory(tmp_path / "file" / "data")


def test_a_file_is_replaced_whole(key: Path) -> None:
    files.write_atomically(key, b"other")
    assert key.read_bytes() == b"other"
    assert key.stat().st_mode & 0o777 == 0o600
    files.write_atomically(key, b"public", 0o644)
    assert key.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in key.parent.iterdir()] == ["a.key"]


def test_a_link_is_replaced_and_not_followed(key: Path) -> None:
    link = linked(key)
    files.write_atomically(link, b"other")
    assert not link.is_symlink()
    assert key.read_bytes() == b"secret"


def test_a_write_that_fails_leaves_what_was_there(key: Path, tmp_path: Path) -> None:
    (tmp_path / "directory" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        files.write_atomically(tmp_path / "directory", b"other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.key", "directory"]


def test_half_written_files_are_removed(key: Path) -> None:
    (key.parent / f"{files.TEMPORARY}0123").write_bytes(b"half")
    files.remove_unfinished(key.parent)
    assert [path.name for path in key.parent.iterdir()] == ["a.key"]
    files.remove(key)
    files.remove(key)
    assert not key.exists()


def test_one_control_plane_at_a_time_has_a_data_directory(tmp_path: Path) -> None:
    lock = files.lock_directory(tmp_path, "identity.lock")
    with pytest.raises(ConfigError, match="in use by another control plane"):
        files.lock_directory(tmp_path, "identity.lock", timeout=0.05)
    lock.close()
    files.lock_directory(tmp_path, "identity.lock").close()


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "identity.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="cannot be used"):
        files.lock_directory(tmp_path, "identity.lock")
    assert not (tmp_path / "elsewhere").exists()
