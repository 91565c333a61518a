"""deploy/prepare.py and deploy/consul/bootstrap.py for real, and the mesh on the Consul that they make.

Everything but Consul runs as a container would have it: see `tests.deploy.confinement`.
"""

from __future__ import annotations

import asyncio
import re
import stat
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import grpc
import grpc.aio
import pytest
from shop.v1 import inventory_pb2
from shop.v1.inventory_pb2_grpc import InventoryServiceStub

import mesh_client
from deploy.consul.bootstrap import RefusedError, Server
from deploy.prepare import SERVICES
from mesh_cli.demo.supervisor import Supervisor
from tests.deploy.confinement import CONFINES
from tests.deploy.consul import DEPLOY
from tests.deploy.deployment import Containers, Deployment, deployed, prepare
from tests.integration.system import PATIENCE
from tests.ports import hold_ports

UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
PARTS = ("control-plane", "edge", *SERVICES)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("deployment")) as deployment:
        yield deployment


def may(server: Server, method: str, path: str, token: str, body: object = None) -> bool:
    try:
        server.ask(method, path, token, body)
    except RefusedError as error:
        if " 403 " not in str(error):
            raise
        return False
    return True


def test_secrets_are_their_owners_alone_and_in_no_output(deployment: Deployment) -> None:
    tokens = deployment.tokens()
    assert set(tokens) == {"management", *PARTS, "consul-1", "consul-2", "consul-3"}
    assert len(set(tokens.values())) == len(tokens)
    assert not UUID.search(deployment.first_output)
    files = [path for path in deployment.box.directory.rglob("*") if path.is_file() and "data" not in path.parts]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    directories = [path for path in deployment.box.directory.rglob("*") if path.is_dir()]
    assert {stat.S_IMODE(directory.stat().st_mode) for directory in directories} == {0o700}


def test_running_both_again_changes_nothing(deployment: Deployment) -> None:
    before = {file: file.read_bytes() for file in deployment.secrets.rglob("*") if file.is_file()}
    assert prepare(deployment.box) == ""
    assert prepare(deployment.box, "--renew") == ""
    done = deployment.bootstrap()
    assert done.returncode == 0, done.stderr
    assert "is made" not in done.stdout
    assert {file: file.read_bytes() for file in deployment.secrets.rglob("*") if file.is_file()} == before


def test_consul_is_closed(deployment: Deployment) -> None:
    management = deployment.token("management")
    for server in deployment.consul.servers:
        settings = server.ask("GET", "/v1/agent/self", management)["DebugConfig"]
        assert settings["EncryptKey"] == "hidden"
        assert settings["EncryptVerifyIncoming"]
        assert (settings["VerifyIncomingRPC"], settings["VerifyOutgoing"], settings["VerifyServerHostname"]) == (
            (True,) * 3
        )
        assert server.ask("GET", "/v1/catalog/services") == {}
        assert not may(server, "GET", "/v1/kv/mesh/policies/orders", "")
        assert not may(server, "PUT", "/v1/agent/service/register", "", {"Name": "orders"})


def test_each_token_may_what_its_part_needs_and_nothing_else(deployment: Deployment) -> None:
    server = deployment.consul.servers[1]
    key = "/v1/kv/mesh/policies/test"
    management = deployment.token("management")
    plane, orders, edge, agent = (deployment.token(part) for part in ("control-plane", "orders", "edge", "consul-2"))

    assert set(server.ask("GET", "/v1/catalog/services", plane)) >= {"consul"}
    assert {node["Node"] for node in server.ask("GET", "/v1/catalog/nodes", plane)} == {
        "consul-1",
        "consul-2",
        "consul-3",
    }
    assert may(server, "GET", "/v1/health/state/any", plane)
    assert may(server, "PUT", key, plane, "anything")
    assert may(server, "DELETE", key, plane)
    refused = [
        ("PUT", "/v1/kv/mesh/other", "x"),
        ("PUT", "/v1/agent/service/register", {"Name": "orders"}),
        ("PUT", "/v1/session/create", {}),
        ("PUT", "/v1/acl/token", {"Policies": [{"Name": "global-management"}]}),
        ("GET", "/v1/acl/tokens", None),
        ("GET", "/v1/agent/self", None),
        ("PUT", "/v1/agent/token/agent", {"Token": plane}),
    ]
    assert [path for method, path, body in refused if may(server, method, path, plane, body)] == []

    for service, token in (("orders", orders), ("edge", edge)):
        assert may(server, "PUT", "/v1/agent/service/register", token, {"Name": service, "ID": f"{service}-test"})
        others = [
            *(request for request in refused if request[1] not in ("/v1/session/create", "/v1/agent/service/register")),
            ("PUT", "/v1/agent/service/register", {"Name": "inventory"}),
            ("PUT", key, "x"),
            ("GET", key, None),
        ]
        assert [path for method, path, body in others if may(server, method, path, token, body)] == []
        assert not may(server, "PUT", f"/v1/agent/service/deregister/{service}-test", deployment.token("inventory"))
        assert may(server, "PUT", f"/v1/agent/service/deregister/{service}-test", token)

    # Gateways elect one of them by a lock on their edge's key.
    assert not may(server, "PUT", "/v1/session/create", orders, {})
    session = server.ask("PUT", "/v1/session/create", edge, {"TTL": "10s"})["ID"]
    assert server.ask("PUT", f"/v1/kv/mesh/edge-leaders/edge?acquire={session}", edge, "x") is True
    assert not may(server, "PUT", f"/v1/kv/mesh/edge-leaders/other?acquire={session}", edge, "x")
    assert not may(server, "PUT", f"/v1/session/destroy/{session}", orders)
    assert server.ask("PUT", f"/v1/session/destroy/{session}", edge) is True

    assert not may(server, "PUT", "/v1/agent/service/register", agent, {"Name": "orders"})
    assert not may(server, "PUT", key, agent, "x")
    assert may(server, "PUT", "/v1/kv/mesh/other", management, "x")


