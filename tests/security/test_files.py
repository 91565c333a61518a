"""Files of others, links, and files that others can read: refused before anything is opened, and left as they are."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

import mesh_client
from control_plane.identity.options import IdentityOptions
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from mesh_cli.credentials import OperatorCredentials
from mesh_client.core.errors import ConfigError
from tests.security.mint import Mint
from tests.security.world import Log, World, until


async def started(directory: Path, identity: IdentityOptions | None = None) -> None:
    """Starts a control plane with these files, and stops it."""
    plane = ControlPlane(ControlPlaneOptions(data_dir=directory, identity=identity or IdentityOptions()))
    await plane.start()
    await plane.stop(0)


def readable(path: Path) -> None:
    """By the group."""
    path.chmod(path.stat().st_mode | stat.S_IRGRP)


def writable(path: Path) -> None:
    """By everybody."""
    path.chmod(path.stat().st_mode | stat.S_IWOTH)


def linked(path: Path) -> None:
    """The same, somewhere else."""
    elsewhere = path.rename(path.with_name(f"{path.name}.elsewhere"))
    path.symlink_to(elsewhere)


def gone(path: Path) -> None:
    """A link that leads to where the attacker wants a secret written."""
    path.rename(path.with_name(f"{path.name}.elsewhere"))
    path.symlink_to(path.with_name("nowhere"))


def a_pipe(path: Path) -> None:
    """Reading it would wait for ever."""
    path.unlink()
    os.mkfifo(path, 0o600)


ATTACKS: list[tuple[str, Callable[[Path], None], str]] = [
    ("ca/root-*.key", readable, "others may read or write"),
    ("ca/root-*.key", linked, "is a link"),
    ("ca/issuer-*.key", readable, "others may read or write"),
    ("ca/issuer-*.key", linked, "is a link"),
    ("ca/issuer-*.key", a_pipe, "is not a file"),
    ("ca/tokens.key", readable, "others may read or write"),
    ("ca/tokens.key", linked, "is a link"),
    ("ca/tokens.key", gone, "is a link"),
    ("ca/authority.json", linked, "is a link"),
    ("identity.sqlite", readable, "others may read or write"),
    ("identity.sqlite", linked, "is not a file of this user"),
    ("identity.lock", linked, "cannot be used"),
    ("registry.sqlite", writable, "others may write"),
    ("ca", readable, "others may enter"),
    ("ca", linked, "is a link"),
    ("ca/roots.pem", writable, "others may write"),
    (".", writable, "others may write in"),
]


@pytest.mark.parametrize(("name", "attack", "words"), ATTACKS, ids=lambda value: getattr(value, "__name__", None))
async def test_a_control_plane_does_not_start_on_files_that_are_not_its_own(
    name: str, attack: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    directory = tmp_path / "data"
    await started(directory)
    (path,) = directory.glob(name) if name != "." else [directory]
    attack(path)
    mode = path.lstat().st_mode
    with pytest.raises(ConfigError, match=words) as caught:
        await started(directory)
    assert path.name in str(caught.value)
    assert path.lstat().st_mode == mode  # refused, not mended: whoever could read it has it
    assert not (directory / "ca" / "nowhere").exists()


async def test_damage_to_the_registry_does_not_open_what_policies_close(log: Log, tmp_path: Path) -> None:
    rules = b"service: orders\nauthorization: [{callers: [gateway], methods: ['*']}]\n"
    directory = tmp_path / "data"
    plane = ControlPlane(ControlPlaneOptions(data_dir=directory))
    await plane.start()
    await plane._publisher.opened.wait()
    await plane._policies.put("orders", rules, None)
    await until(lambda: plane._book.policy("orders")[0].authorization)
    await plane.stop(0)
    (directory / "registry.sqlite").write_bytes(b"not a database any more")
    for path in (directory / "registry.sqlite-wal", directory / "registry.sqlite-shm"):
        path.unlink(missing_ok=True)
    for _ in range(2):
        plane = ControlPlane(ControlPlaneOptions(data_dir=directory))
        await plane.start()
        await plane._publisher.opened.wait()
        (rule,) = plane._book.policy("orders")[0].authorization
        assert rule.callers == ("gateway",)
        await plane.stop(0)
    assert "registry.sqlite is damaged" in log.control_plane
    assert "those that were good before are stored again (orders)" in log.control_plane


async def test_what_a_control_plane_writes_is_for_its_user_alone(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        await started(tmp_path / "data")
    finally:
        os.umask(mask)
    modes = {path.relative_to(tmp_path): path.stat().st_mode & 0o777 for path in (tmp_path / "data").rglob("*")}
    public = {Path("data/ca/roots.pem"): 0o644}
    assert {path: mode for path, mode in modes.items() if mode & 0o077 and path.name != "registry.lock"} == public


@pytest.mark.parametrize("attack", [readable, linked, a_pipe], ids=lambda attack: attack.__name__)
async def test_the_key_of_an_intermediate_is_for_the_control_plane_alone(
    attack: Callable[[Path], None], log: Log, tmp_path: Path
) -> None:
    mint = Mint(tmp_path / "files")
    log.keep_out((tmp_path / "files" / "ca.key").read_bytes())
    attack(tmp_path / "files" / "ca.key")
    with pytest.raises(ConfigError, match="others may read or write|is a link|is not a file"):
        await started(tmp_path / "data", identity=mint.options())


@pytest.mark.parametrize(
    ("name", "attack", "words"),
    [
        ("operator.key", readable, "others may read or write"),
        ("operator.key", linked, "is a link"),
        ("operator.key", a_pipe, "is not a file"),
        ("operator.pem", writable, "others may write"),
        ("roots.pem", writable, "others may write"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_credentials_of_an_operator_that_others_can_use_are_refused(
    name: str, attack: Callable[[Path], None], words: str, world: World
) -> None:
    files = await world.authority.create_operator("alice", world.directory / "alice")
    world.log.keep_out(files.key.read_bytes())
    assert OperatorCredentials.load(files.key.parent).credential.principal.name == "alice"
    attack(files.key.parent / name)
    with pytest.raises(ConfigError, match=words):
        OperatorCredentials.load(files.key.parent)


async def test_an_operator_s_credentials_are_not_written_where_others_can_look(world: World) -> None:
    shared = world.directory / "shared"
    shared.mkdir(0o755)
    with pytest.raises(ConfigError, match="others may enter"):
        await world.authority.create_operator("alice", shared)
    assert list(shared.iterdir()) == []


@pytest.mark.parametrize("attack", [readable, writable], ids=lambda attack: attack.__name__)
async def test_a_token_that_others_can_read_is_not_used(attack: Callable[[Path], None], world: World) -> None:
    path = world.directory / "token"
    path.touch(0o600)
    path.write_text(await world.token("orders"))
    attack(path)
    with pytest.raises(ConfigError, match="can be read or written by others; chmod 600 it, and make a new secret"):
        async with world.client("orders", token_file=path):
            pass
    assert (await world.authority.tokens())[0].uses_left == 1


@pytest.mark.parametrize(
    ("name", "attack"), [(".", readable), ("identity.json", readable), ("identity.json", writable)]
)
async def test_an_identity_that_others_can_read_is_not_used(
    name: str, attack: Callable[[Path], None], world: World
) -> None:
    directory = world.directory / "identity"
    token = await world.token("orders")
    async with world.client("orders", token=token, identity_dir=directory) as mesh:
        await mesh.transport.ready()
    assert {path.stat().st_mode & 0o077 for path in [directory, *directory.iterdir()]} == {0}
    world.log.keep_out((directory / "identity.json").read_text().replace("\\n", "\n"))
    attack(directory / name)
    with pytest.raises(ConfigError, match="can be read or written by others"):
        async with world.client("orders", identity_dir=directory):
            pass


async def test_a_lock_that_leads_elsewhere_writes_nothing_there(world: World) -> None:
    directory, victim = world.directory / "identity", world.directory / "victim"
    directory.mkdir(0o700)
    (directory / "lock").symlink_to(victim)
    with pytest.raises(ConfigError, match="cannot be used"):
        async with world.client("orders", token=await world.token(), identity_dir=directory):
            pass
    assert not victim.exists()


async def test_roots_that_others_can_write_are_not_trusted(world: World) -> None:
    path = world.directory / "roots.pem"
    path.write_bytes(world.mint.roots)
    for mode in (0o646, 0o664):
        path.chmod(mode)
        with pytest.raises(ConfigError, match="can be written by"):
            mesh_client.connect(
                world.plane.address, service="orders", token=await world.token(), trust_roots=path, insecure=False
            )


def foreign(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's, as far as this process can make it so."""
    if os.geteuid() == 0:
        os.chown(path, 4711, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4711)


