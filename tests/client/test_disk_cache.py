"""The last snapshot on disk."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mesh_client.core.model import Endpoint
from mesh_client.core.policy import ServicePolicy
from mesh_client.core.store import EndpointsResource, PolicyResource
from mesh_client.disk_cache import DiskCache, default_directory

ACTIVE = (
    PolicyResource("orders", "p1", ServicePolicy(service="orders", timeout=2.0)),
    EndpointsResource("orders", "e1", (Endpoint("a", "127.0.0.1", 1, metadata={"version": "v1"}),)),
)


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache.for_control_planes(tmp_path / "new", ["127.0.0.1:1"], "orders")


def test_what_was_saved_is_loaded(cache: DiskCache) -> None:
    assert cache.load() == ([], [])
    assert cache.save([ACTIVE])
    assert cache.load() == ([ACTIVE[0]], [ACTIVE[1]])
    assert cache.path.stat().st_mode & 0o077 == 0
    assert cache.path.parent.stat().st_mode & 0o077 == 0
    assert [path.name for path in cache.path.parent.iterdir()] == [cache.path.name]


def test_another_mesh_and_another_service_have_other_files(tmp_path: Path) -> None:
    paths = {
        DiskCache.for_control_planes(tmp_path, planes, service).path
        for planes, service in [(["a:1"], "orders"), (["b:1"], "orders"), (["a:1"], ""), (["a:1", "b:1"], "orders")]
    }
    assert len(paths) == 4
    same = [DiskCache.for_control_planes(tmp_path, planes, "x").path for planes in (["a:1", "b:1"], ["b:1", "a:1"])]
    assert same[0] == same[1]


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_write_is_not_believed(
    cache: DiskCache, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    cache.save([ACTIVE])
    cache.path.chmod(mode)
    assert cache.load() == ([], [])
    assert "others can write it, so it is not believed" in caplog.text
    assert cache.save([ACTIVE])
    assert cache.load() == ([ACTIVE[0]], [ACTIVE[1]])


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: b"something else entirely",
        lambda raw: raw[:-1],
        lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
        lambda raw: raw[:30],
    ],
    ids=["empty", "foreign", "cut off", "one bit", "only a head"],
)
def test_a_damaged_file_is_set_aside_and_told_of(
    cache: DiskCache, caplog: pytest.LogCaptureFixture, damage: object
) -> None:
    cache.save([ACTIVE])
    assert callable(damage)
    cache.path.write_bytes(damage(cache.path.read_bytes()))
    assert cache.load() == ([], [])
    assert "damaged and set aside" in caplog.text
    assert not cache.path.exists()
    assert cache.path.with_suffix(".damaged").exists()
    assert cache.save([ACTIVE])


def test_a_file_that_is_far_too_large_is_not_read(
    cache: DiskCache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.save([ACTIVE])
    monkeypatch.setattr("mesh_client.checked_file.MAX_BYTES", 10)
    assert cache.load() == ([], [])
    assert "at most 10 bytes" in caplog.text


def test_trouble_with_the_disk_is_told_once_and_never_raised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    cache = DiskCache(blocked / "snapshot")
    with caplog.at_level(logging.WARNING):
        assert cache.load() == ([], [])
        assert not cache.save([ACTIVE])
        assert not cache.save([ACTIVE])
    assert len(caplog.records) == 1
    assert "going on without" in caplog.text


def test_a_directory_in_place_of_the_file_leaves_nothing_behind(cache: DiskCache) -> None:
    cache.path.mkdir(parents=True)
    (cache.path / "full").touch()
    assert not cache.save([ACTIVE])
    assert [path.name for path in cache.path.parent.iterdir()] == [cache.path.name]


def test_a_damaged_file_that_cannot_be_moved_is_left(cache: DiskCache, caplog: pytest.LogCaptureFixture) -> None:
    cache.path.parent.mkdir()
    cache.path.write_bytes(b"damaged")
    aside = cache.path.with_suffix(".damaged")
    aside.mkdir()
    (aside / "full").touch()
    assert cache.load() == ([], [])
    assert "cannot set aside" in caplog.text


def test_the_default_directory_follows_the_desktop_convention(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "grpc-mesh"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_directory() == tmp_path / ".cache" / "grpc-mesh"
