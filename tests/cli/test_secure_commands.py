"""The command with an operator's credentials, against real control planes with identity on."""

from __future__ import annotations

import asyncio
import json
import shutil
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from typer.testing import Result

from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from mesh_cli.credentials import OperatorCredentials
from tests.certificates import TestAuthority
from tests.cli.conftest import Run
from tests.security.mint import Mint

Mesh = Callable[..., Awaitable[Result]]


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[ControlPlane]:
    plane = ControlPlane(ControlPlaneOptions(**options))
    await plane.start()
    try:
        yield plane
    finally:
        await plane.stop(0.1)


@pytest.fixture
def secure(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mesh:
    """Runs the command in a thread, so that control planes in this loop can answer it."""
    monkeypatch.delenv("MESH_INSECURE")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    async def invoke(*arguments: str, code: int = 0) -> Result:
        result = await asyncio.to_thread(run, *arguments)
        assert result.exit_code == code, result.stderr
        return result

    return invoke


def words(result: Result) -> str:
    """What it wrote to standard error; usage errors are boxed."""
    return " ".join(result.stderr.replace("│", " ").split())


async def test_an_operator_does_everything_from_the_first_credentials_to_a_rotation(
    secure: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, files = tmp_path / "state", tmp_path / "config" / "grpc-mesh" / "operator"
    async with running(data_dir=state) as plane:
        monkeypatch.setenv("MESH_CONTROL_PLANE", plane.address)
        missing = await secure("status", code=1)
        assert "no operator's credentials in" in missing.stderr
        assert "`mesh operator create NAME`" in missing.stderr
        made = await secure("operator", "create", "alice", "--data-dir", str(state))
        assert made.stdout.startswith("spiffe://mesh.internal/operator/alice until 20")
        assert stat.S_IMODE((files / "operator.key").stat().st_mode) == 0o600
        assert stat.S_IMODE(files.stat().st_mode) == 0o700
        shown = json.loads((await secure("status", "--json")).stdout)
        assert shown["control_plane"] == plane._options.control_plane_id
        token = (await secure("token", "create", "--service", "orders")).stdout
        assert token.startswith("mesh1.")
        (listed,) = json.loads((await secure("token", "list", "--json")).stdout)["tokens"]
        assert (listed["service"], listed["uses_left"]) == ("orders", 1)
        assert listed["created_by"] == "spiffe://mesh.internal/operator/alice"
        await secure("token", "revoke", listed["id"])
        assert (await secure("token", "list")).stdout == "There are no join tokens.\n"
        before = OperatorCredentials.load(files)
        for step in ("add", "overlap", "retire"):
            await secure("ca", "rotate", step)
        after = OperatorCredentials.load(files)
        assert not set(before.bundle.roots) & set(after.bundle.roots)
        assert after.credential.serial != before.credential.serial
        assert plane.authority is not None
        assert (await secure("ca", "roots")).stdout.encode() == plane.authority.roots_pem
        (root,) = json.loads((await secure("ca", "roots", "--json")).stdout)["roots"]
        assert root["pem"].encode() == plane.authority.roots_pem
        refused = await secure("ca", "rotate", "overlap", code=1)
        assert "mesh: " in refused.stderr
        denied = await secure("ca", "revoke", "--workload", after.credential.workload_id)
        assert after.credential.workload_id in denied.stdout
        revoked = await secure("status", code=1)
        assert "the workload has been revoked" in revoked.stderr


async def test_operators_can_be_made_elsewhere_and_as_json_and_are_told_when_they_end(
    secure: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(data_dir=tmp_path / "state") as plane:
        directory = tmp_path / "bob"
        create = ("operator", "create", "bob", "--data-dir", str(tmp_path / "state"), "--directory", str(directory))
        assert f"MESH_OPERATOR={directory}" in (await secure(*create)).stdout
        made = json.loads((await secure(*create, "--lifetime", "1h", "--json")).stdout)
        assert (made["spiffe_id"], made["directory"]) == ("spiffe://mesh.internal/operator/bob", str(directory))
        use = ("status", "--control-plane", plane.address, "--operator", str(directory))
        assert (await secure(*use)).stderr == ""
        monkeypatch.setattr("mesh_cli.options._EXPIRES_SOON", -1.0)
        assert "mesh: your operator's certificate ends in 59m" in (await secure(*use)).stderr


async def test_an_operator_cannot_be_made_where_there_is_no_authority(secure: Mesh, tmp_path: Path) -> None:
    create = ("operator", "create", "alice", "--data-dir", str(tmp_path / "nothing"))
    assert "start the control plane first" in (await secure(*create, code=1)).stderr
    assert "operator" in words(await secure("operator", "create", "No Name", code=2))
    file = tmp_path / "file"
    file.touch()
    assert "all three or none" in (await secure("operator", "create", "alice", "--ca-key", str(file), code=1)).stderr


async def test_an_intermediate_that_is_given_as_files_makes_control_planes_and_operators(
    secure: Mesh, tmp_path: Path
) -> None:
    given = Mint(tmp_path / "ca").options()
    options = ["--ca-certificate", str(given.ca_certificate), "--ca-key", str(given.ca_key)]
    options += ["--ca-roots", str(given.ca_roots)]
    async with running(identity=given) as plane:
        await secure("operator", "create", "alice", *options)
        shown = await secure("ca", "status", "--json", "--control-plane", plane.address)
        assert "intermediate" in json.loads(shown.stdout)["issuer"]


async def test_credentials_that_are_of_no_use_are_refused_before_anybody_is_asked(secure: Mesh, tmp_path: Path) -> None:
    async with running(data_dir=tmp_path / "state"):
        directory = tmp_path / "alice"
        create = ("operator", "create", "alice", "--data-dir", str(tmp_path / "state"), "--directory", str(directory))
        await secure(*create)
    status = ("status", "--control-plane", "127.0.0.1:1", "--operator", str(directory))
    key, chain = directory / "operator.key", directory / "operator.pem"

    key.chmod(0o640)
    assert "others may read or write" in (await secure(*status, code=1)).stderr
    key.chmod(0o600)

    good = chain.read_bytes()
    for content, said in (
        (b"nothing", "of no use"),
        (TestAuthority().operator("alice").chain, "another key"),
        (TestAuthority().service("orders").chain, "not for an operator"),
        (TestAuthority().issue(OperatorCredentials.load(directory).credential.principal, uris=()).chain, "nobody"),
    ):
        chain.write_bytes(content)
        assert said in (await secure(*status, code=1)).stderr
    chain.write_bytes(good)

    roots = directory / "roots.pem"
    good_roots = roots.read_bytes()
    roots.write_bytes(TestAuthority().roots)
    assert "leads up to none of the roots" in (await secure(*status, code=1)).stderr
    roots.write_bytes(good_roots)

    expired = TestAuthority()
    old = expired.issue(OperatorCredentials.load(directory).credential.principal, starts=-7200.0, ends=-3600.0)
    for path, content in ((key, old.key), (chain, old.chain), (roots, expired.roots)):
        path.write_bytes(content)
    said = (await secure(*status, code=1)).stderr
    assert "has expired; make a new one with `mesh operator create alice`" in said
    assert "PRIVATE" not in said


async def test_what_does_not_fit_together_is_said_in_words(secure: Mesh, tmp_path: Path) -> None:
    directory = tmp_path / "alice"
    async with running(data_dir=tmp_path / "state") as plane:
        create = ("operator", "create", "alice", "--data-dir", str(tmp_path / "state"), "--directory", str(directory))
        await secure(*create)
        plaintext = await secure("status", "--insecure", "--control-plane", plane.address, code=1)
        assert "does not answer in plaintext" in plaintext.stderr
        assert "without --insecure" in plaintext.stderr
    operator = ("--operator", str(directory))
    async with running(insecure=True) as open_plane:
        tls = await secure("status", *operator, "--control-plane", open_plane.address, code=1)
        assert "does not speak TLS" in tls.stderr
        tokens = await secure("token", "list", "--insecure", "--control-plane", open_plane.address, code=1)
        assert "--insecure" in tokens.stderr
    async with running(data_dir=tmp_path / "other") as other:
        wrong = await secure("status", *operator, "--control-plane", other.address, code=1)
        assert "is not one of the mesh that" in wrong.stderr
    nobody = await secure("status", *operator, "--control-plane", "127.0.0.1:1", code=1)
    assert "is it running?" in nobody.stderr


async def test_credentials_that_cannot_follow_a_rotation_do_not_fail_the_command(
    secure: Mesh, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "alice"
    async with running(data_dir=tmp_path / "state") as plane:
        create = ("operator", "create", "alice", "--data-dir", str(tmp_path / "state"), "--directory", str(directory))
        await secure(*create)
        options = ("--operator", str(directory), "--control-plane", plane.address)
        gone = tmp_path / "gone"

        def vanish(*arguments: object) -> None:
            shutil.move(directory, gone)

        assert plane.authority is not None
        plane.authority.on_change(vanish)
        await secure("ca", "rotate", "add", *options)
        assert "do not follow the rotation" in caplog.text


async def test_every_certificate_that_the_authority_signs_by_itself_is_recorded(
    secure: Mesh, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def recorded() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "control_plane.identity.audit"]

    caplog.set_level("INFO", logger="control_plane.identity.audit")
    state, alice = tmp_path / "state", tmp_path / "alice"
    async with running(data_dir=state) as plane:
        assert plane.authority is not None
        root, issuer, own = recorded()
        assert root.startswith("issued authority='CN=mesh root ")
        assert issuer.startswith("issued authority='CN=mesh issuer ")
        assert own.startswith("issued principal=spiffe://mesh.internal/mesh/control-plane workload=")
        caplog.clear()

        create = ("operator", "create", "alice", "--data-dir", str(state), "--directory", str(alice), "--log-format")
        (line,) = [each for each in (await secure(*create, "json")).stderr.splitlines() if "identity.audit" in each]
        said = json.loads(line)
        chain = x509.load_pem_x509_certificate((alice / "operator.pem").read_bytes())
        assert (said["level"], said["logger"]) == ("info", "control_plane.identity.audit")
        assert said["message"].startswith("issued principal=spiffe://mesh.internal/operator/alice workload=")
        assert f"serial={chain.serial_number:x} expires=20" in said["message"]
        assert said["message"].endswith("attested_by='operator' peer=local")

        # In the control plane's log too, which is where somebody looks for it later. Once.
        caplog.clear()
        await plane.authority.maintain()
        await plane.authority.maintain()
        assert recorded() == [said["message"]]
    # Also one that was made while it did not run.
    await secure(*create[:3], "--data-dir", str(state), "--directory", str(tmp_path / "again"))
    caplog.clear()
    async with running(data_dir=state):
        own, other = recorded()
        assert own.startswith("issued principal=spiffe://mesh.internal/mesh/control-plane ")
        assert other.startswith("issued principal=spiffe://mesh.internal/operator/alice ")


async def test_a_variable_alone_makes_nothing_plaintext_that_has_an_identity(
    secure: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    async with running(data_dir=state) as plane:
        monkeypatch.setenv("MESH_CONTROL_PLANE", plane.address)
        made = await secure("operator", "create", "alice", "--data-dir", str(state))
        assert made.exit_code == 0
    operator = str(tmp_path / "config" / "grpc-mesh" / "operator")
    monkeypatch.setenv("MESH_INSECURE", "1")
    start = ("control-plane", "--listen", "127.0.0.1:0", "--data-dir", str(state))
    refused = words(await secure(*start, code=2))
    assert "MESH_INSECURE asks for plaintext, but" in refused
    assert "holds a certificate authority" in refused
    assert "give --insecure if plaintext is meant" in refused

    async with running(insecure=True) as plain:
        monkeypatch.setenv("MESH_CONTROL_PLANE", plain.address)
        assert "names credentials" in words(await secure("status", "--operator", operator, code=2))
        await secure("status", "--operator", operator, "--insecure")
        await secure("status")
        monkeypatch.setenv("MESH_OPERATOR", operator)
        assert "names credentials" in words(await secure("status", code=2))
        await secure("status", "--insecure")
    monkeypatch.delenv("MESH_OPERATOR")
    gateway = ("gateway", "run", "kong", "--protos", str(tmp_path), str(tmp_path / "api.binpb"))
    (tmp_path / "api.binpb").touch()
    monkeypatch.setenv("MESH_IDENTITY_DIR", str(tmp_path / "identity"))
    assert "MESH_IDENTITY_DIR names an identity" in words(await secure(*gateway, code=2))