def test_a_token_is_rotated_in_two_steps(deployment: Deployment) -> None:
    server = deployment.consul.servers[0]
    old = deployment.token("payments")
    assert deployment.bootstrap("--rotate", "payments").returncode == 0
    new = deployment.token("payments")
    assert new != old
    for token in (old, new):
        assert server.ask("GET", "/v1/acl/token/self", token)["ServiceIdentities"] == [{"ServiceName": "payments"}]
    assert deployment.bootstrap("--retire", "payments").returncode == 0
    assert not may(server, "GET", "/v1/acl/token/self", old)
    assert may(server, "GET", "/v1/acl/token/self", new)
    done = deployment.bootstrap("--rotate", "nothing")
    assert done.returncode == 1
    assert "it knows control-plane, edge, inventory, notifications, orders, payments, shipping" in done.stderr


def test_changed_rules_and_a_run_that_was_ended_are_made_good(deployment: Deployment, tmp_path: Path) -> None:
    server, management = deployment.consul.servers[0], deployment.token("management")
    # As after a run that ended between writing a token and telling Consul.
    token = server.ask("GET", "/v1/acl/token/self", deployment.token("edge"))
    server.ask("DELETE", f"/v1/acl/token/{token['AccessorID']}", management)
    # And somebody took the control plane's rights away.
    plane = server.ask("GET", "/v1/acl/token/self", deployment.token("control-plane"))
    server.ask("PUT", f"/v1/acl/token/{plane['AccessorID']}", management, {"AccessorID": plane["AccessorID"]})
    (policy,) = plane["Policies"]
    emptied = {"ID": policy["ID"], "Name": policy["Name"], "Rules": ""}
    server.ask("PUT", f"/v1/acl/policy/{policy['ID']}", management, emptied)
    before = deployment.tokens()
    done = deployment.bootstrap()
    assert done.returncode == 0, done.stderr
    assert "policy mesh-control-plane is changed" in done.stdout
    assert "control-plane: its token is changed" in done.stdout
    assert "edge: a token is made" in done.stdout
    assert deployment.tokens() == before
    assert may(server, "PUT", "/v1/kv/mesh/policies/test", before["control-plane"], "x")
    assert may(server, "DELETE", "/v1/kv/mesh/policies/test", before["control-plane"])


def test_a_lost_management_token_is_said_with_the_way_out(deployment: Deployment) -> None:
    file = deployment.secrets / "management" / "consul.token"
    aside = file.with_name("aside")
    file.rename(aside)
    try:
        done = deployment.bootstrap()
    finally:
        aside.rename(file)
    assert done.returncode == 1
    assert "acl-bootstrap-reset" in done.stderr
    assert re.search(r"reset index: \d+", done.stderr)


