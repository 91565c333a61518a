"""A gateway keeps a Kong in step with a real control plane: policies, endpoints, drains, failures, takeovers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random

import pytest
from google.protobuf.duration_pb2 import Duration
from mesh.v1 import registry_pb2, registry_pb2_grpc

from gateway import kong_push
from gateway.election_state import Role
from gateway.errors import PushFailedError
from gateway.exposed_api import ApiInfo, ExposedApi
from gateway.kong_admin import KongAdmin, parse_admin_address
from gateway.kong_protos import ProtoDirectory
from gateway.kong_push import KongPusher
from gateway.settings import KongSettings
from gateway.sync import EdgeSync
from gateway.sync_state import Result, SyncState
from mesh_client.core.edge_policy import EdgePolicy
from tests.gateway.compiling import shop
from tests.gateway.kong_server import KongServer, running_kong
from tests.integration.mesh_rig import Rig, open_rig

BOUND = 20.0


def policy(*upstreams: str, edge: str = "edge") -> EdgePolicy:
    names = {"orders": "shop.v1.OrderService", "inventory": "shop.v1.InventoryService", "wrong": "shop.v1.Nothing"}
    return EdgePolicy.model_validate(
        {
            "edge": edge,
            "services": {names[upstream]: {"upstream": upstream} for upstream in upstreams},
            "accept": ["int64"],
        }
    )


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(BOUND):
        while not condition():
            await asyncio.sleep(0.005)


class Gateway:
    """One gateway of a Kong, in this process."""

    def __init__(self, name: str, rig: Rig, kong: KongServer, directory: Path) -> None:
        self.name = name
        self.rig = rig
        self.kong = kong
        self.directory = directory
        self.states: list[SyncState] = []
        self.stack = contextlib.AsyncExitStack()

    async def start(self, role: Role = Role.LEADER) -> Gateway:
        self.directory.mkdir(exist_ok=True)
        admin = await self.stack.enter_async_context(KongAdmin(parse_admin_address(self.kong.address)))
        pusher = KongPusher(
            ExposedApi(shop(), ApiInfo()),
            KongSettings(),
            admin,
            ProtoDirectory(self.directory / "protos"),
            credentials=lambda: None,
            server_name=lambda name: name,
        )
        self.sync = EdgeSync(pusher, self.states.append, rng=Random(1))
        self.mesh = await self.rig.mesh(applied=self.sync.applied, node_id=self.name)
        self.sync.role_changed(role)
        self.task = asyncio.create_task(self.sync.run(self.mesh))
        self.stack.push_async_callback(self._end)
        return self

    async def _end(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task

    async def stop(self) -> None:
        """Vanishes, with its stream."""
        await self.stack.aclose()
        await self.mesh.__aexit__()

    def told(self, version: str, *upstreams: str) -> None:
        self.sync.policy_changed(version, policy(*upstreams))

    async def reaches(self, result: Result, version: str | None = None) -> SyncState:
        await until(lambda: self.sync.state.result is result and version in (None, self.sync.state.policy_version))
        return self.sync.state


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kong_push, "SETTLE", 0.0)
    monkeypatch.setattr(kong_push, "LOOK_INTERVAL", 0.01)
    monkeypatch.setattr(kong_push, "WATCH_INTERVAL", 0.02)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path / "control-plane") as made:
        yield made


@pytest.fixture
async def kong() -> AsyncIterator[KongServer]:
    async with running_kong() as made:
        yield made


@pytest.fixture
async def gateway(rig: Rig, kong: KongServer, tmp_path: Path) -> AsyncIterator[Gateway]:
    made = await Gateway("edge-1", rig, kong, tmp_path / "edge-1").start()
    yield made
    await made.stack.aclose()


def drain(rig: Rig, endpoint_id: str, timeout: float = BOUND) -> asyncio.Future[registry_pb2.DrainResponse]:
    duration = Duration()
    duration.FromMilliseconds(int(timeout * 1_000))
    request = registry_pb2.DrainRequest(service="orders", endpoint_id=endpoint_id, timeout=duration)

    async def call() -> registry_pb2.DrainResponse:
        return await registry_pb2_grpc.RegistryServiceStub(rig.control).Drain(request)

    return asyncio.ensure_future(call())


async def two_orders(gateway: Gateway) -> None:
    await gateway.rig.register("orders", "a", 1)
    await gateway.rig.register("orders", "b", 2)
    gateway.told("p1", "orders")
    await until(lambda: gateway.kong.targets("orders") == ["127.0.0.1:1", "127.0.0.1:2"])
    await gateway.reaches(Result.APPLIED, "p1")


async def test_kong_follows_the_policy_and_the_endpoints(gateway: Gateway, rig: Rig, kong: KongServer) -> None:
    await two_orders(gateway)
    state = gateway.sync.state
    assert (state.applied_version, list(state.endpoints)) == ("p1", ["orders"])
    await rig.register("orders", "c", 3)
    await until(lambda: len(kong.targets("orders")) == 3)
    await drain(rig, "c")
    assert len(kong.targets("orders")) == 2
    gateway.told("p2", "orders", "inventory")  # nobody has registered it: unknown is an answer too
    await gateway.reaches(Result.APPLIED, "p2")
    assert [entity["name"] for entity in kong.configuration["upstreams"]] == ["inventory", "orders"]
    gateway.told("p3")
    await gateway.reaches(Result.APPLIED, "p3")
    assert kong.configuration["services"] == []


async def test_a_drain_returns_only_after_kong_does_not_have_the_endpoint_any_more(
    gateway: Gateway, rig: Rig, kong: KongServer
) -> None:
    await two_orders(gateway)
    kong.delay = 0.2
    draining = drain(rig, "a")
    response = await draining
    assert kong.targets("orders") == ["127.0.0.1:2"]
    assert (response.complete, response.acknowledged) == (True, 1)


async def test_a_drain_names_the_edge_that_cannot_be_told_and_the_edge_is_told_when_it_can(
    gateway: Gateway, rig: Rig, kong: KongServer
) -> None:
    await two_orders(gateway)
    await kong.stop()
    assert (await drain(rig, "a", timeout=0.1)).pending == ["edge-1"]
    state = await gateway.reaches(Result.FAILED)
    assert "cannot be asked" in state.reason
    await rig.register("orders", "c", 3)
    kong.restart()
    await kong.start(kong.port)
    await until(lambda: kong.targets("orders") == ["127.0.0.1:2", "127.0.0.1:3"])
    await gateway.reaches(Result.APPLIED, "p1")
    assert (await drain(rig, "a")).complete


async def test_a_kong_that_was_restarted_gets_everything_again(gateway: Gateway, kong: KongServer) -> None:
    await two_orders(gateway)
    kong.restart()
    await until(lambda: len(kong.targets("orders")) == 2)


async def test_a_policy_that_does_not_fit_is_rejected_and_the_one_before_goes_on_to_follow_the_endpoints(
    gateway: Gateway, rig: Rig, kong: KongServer
) -> None:
    await two_orders(gateway)
    gateway.told("p2", "orders", "wrong")
    state = await gateway.reaches(Result.REJECTED, "p2")
    assert "shop.v1.Nothing" in state.reason
    assert state.applied_version == "p1"
    assert (await drain(rig, "a")).complete
    assert kong.targets("orders") == ["127.0.0.1:2"]
    gateway.told("p3", "orders", "inventory")
    await gateway.reaches(Result.APPLIED, "p3")


async def test_a_gateway_that_starts_while_the_policy_does_not_fit_goes_on_with_the_one_that_it_kept(
    gateway: Gateway, rig: Rig, kong: KongServer
) -> None:
    await two_orders(gateway)
    await gateway.stop()
    again = await Gateway("edge-2", rig, kong, gateway.directory).start()
    again.sync.recovered("p1", policy("orders"))
    again.told("p2", "wrong")
    await again.reaches(Result.REJECTED, "p2")
    await rig.register("orders", "c", 3)
    await until(lambda: len(kong.targets("orders")) == 3)
    again.told("p1", "orders")
    await again.reaches(Result.APPLIED, "p1")
    await again.stack.aclose()


async def test_a_drain_waits_for_one_gateway_to_tell_kong_and_for_the_others_to_see_it(
    gateway: Gateway, rig: Rig, kong: KongServer, tmp_path: Path
) -> None:
    await two_orders(gateway)
    other = await Gateway("edge-2", rig, kong, tmp_path / "edge-2").start(Role.STANDBY)
    other.told("p1", "orders")
    await until(lambda: rig.plane._hub.subscriber_count("orders") == 2)
    response = await drain(rig, "a")
    assert (response.complete, response.acknowledged) == (True, 2)
    assert kong.targets("orders") == ["127.0.0.1:2"]
    assert other.sync.state.result is Result.STANDBY
    await other.stack.aclose()


async def test_a_drain_that_begins_while_the_leader_is_dead_waits_until_another_has_taken_over(
    gateway: Gateway, rig: Rig, kong: KongServer, tmp_path: Path
) -> None:
    await two_orders(gateway)
    other = await Gateway("edge-2", rig, kong, tmp_path / "edge-2").start(Role.STANDBY)
    other.told("p1", "orders")
    await until(lambda: rig.plane._hub.subscriber_count("orders") == 2)
    assert (await drain(rig, "never-there")).acknowledged == 2
    await gateway.stop()
    await until(lambda: rig.plane._hub.subscriber_count("orders") == 1)
    assert (await drain(rig, "a", timeout=0.1)).pending == ["edge-2"]
    assert "127.0.0.1:1" in kong.targets("orders")
    draining = drain(rig, "a")
    other.sync.role_changed(Role.LEADER)
    assert (await draining).complete
    assert kong.targets("orders") == ["127.0.0.1:2"]
    await other.stack.aclose()


async def test_defects_of_what_tells_the_edge_are_failures_that_are_tried_again(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(ProtoDirectory, "write", fails)
    gateway.told("p1")
    state = await gateway.reaches(Result.FAILED)
    assert state.reason == "RuntimeError: a defect"
    monkeypatch.undo()
    await gateway.reaches(Result.APPLIED, "p1")
    assert "telling the edge failed" in caplog.text


async def test_a_failure_to_observe_is_said_and_does_not_hold_drains_up(
    gateway: Gateway, rig: Rig, kong: KongServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await two_orders(gateway)
    gateway.sync.role_changed(Role.STANDBY)

    async def fails(*_: object) -> None:
        raise PushFailedError("odd")

    monkeypatch.setattr(KongPusher, "observe", fails)
    assert (await drain(rig, "a")).complete
    assert "looking at the edge failed" in caplog.text


async def test_a_failure_to_watch_the_edge_is_said_and_it_is_watched_again(
    rig: Rig, kong: KongServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watch, calls = KongPusher.watch, 0

    async def fails_once(pusher: KongPusher, lost: Callable[[], None]) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("a defect")
        await watch(pusher, lost)

    monkeypatch.setattr(KongPusher, "watch", fails_once)
    monkeypatch.setattr("gateway.sync.WATCH_AGAIN", 0.0)
    gateway = await Gateway("edge-1", rig, kong, tmp_path / "edge-1").start()
    await until(lambda: calls == 2)
    assert "a defect" in caplog.text
    await gateway.stack.aclose()
