"""Identity from end to end over real processes, as an operator sets it up with the `mesh` command."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
import pytest
from shop.v1.inventory_pb2 import GetStockRequest, ReserveRequest
from shop.v1.inventory_pb2_grpc import InventoryServiceStub

import mesh_client
from mesh_cli.demo.supervisor import Process, Supervisor
from mesh_client.mesh import Mesh
from tests.integration.consul_cluster import REPOSITORY
from tests.integration.system import PATIENCE
from tests.ports import held_address

_LISTENS = re.compile(r"^mesh control-plane listening on (\S+)$")
_REGISTERED = re.compile(r"registered inventory/")

POLICY = """
service: inventory
authorization:
  - {callers: [checkout], methods: [shop.v1.InventoryService/GetStock]}
"""


class Deployment:
    """A control plane and instances of inventory, each a process, and the commands of an operator."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stack = AsyncExitStack()
        self._supervisor = Supervisor(directory)
        self.address = self.enrolment = ""
        self.control_plane: Process | None = None

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._supervisor)
        self.address = self._stack.enter_context(held_address())
        self.enrolment = self._stack.enter_context(held_address())
        await self.start_control_plane()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, traceback)

    async def start_control_plane(self) -> None:
        command = [sys.executable, "-m", "mesh_cli", "control-plane", "--listen", self.address]
        command += ["--enrol-listen", self.enrolment, "--data-dir", str(self.directory / "state")]
        self.control_plane = await self._supervisor.start("control-plane", command, self.environment(), _LISTENS)
        await self.control_plane.wait_ready()

    async def start_inventory(self, name: str, **environment: str) -> Process:
        """An instance, as shipped; returns when it is registered."""
        environment |= {"SHOP_INSTANCE": name, "SHOP_DATABASE": str(self.directory / "inventory.sqlite")}
        command = [sys.executable, "-m", "services.inventory"]
        process = await self._supervisor.start(name, command, self.environment() | environment, _REGISTERED)
        await process.wait_ready()
        return process

    def environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MESH_", "CONSUL_"))}
        return {
            **inherited,
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": str(REPOSITORY),
            "MESH_CONTROL_PLANE": self.address,
            "MESH_ENROLMENT": self.enrolment,
            "MESH_REGISTRY": "embedded",
            "MESH_OPERATOR": str(self.directory / "operator"),
            "MESH_CACHE_DIR": str(self.directory / "cache"),
            "COLUMNS": "200",
        }

    async def mesh(self, *arguments: str, code: int = 0) -> str:
        """What a command says."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "mesh_cli", *arguments),
            env=self.environment(),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await process.communicate()
        assert process.returncode == code, errors.decode()
        return output.decode() + errors.decode()

    async def token(self, service: str, uses: int = 1) -> Path:
        file = self.directory / f"{service}.token"
        await self.mesh("token", "create", "--service", service, "--uses", str(uses), "--file", str(file))
        return file

    async def client(self, service: str, token_file: Path, **options: Any) -> Mesh:
        return await self._stack.enter_async_context(
            mesh_client.connect(
                self.address,
                service=service,
                enrolment=self.enrolment,
                token_file=token_file,
                insecure=False,
                cache_dir="",
                **options,
            )
        )


async def stock_of(mesh: Mesh) -> str:
    """Sku of the answer to a call, or how it failed."""
    stub = InventoryServiceStub(mesh.channel("inventory"))
    try:
        answer = await stub.GetStock(GetStockRequest(sku="espresso-beans"), timeout=PATIENCE, wait_for_ready=True)
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name}: {error.details()}"
    return answer.sku


@pytest.mark.timeout(120)
async def test_a_mesh_is_set_up_by_commands_and_knows_who_is_who_after_a_restart_too(tmp_path: Path) -> None:
    async with Deployment(tmp_path) as deployment:
        await deployment.mesh(
            "operator",
            "create",
            "alice",
            "--directory",
            str(tmp_path / "operator"),
            "--data-dir",
            str(tmp_path / "state"),
        )
        inventory_token = await deployment.token("inventory", uses=2)
        first = await deployment.start_inventory(
            "inventory-1", MESH_TOKEN_FILE=str(inventory_token), MESH_IDENTITY_DIR=str(tmp_path / "identity")
        )
        checkout_token, reviews_token = await deployment.token("checkout"), await deployment.token("reviews")
        checkout = await deployment.client("checkout", checkout_token)
        reviews = await deployment.client("reviews", reviews_token)
        # Without rules everybody with an identity may call.
        assert await stock_of(checkout) == await stock_of(reviews) == "espresso-beans"

        (tmp_path / "policy.yaml").write_text(POLICY)
        await deployment.mesh("policy", "apply", str(tmp_path / "policy.yaml"))
        async with asyncio.timeout(PATIENCE):
            while "PERMISSION_DENIED" not in (refused := await stock_of(reviews)):
                await asyncio.sleep(0.02)  # the server obeys in a process of its own, of which the client hears nothing
        assert "reviews may not call shop.v1.InventoryService/GetStock" in refused
        assert await stock_of(checkout) == "espresso-beans"
        with pytest.raises(grpc.aio.AioRpcError, match="checkout may not call shop.v1.InventoryService/Reserve"):
            await InventoryServiceStub(checkout.channel("inventory")).Reserve(ReserveRequest(), timeout=PATIENCE)

        # Another process: the same authority, leases and workloads; calls have gone on without it.
        assert deployment.control_plane is not None
        await deployment.control_plane.kill()
        assert await stock_of(checkout) == "espresso-beans"
        await deployment.start_control_plane()
        await deployment.start_inventory("inventory-2", MESH_TOKEN_FILE=str(inventory_token))
        status = json.loads(await deployment.mesh("ca", "status", "--json"))
        identities = sorted(workload["spiffe_id"].partition("internal/")[2] for workload in status["workloads"])
        assert identities == [
            "operator/alice",
            "service/checkout",
            "service/inventory",
            "service/inventory",
            "service/reviews",
        ]
        listed = json.loads(await deployment.mesh("endpoints", "inventory", "--json"))["endpoints"]
        assert {each["endpoint"]["id"] for each in listed} == {"inventory-1", "inventory-2"}

        # The tokens are spent; an instance that kept its identity comes back without it.
        tokens = json.loads(await deployment.mesh("token", "list", "--json"))["tokens"]
        assert [token["uses_left"] for token in tokens] == [0, 0, 0]
        assert await first.stop() == 0
        await deployment.start_inventory("inventory-1", MESH_IDENTITY_DIR=str(tmp_path / "identity"))
        assert await stock_of(checkout) == "espresso-beans"
        said = "".join(log.read_text() for log in tmp_path.glob("*.log"))
        for token in (inventory_token, checkout_token, reviews_token):
            assert token.read_text().strip().rpartition(".")[2] not in said