@pytest.mark.skipif(not CONFINES, reason="only root can become another user")
def test_the_box_is_closed(deployment: Deployment) -> None:
    program = """
import os, pathlib
for directory in ("/", "/tmp", "/dev/shm", "/srv", "/srv/checkout", "/srv/checkout/deploy", "/var/tmp"):
    try:
        pathlib.Path(directory, "written").touch()
    except OSError:
        continue
    print("can write to", directory)
status = pathlib.Path("/proc/self/status").read_text().split("\\n")
print(*(line for line in status if line.startswith(("Uid", "Groups", "CapEff", "CapBnd", "NoNewPrivs"))))
"""
    lines = deployment.box.output("-c", program).split()
    assert lines == [
        *("Uid:", "65534", "65534", "65534", "65534", "Groups:"),
        *("CapEff:", "0" * 16, "CapBnd:", "0" * 16, "NoNewPrivs:", "1"),
    ]


async def test_the_mesh_works_with_these_tokens(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control plane, operator and a service as in their containers, without a broker; calls from outside of the box."""
    box = deployment.box
    async with AsyncExitStack() as stack:
        ports = stack.enter_context(ExitStack())
        (nobody,) = hold_ports(ports, 1)
        supervisor = await stack.enter_async_context(Supervisor(tmp_path))
        containers = Containers(deployment, supervisor, ports)
        plane, enrolment = containers.plane, containers.enrolment
        control_plane = await containers.start_control_plane()
        service = await containers.start_service("inventory-1")
        assert service.ready_line is not None
        inventory = service.ready_line[1]

        await asyncio.to_thread(containers.run, "create-operator", "test")
        policies = sorted(f"/policies/{file.name}" for file in (DEPLOY / "policies").glob("*.yaml"))
        applied = await asyncio.to_thread(containers.mesh, "policy", "apply", *policies)
        assert applied.count("stored") == len(SERVICES)
        check = f"{box.checkout}/deploy/healthcheck.py"
        identity = f"{box.state}/data/inventory-1/identity/identity.json"
        await asyncio.to_thread(box.output, "-I", check, enrolment)
        await asyncio.to_thread(box.output, "-I", check, inventory, identity)
        for other in ([f"127.0.0.1:{nobody}"], [inventory, f"{box.state}/data/inventory-2/identity.json"]):
            assert (await asyncio.to_thread(box.run, "-I", check, *other)).returncode == 1

        monkeypatch.delenv("MESH_INSECURE")
        (tmp_path / "roots.pem").write_bytes((box.directory / "data/control-plane/ca/roots.pem").read_bytes())
        for caller, outcome in (("orders", grpc.StatusCode.OK), ("payments", grpc.StatusCode.PERMISSION_DENIED)):
            monkeypatch.setenv("CONSUL_HTTP_TOKEN", deployment.token(caller))
            client = mesh_client.connect(
                plane,
                service=caller,
                enrolment=enrolment,
                attestation="consul",
                trust_roots=tmp_path / "roots.pem",
                cache_dir="",
            )
            async with asyncio.timeout(PATIENCE), client as connected:
                stub = InventoryServiceStub(connected.channel("inventory"))
                request = inventory_pb2.GetStockRequest(sku="grinder")
                call = stub.GetStock(request, wait_for_ready=True)
                assert await call.code() is outcome, await call.details()

        # Another service's token makes no instance of inventory.
        impostor = await supervisor.start(
            "impostor",
            box.python("-m", "services.inventory"),
            containers.environment(
                "inventory-2",
                MESH_REGISTRY="none",
                SHOP_ADDRESS="127.0.0.1:0",
                CONSUL_HTTP_TOKEN_FILE=f"{box.state}/secrets/orders/consul.token",
            ),
            re.compile("PERMISSION_DENIED"),
        )
        await impostor.wait_ready()

        # Tokens are rotated while everything runs. The service registers anew, or Consul would never hear that it left.
        for part in ("control-plane", "inventory"):
            assert (await asyncio.to_thread(deployment.bootstrap, "--rotate", part)).returncode == 0
        async with asyncio.timeout(PATIENCE):
            while "with Consul again, with a new token" not in service.log.read_text():
                await asyncio.sleep(0.05)
        for part in ("control-plane", "inventory"):
            retired = await asyncio.to_thread(deployment.bootstrap, "--retire", part)
            assert "is deleted" in retired.stdout
        deleted = await asyncio.to_thread(containers.mesh, "policy", "delete", "payments")
        assert "deleted" in deleted

        assert await service.stop() == 0
        server, management = deployment.consul.servers[0], deployment.token("management")
        async with asyncio.timeout(PATIENCE):
            while server.ask("GET", "/v1/health/service/inventory", management):
                await asyncio.sleep(0.05)
        assert await control_plane.stop() == 0
    for name in ("control-plane", "inventory-1", "impostor"):
        log = (tmp_path / f"{name}.log").read_text()
        assert "Handshake failed" not in log
        assert not [token for token in deployment.tokens().values() if token in log]
