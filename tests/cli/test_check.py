"""`mesh check` as it is written, and against real control planes, a real Consul with ACLs and this host."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from mesh.v1 import admin_pb2

import mesh_client
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from mesh_cli.check import gather
from mesh_cli.check.command import _to_json, check_all, render
from mesh_cli.check.facts import PlaneFacts
from tests.cli import samples
from tests.cli.conftest import Run
from tests.cli.scripted import Refusal, ScriptedAdmin
from tests.cli.test_check_rules import a_consul, a_diagnosis, a_host, a_plane, facts
from tests.integration.consul_cluster import ConsulCluster
from tests.integration.system import READER

Check = Callable[..., Awaitable[Any]]


def test_findings_are_written_by_group_with_what_to_do(golden: Callable[[str, str], None]) -> None:
    consul = a_consul()
    consul.rights[1].granted = False
    troubled = facts(
        a_plane(status=samples.troubled_status(), diagnosis=a_diagnosis(consul=consul, open_files_limit=1024)),
        PlaneFacts("10.0.0.3:7070", problem="cannot reach the control plane at 10.0.0.3:7070 (refused)"),
        host=a_host(environment={"MESH_TOKEN_FLIE": "x"}),
    )
    golden("check.txt", "\n".join(line.plain for line in render(check_all(troubled))))
    golden("check.json", json.dumps(_to_json(check_all(troubled)), indent=2))
    golden("check_well.txt", "\n".join(line.plain for line in render(check_all(facts()))))


@pytest.fixture
def check(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Check:
    """Runs ``mesh check --json`` in a thread, so that control planes in this loop can answer; what it found."""
    for name in ("CONSUL_HTTP_TOKEN", "CONSUL_HTTP_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "none"))

    async def invoke(*arguments: str, code: int | None = 0) -> dict[str, list[str]]:
        result = await asyncio.to_thread(run, "check", "--json", *arguments)
        assert code in (None, result.exit_code), result.stdout + result.stderr
        found: dict[str, list[str]] = {"pass": [], "warn": [], "fail": [], "skip": []}
        document = json.loads(result.stdout)
        for each in document["checks"]:
            found[each["outcome"]].append(f"{each['group']}, {each['name']}: {each['detail']}")
        assert document["failures"] == len(found["fail"])
        return found

    return invoke


@asynccontextmanager
async def running(*, patience: float = 30.0, **options: Any) -> AsyncIterator[ControlPlane]:
    """A control plane that has read its registry, or has had time to."""
    plane = ControlPlane(ControlPlaneOptions(**{"max_streams": 100, **options}))
    await plane.start()
    try:
        with contextlib.suppress(TimeoutError):  # it cannot read Consul, which is the test
            async with asyncio.timeout(patience):
                await plane._publisher.opened.wait()
        yield plane
    finally:
        await plane.stop(0.1)


def limits_aside(found: list[str]) -> list[str]:
    """Without what depends on the limits of whoever runs the test."""
    return [each for each in found if "open files" not in each]


async def test_a_secure_mesh_is_checked_and_what_is_broken_is_found(
    check: Check, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MESH_INSECURE")
    missing = await check("--control-plane", "127.0.0.1:1", code=1)
    assert [each.split(":")[0] for each in missing["fail"]] == ["identity, operator"]
    async with running(data_dir=tmp_path / "state") as plane:
        state = ("--data-dir", str(tmp_path / "state"), "--control-plane", plane.address)
        assert run("operator", "create", "alice", *state[:2]).exit_code == 0
        token = (await plane.authority.create_token("orders", 600.0, 1, "test")).text  # type: ignore[union-attr]  # it is secure
        server = mesh_client.server(
            "orders", control_plane=plane.address, enrolment=plane.enrolment_address, token=token, insecure=False
        )
        await server.start()
        await server.registered()
        well = await check(*state)
        assert (limits_aside(well["warn"]), well["fail"], well["skip"]) == ([], [], [])
        assert any("workloads: 1 connected" in each for each in well["pass"])
        assert any("the control plane's tokens.key" in each or "access to" in each for each in well["pass"])

        (key,) = (tmp_path / "state" / "ca").glob("root-*.key")
        key.chmod(0o644)
        operator = tmp_path / "config" / "grpc-mesh" / "operator"
        operator.chmod(0o755)
        broken = await check(*state, "--control-plane", f"{plane.address},127.0.0.1:1", code=1)
        assert len(broken["fail"]) == 3
        assert f"{key}, can be read by others (mode 0644)" in broken["fail"][0] + broken["fail"][1]
        assert "control planes, reachable: 127.0.0.1:1" in broken["fail"][2]
        await server.stop(0)
        key.chmod(0o600)
        operator.chmod(0o700)
        lonely = await check(*state)
        assert [each.partition(" (")[0] for each in limits_aside(lonely["warn"])] == [
            "services, endpoints: orders has no healthy endpoint"
        ]


async def test_a_mesh_in_plaintext_is_a_warning_and_so_a_failure_if_asked(check: Check) -> None:
    async with running(insecure=True) as plane:
        found = await check("--control-plane", plane.address)
        assert len([each for each in found["warn"] if "plaintext" in each]) == 2
        await check("--control-plane", plane.address, "--strict", code=1)


async def test_clients_that_lag_are_looked_at_twice(
    run: Run, admin: ScriptedAdmin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather, "PAUSE", 0.0)
    behind = samples.healthy_status()
    behind.clients[0].subscriptions[1].current_version = "b7de01a2c3f4e5d6"
    behind.trust_domain = ""
    admin.answers["GetStatus"] = behind
    shown = run("check", "--control-plane", admin.address)
    assert "has not acknowledged what is current of inventory" in shown.stdout
    assert sum(isinstance(request, admin_pb2.GetStatusRequest) for request in admin.requests) == 2


async def test_a_control_plane_of_an_older_version_is_checked_as_far_as_it_goes(run: Run, admin: ScriptedAdmin) -> None:
    unknown = Refusal(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
    admin.answers |= {"GetDiagnosis": unknown, "ListProcesses": unknown, "GetStatus": samples.quiet_status()}
    shown = run("check", "--control-plane", admin.address)
    assert shown.exit_code == 0
    assert "is of a version that cannot be diagnosed" in shown.stdout
    assert "1 could not be told" in shown.stdout
    admin.answers["GetDiagnosis"] = Refusal(grpc.StatusCode.PERMISSION_DENIED, "that takes an operator's identity")
    assert "takes an operator's identity" in run("check", "--control-plane", admin.address).stdout


@pytest.mark.timeout(120)
async def test_consul_is_asked_for_leader_clock_and_rights(check: Check, tmp_path: Path) -> None:
    async with ConsulCluster.three_with_acl(tmp_path) as consul:
        reader = await consul.make_token(READER)

        async def found(token: str, code: int | None = 0, **options: Any) -> dict[str, list[str]]:
            async with running(insecure=True, registry=consul.registry, consul_token=token, **options) as plane:
                result: dict[str, list[str]] = await check("--control-plane", plane.address, code=code)
                return result

        of_reader = await found(reader)
        assert [each.partition("lacks ")[2].partition(":")[0] for each in of_reader["warn"] if "lacks" in each] == [
            'key_prefix "mesh/policies/" { policy = "write" }',
            'key_prefix "mesh/edge-policies/" { policy = "write" }',
        ]
        assert not any("more than is needed" in each for each in of_reader["warn"])
        assert any("clocks: " in each for each in of_reader["pass"])

        of_nobody = await found("00000000-0000-0000-0000-000000000000", code=1, patience=2.0)
        assert any("does not accept the control plane's token" in each for each in of_nobody["fail"])

        of_manager = await found(consul.management_token)
        (too_much,) = [each for each in of_manager["warn"] if "more than is needed" in each]
        for what in ("make tokens", "change the cluster", "write every key", "register every service"):
            assert what in too_much

        consul.agents[2].kill()
        of_two = await found(reader, code=None)  # perhaps it was the leader
        (gone,) = [each for each in of_two["warn"] if "registry, consul" in each]
        assert consul.agents[2].address in gone


async def test_a_consul_that_asks_for_no_tokens_is_a_warning_and_one_that_is_gone_a_failure(
    check: Check, tmp_path: Path
) -> None:
    async with ConsulCluster.dev(tmp_path) as consul:
        async with running(insecure=True, registry=consul.registry) as plane:
            open_to_all = await check("--control-plane", plane.address)
            assert any("Consul asks for no tokens" in each for each in open_to_all["warn"])
            consul.agents[0].kill()
            gone = await check("--control-plane", plane.address, code=1)
            assert any(each.startswith("registry, consul: ") for each in gone["fail"])


# -- before the start


async def test_a_host_is_checked_before_the_start(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MESH_INSECURE")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        token = tmp_path / "token"
        token.write_text("mesh1.x.y")
        token.chmod(0o644)
        identity = tmp_path / "identity"
        identity.mkdir(mode=0o700)
        (identity / "identity.json").touch(0o600)
        monkeypatch.setenv("MESH_TOKEN_FILE", str(token))
        monkeypatch.setenv("MESH_IDENTITY_DIR", str(identity))
        (tmp_path / "secrets" / "nested").mkdir(parents=True)
        (tmp_path / "secrets" / "partner-key").touch(0o640)
        monkeypatch.setenv("MESH_SECRETS_DIR", str(tmp_path / "secrets"))
        monkeypatch.setenv("MESH_TRUST_ROOTS", str(tmp_path / "missing.pem"))
        monkeypatch.setenv("MESH_TOKEN", "mesh1.x.y")
        monkeypatch.setenv("MESH_CONTROL_PLANE", "no-such-host.invalid:7070")
        found = await check("--pre", "--listen", f"127.0.0.1:{port}", code=1)
    failed = "\n".join(found["fail"])
    assert "MESH_TOKEN and MESH_TOKEN_FILE are set" in failed
    assert "the join token, " in failed
    assert "the trust roots, " in failed
    assert "no-such-host.invalid has no address" in failed
    assert "the edge's secret partner-key, " in failed
    assert len(found["fail"]) == 5
    assert any(f"cannot listen on 127.0.0.1:{port}: it is taken" in each for each in found["warn"])
    assert "mesh1" not in json.dumps(found)


def test_a_wrong_address_to_listen_on_is_wrong_use(run: Run) -> None:
    assert run("check", "--pre", "--listen", "nonsense").exit_code == 2
    for listen in ("127.0.0.1:0", "127.0.0.1:65535"):
        assert "free where the data directory is" in run("check", "--pre", "--listen", listen).stdout


def test_ports_that_cannot_be_had_are_told_apart() -> None:
    assert gather._port_problem("203.0.113.1:7070") != ""
    assert gather._port_problem("[::1]:0") in ("", gather._port_problem("[::1]:0"))


def test_a_directory_that_cannot_be_made_has_no_room(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert gather._free(file / "below") is None
    assert (gather._free(tmp_path / "new" / "one") or 0) > 0


def test_a_file_that_cannot_be_looked_at_is_that(tmp_path: Path) -> None:
    assert gather._file(tmp_path / ("x" * 300), "the join token", 0o077).problem == "File name too long"


def test_a_package_that_is_missing_has_no_version() -> None:
    assert gather._version("no-such-package") is None
