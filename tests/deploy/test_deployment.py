"""deploy/prepare.py and deploy/consul/bootstrap.py for real, and the mesh on the Consul that they make.

Everything but Consul runs as a container would have it: see `tests.deploy.confinement`.
"""

from __future__ import annotations

import asyncio
import re
import stat
import subprocess
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import pytest
from shop.v1 import inventory_pb2
from shop.v1.inventory_pb2_grpc import InventoryServiceStub

import mesh_client
from deploy.consul.bootstrap import RefusedError, Server
from mesh_cli.demo.supervisor import Supervisor
from tests.deploy.confinement import CONFINES, REPOSITORY, Box
from tests.deploy.consul import DEPLOY, Cluster, running
from tests.integration.system import PATIENCE
from tests.ports import hold_ports

UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
PARTS = ("control-plane", "edge", "inventory", "orders", "payments")


@dataclass(frozen=True)
class Deployment:
    box: Box
    consul: Cluster
    first_output: str

    def bootstrap(self, *options: str) -> subprocess.CompletedProcess[str]:
        program = f"{self.box.checkout}/deploy/consul/bootstrap.py"
        # Isolated: it needs nothing but Python.
        return self.box.run("-I", program, *self.consul.options, "--secrets", f"{self.box.state}/secrets", *options)

    @property
    def secrets(self) -> Path:
        return self.box.directory / "secrets"

    def token(self, part: str) -> str:
        return (self.secrets / part / "consul.token").read_text().strip()

    def tokens(self) -> dict[str, str]:
        return {file.parent.name: file.read_text().strip() for file in self.secrets.glob("*/consul.token")}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    directory = tmp_path_factory.mktemp("deployment")
    box = Box(directory / "box")
    prepare(box)
    with running(directory / "consul", box.directory / "secrets") as consul:
        deployment = Deployment(box, consul, "")
        done = deployment.bootstrap("--timeout", "30")
        assert done.returncode == 0, done.stderr
        yield Deployment(box, consul, done.stdout)


def prepare(box: Box, *options: str) -> str:
    state = ["--secrets", f"{box.state}/secrets", "--data", f"{box.state}/data"]
    return box.output(f"{box.checkout}/deploy/prepare.py", *state, *options)


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
    assert "it knows control-plane, edge, inventory, orders, payments" in done.stderr


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


_READY = re.compile(r"mesh control-plane listening on (\S+)")
_SERVES = re.compile(r"serves on (\S+:\d+)")


async def test_the_mesh_works_with_these_tokens(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control plane, operator and a service as in their containers; calls from outside of the box."""
    box = deployment.box
    roots = f"{box.state}/data/control-plane/ca/roots.pem"
    operator = {"MESH_OPERATOR": f"{box.state}/data/operator"}
    async with AsyncExitStack() as stack:
        ports = stack.enter_context(ExitStack())
        *held, nobody = hold_ports(ports, 4)
        plane, enrolment, inventory = (f"127.0.0.1:{port}" for port in held)
        supervisor = await stack.enter_async_context(Supervisor(tmp_path))
        control_plane = await supervisor.start(
            "control-plane",
            box.python(
                *("-m", "mesh_cli", "control-plane", "--listen", plane, "--enrol-listen", enrolment),
                *("--registry", deployment.consul.registry, "--data-dir", f"{box.state}/data/control-plane"),
                *("--consul-token-file", f"{box.state}/secrets/control-plane/consul.token"),
            ),
            box.environment(),
            _READY,
        )
        await control_plane.wait_ready()
        mesh_of = {"MESH_CONTROL_PLANE": plane, "MESH_ENROLMENT": enrolment, "MESH_ATTESTATION": "consul"}
        service = await supervisor.start(
            "inventory-1",
            box.python("-m", "services.inventory"),
            box.environment(
                **mesh_of,
                MESH_TRUST_ROOTS=roots,
                MESH_REGISTRY=f"consul://{deployment.consul.agents[1].address}",
                MESH_IDENTITY_DIR=f"{box.state}/data/inventory-1/identity",
                MESH_CACHE_DIR=f"{box.state}/data/inventory-1/cache",
                CONSUL_HTTP_TOKEN_FILE=f"{box.state}/secrets/inventory/consul.token",
                SHOP_ADDRESS=inventory,
                SHOP_DATABASE=f"{box.state}/data/inventory/inventory.sqlite",
                SHOP_INSTANCE="inventory-1",
            ),
            _SERVES,
        )
        await service.wait_ready()

        def mesh(*arguments: str) -> str:
            variables = {"MESH_CONTROL_PLANE": plane, **operator}
            return box.output("-m", "mesh_cli", *arguments, variables=variables)

        data = ("--data-dir", f"{box.state}/data/control-plane", "--directory", operator["MESH_OPERATOR"])
        await asyncio.to_thread(mesh, "operator", "create", "test", *data)
        policies = sorted(str(file.relative_to(REPOSITORY)) for file in (DEPLOY / "policies").glob("*.yaml"))
        applied = await asyncio.to_thread(mesh, "policy", "apply", *(f"{box.checkout}/{file}" for file in policies))
        assert applied.count("stored") == 3
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
            box.environment(
                **mesh_of,
                MESH_TRUST_ROOTS=roots,
                MESH_REGISTRY="none",
                CONSUL_HTTP_TOKEN_FILE=f"{box.state}/secrets/orders/consul.token",
                MESH_CACHE_DIR=f"{box.state}/data/inventory-2/cache",
                SHOP_DATABASE=f"{box.state}/data/inventory/inventory.sqlite",
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
        deleted = await asyncio.to_thread(mesh, "policy", "delete", "payments")
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