@pytest.mark.parametrize("which", ["the file", "its directory", "the directory of a link to it"])
@pytest.mark.parametrize("how", ["foreign", "writable"])
async def test_roots_that_another_user_can_exchange_are_not_trusted(
    world: World, monkeypatch: pytest.MonkeyPatch, which: str, how: str
) -> None:
    kept, links = world.directory / "kept", world.directory / "links"
    kept.mkdir(0o755)
    links.mkdir(0o755)
    path = links / "roots.pem"
    (kept / "roots.pem").write_bytes(world.mint.roots)
    (kept / "roots.pem").chmod(0o644)
    path.symlink_to(kept / "roots.pem")
    async with world.client("orders", trust_roots=path) as mesh:
        await mesh.transport.ready()
    attacked = {"the file": kept / "roots.pem", "its directory": kept}.get(which, links)
    if how == "foreign":
        foreign(attacked, monkeypatch)
    else:
        attacked.chmod(0o777)
    token = await world.token()
    with pytest.raises(
        ConfigError, match="belongs to another user" if how == "foreign" else "can be written by others"
    ):
        mesh_client.connect(world.plane.address, service="orders", token=token, trust_roots=path, insecure=False)


async def test_roots_in_a_directory_for_everybody_are_trusted_where_nobody_replaces_what_is_another_s(
    world: World,
) -> None:
    path = world.directory / "tmp" / "roots.pem"
    path.parent.mkdir()
    path.parent.chmod(0o1777)
    path.write_bytes(world.mint.roots)
    path.chmod(0o644)
    async with world.client("orders", trust_roots=path) as mesh:
        await mesh.transport.ready()


async def test_an_identity_that_is_another_user_s_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = world.directory / "identity"
    directory.mkdir(0o700)
    foreign(directory, monkeypatch)
    with pytest.raises(ConfigError, match="belongs to another user"):
        async with world.client("orders", token=await world.token(), identity_dir=directory):
            pass
