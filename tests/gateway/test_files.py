"""Files of an edge are replaced whole, and its directories are its owner's alone; logs hold no secrets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gateway.files import private_directory, write_atomically
from gateway.redaction import MAX_WORDS, fit_for_logs
from mesh_client.core.errors import ConfigError


def test_a_file_is_replaced_whole_with_the_mode_that_was_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_atomically(file, b"one", 0o600)
    write_atomically(file, b"two")
    assert file.read_bytes() == b"two"
    assert file.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_cannot_be_replaced_is_what_it_was_and_nothing_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_atomically(tmp_path / "directory", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["directory"]


def test_a_private_directory_is_made_or_must_be_as_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private_directory(tmp_path / "a" / "b", "dir")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    private_directory(tmp_path / "a" / "b", "dir")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="dir: .*File exists"):
        private_directory(tmp_path / "file", "dir")
    (tmp_path / "a" / "b").chmod(0o750)
    with pytest.raises(ConfigError, match="chmod 700"):
        private_directory(tmp_path / "a" / "b", "dir")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    if os.getuid() != 0:  # root may own what anybody uses
        with pytest.raises(ConfigError, match="chown"):
            private_directory(tmp_path / "a" / "b", "dir")


def test_of_what_envoy_refuses_only_its_reason_is_told() -> None:
    said = 'update rejected: goo.gle/debugonly\\nkey: "sesame-open"\\n: Proto constraint validation failed (PortValue)'
    assert fit_for_logs(said) == "update rejected: : Proto constraint validation failed (PortValue)"
    assert fit_for_logs("goo.gle/debugproto secret") == ""
    assert fit_for_logs('bad key "sesame-open"', ["sesame-open", "x"]) == 'bad key "(secret)"'
    assert len(fit_for_logs("a" * 10_000)) < MAX_WORDS + 10
