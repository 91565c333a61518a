"""What the README shows works: its service runs, its policy is one, its commands exist, its links lead somewhere."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import grpc.aio
import pytest
from shop.v1.orders_pb2_grpc import OrderServiceStub

import mesh_client
from control_plane.documents import parse_document
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from mesh_cli.demo.identity import Identities
from mesh_client.core.policy import Algorithm, ServicePolicy
from tests.integration.orders import ORDER
from tests.integration.system import PATIENCE, clean_environment

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


async def test_the_example_of_adoption_serves_calls_and_stops_cleanly(tmp_path: Path) -> None:
    (example,) = (block for block in blocks("python") if "import asyncio" in block)
    assert len([line for line in example.splitlines() if line.strip()]) <= 20
    (tmp_path / "app.py").write_text(example)
    (tmp_path / "myshop").mkdir()
    (tmp_path / "myshop" / "orders.py").write_text(
        "from tests.integration.orders import Orders as Answers\n"
        "class Orders(Answers):\n"
        "    def __init__(self, inventory):\n"
        "        super().__init__(type(inventory).__name__)\n"
    )
    plane = ControlPlane(ControlPlaneOptions(data_dir=tmp_path / "state"))
    await plane.start()
    identities = Identities(tmp_path)
    await identities.set_up(tmp_path / "state", plane.address, ["orders", "checkout"])
    environment = clean_environment()
    del environment["MESH_INSECURE"]
    environment |= {
        "MESH_CONTROL_PLANE": plane.address,
        "MESH_ENROLMENT": plane.enrolment_address,
        "MESH_TOKEN_FILE": str(identities.token_file("orders")),
        "MESH_REGISTRY": "embedded",
        "MESH_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": f"{tmp_path}:{environment['PYTHONPATH']}",
    }
    app = await asyncio.create_subprocess_exec(sys.executable, str(tmp_path / "app.py"), env=environment)
    checkout = mesh_client.connect(
        plane.address,
        service="checkout",
        enrolment=plane.enrolment_address,
        token_file=identities.token_file("checkout"),
        insecure=False,
        cache_dir="",
    )
    try:
        async with asyncio.timeout(PATIENCE), checkout as mesh:
            stub = OrderServiceStub(mesh.channel("orders"))
            answer = await stub.GetOrder(ORDER, wait_for_ready=True)
            assert answer.order.taken_by == "InventoryServiceStub"
            app.terminate()
            assert await app.wait() == 0
            with pytest.raises(grpc.aio.AioRpcError, match="orders: the service is known but has no endpoints"):
                await stub.GetOrder(ORDER)
    finally:
        if app.returncode is None:
            app.kill()
            await app.wait()
        await plane.stop(0.0)


def test_the_policy_is_one() -> None:
    (document,) = blocks("yaml")
    policy = parse_document(document, ServicePolicy, "orders")
    assert (policy.timeout, policy.retry.per_try_timeout) == (2.0, 0.5)
    assert policy.load_balancer.algorithm is Algorithm.PEAK_EWMA


def test_the_targets_of_make_exist() -> None:
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE))
    there = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test"} <= named <= there


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", README)
    assert targets
    assert [target for target in targets if "://" not in target and not (REPOSITORY / target).exists()] == []
