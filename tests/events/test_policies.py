"""A consumer obeys the policy of its service, from a real control plane and at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import yaml
from mesh.v1 import admin_pb2, admin_pb2_grpc, traffic_pb2, traffic_pb2_grpc
from shop.v1.events_pb2 import OrderPlaced

import mesh_client
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from mesh_client.core.events.state import GroupState
from mesh_client.core.policy import ServicePolicy
from mesh_client.events import Event, EventBus, RetrySchedule
from mesh_client.events.delivery import DETAIL, REASON
from mesh_client.transport import open_channel
from tests.control_plane.test_secure_server import running
from tests.events.services import PATIENCE, Seen, Services, started, until
from tests.integration.test_load_reports import FAST

WAITS = "waits to hear from a control plane what the service's policy is"


class Shipping:
    """A bus of shipping in a mesh without identity, and the policy that it obeys."""

    def __init__(self, bus: EventBus, mesh: mesh_client.Mesh, control_plane: grpc.aio.Channel) -> None:
        self.bus = bus
        self.traffic = traffic_pb2_grpc.TrafficServiceStub(control_plane)
        self._mesh = mesh
        self._admin = admin_pb2_grpc.AdminServiceStub(control_plane)

    @property
    def group(self) -> GroupState:
        return self.bus.state().groups[0]

    async def obeys(self, **group: Any) -> None:
        """Stores a policy; returns when the client has it. The bus obeys in the same step of the loop."""
        policy = {"service": "shipping", "events": [group]}
        await self._admin.ApplyPolicy(admin_pb2.ApplyPolicyRequest(document=yaml.safe_dump(policy)))
        stored = ServicePolicy.parse(policy).version
        await self._until(lambda version: version == stored)

    async def obeys_nothing(self) -> None:
        """Deletes the policy; returns when the mesh knows no shipping any more."""
        await self._admin.DeletePolicy(admin_pb2.DeletePolicyRequest(service="shipping"))
        await self._until(lambda version: version is None)

    async def _until(self, holds: Callable[[str | None], bool]) -> None:
        def version() -> str | None:
            [known] = self._mesh.state().services
            return known.policy_version if known.resolution.value == "active" else None

        await until(lambda: holds(version()), "the policy")


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    options = ControlPlaneOptions(
        insecure=True, data_dir=tmp_path / "plane", debounce_quiet=0.002, debounce_maximum=0.02
    )
    plane = ControlPlane(options)
    await plane.start()
    yield plane
    await plane.stop()


@pytest.fixture
async def shipping(services: Services, plane: ControlPlane) -> AsyncIterator[Shipping]:
    async with (
        mesh_client.connect(plane.address, service="shipping", insecure=True, cache_dir="", load_reports=FAST) as mesh,
        open_channel(plane.address) as channel,
    ):
        bus = mesh.events(
            broker=services.broker.url_of(services.vhost),
            credentials=services.broker.credentials("shipping"),
            outbox=services.directory / "shipping.sqlite",
        )
        yield Shipping(bus, mesh, channel)


async def test_publishers_are_taken_whom_code_and_policy_both_take(services: Services, shipping: Shipping) -> None:
    bus, seen = shipping.bus, Seen()
    bus.subscribe(OrderPlaced, publishers=["orders", "notifications"])(seen)
    await started(bus)
    await shipping.obeys(handlers=[{"type": "shop.v1.OrderPlaced", "publishers": ["orders", "somebody"]}])
    others = services.bus("notifications")
    await others.publish(OrderPlaced(order_id="free of charge"))
    await services.bus("orders").publish(OrderPlaced(order_id="paid"))
    await seen.count(1)
    await until(lambda: shipping.group.counters.dead == {"unauthorized": 1})
    [letter] = await services.dead("shipping")
    assert letter.headers[DETAIL] == "it is of 'notifications'; the service's policy takes it of orders, somebody alone"
    await shipping.obeys_nothing()
    await others.publish(OrderPlaced(order_id="free again"))
    await seen.count(2)
    assert [event.message.order_id for event in seen.events] == ["paid", "free again"]


async def test_what_a_policy_would_keep_from_handlers_is_told_from_what_they_handled(
    services: Services, shipping: Shipping
) -> None:
    bus, seen = shipping.bus, Seen()
    bus.subscribe(OrderPlaced)(seen)
    await started(bus)
    for publisher in ("orders", "notifications", "notifications"):
        await services.bus(publisher).publish(OrderPlaced())
    await seen.count(3)

    async def tried(**handling: Any) -> traffic_pb2.TryPolicyResponse:
        policy = {"service": "shipping", "events": [{"handlers": [handling]}]}
        return await shipping.traffic.TryPolicy(traffic_pb2.TryPolicyRequest(document=yaml.safe_dump(policy)))

    async with asyncio.timeout(PATIENCE):
        while (answer := await tried(type="shop.v1.OrderPlaced", publishers=["orders"])).handled < 3:
            await asyncio.sleep(0.05)
    assert (answer.handled, answer.proposed_events.unauthorized, answer.current_events.unauthorized) == (3, 2, 0)
    [row] = answer.proposed_events.details
    assert (row.group, row.publisher, row.type, row.handled) == (
        "shipping",
        "notifications",
        "shop.v1.OrderPlaced",
        2,
    )
    assert not (await tried(type="shop.v1.OrderShipped", publishers=["nobody"])).proposed_events.details


async def test_time_and_attempts_of_a_handler_are_cut(services: Services, shipping: Shipping) -> None:
    bus, attempts = shipping.bus, 0
    bus.group(retries=RetrySchedule((0.01, 0.01, 0.01)))

    @bus.subscribe(OrderPlaced)
    async def hang(event: Event[OrderPlaced]) -> None:
        nonlocal attempts
        attempts += 1
        await asyncio.Event().wait()

    await started(bus)
    await shipping.obeys(group="shipping", handlers=[{"type": "shop.v1.*", "timeout": "50ms", "max_attempts": 2}])
    await services.bus("orders").publish(OrderPlaced())
    await until(lambda: shipping.group.counters.dead == {"attempts": 1})
    assert attempts == 2
    [letter] = await services.dead("shipping")
    assert letter.headers[REASON] == "attempts"
    assert letter.headers[DETAIL] == "2 attempts, the last: TimeoutError: the handler took more than 0.05 s"


async def test_fewer_handlers_run_at_once_and_never_more_than_the_code_has(
    services: Services, shipping: Shipping
) -> None:
    bus, running, most, go = shipping.bus, 0, 0, asyncio.Semaphore(0)
    bus.group(concurrency=3, ordered=False)

    @bus.subscribe(OrderPlaced)
    async def handle(event: Event[OrderPlaced]) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await go.acquire()
        running -= 1

    await started(bus)
    orders = services.bus("orders")
    await shipping.obeys(max_in_flight=2)
    for _ in range(20):
        await orders.publish(OrderPlaced())
    await until(lambda: shipping.group.running + shipping.group.waiting == 12)  # all that the broker sends ahead
    assert (running, most) == (2, 2)
    await shipping.obeys(max_in_flight=1_000)
    await until(lambda: running == 3)
    await shipping.obeys(max_in_flight=1)
    for _ in range(20):
        go.release()
    await until(lambda: shipping.group.counters.handled == 20)
    assert most == 3


class Held:
    """A handler that waits until it is let go, once for each event."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.go = asyncio.Semaphore(0)

    async def __call__(self, event: Event[OrderPlaced]) -> None:
        self.begun.append(event.message.order_id)
        await self.go.acquire()


async def test_a_paused_group_finishes_what_it_has_begun_and_goes_on_in_order(
    services: Services, shipping: Shipping, caplog: pytest.LogCaptureFixture
) -> None:
    bus, held = shipping.bus, Held()
    bus.subscribe(OrderPlaced)(held)
    await started(bus)
    orders = services.bus("orders")
    for number in range(6):
        await orders.publish(OrderPlaced(order_id=f"{number}"), key="one lane")
    await until(lambda: held.begun == ["0"])
    await shipping.obeys(paused=True)
    held.go.release()
    await until(lambda: shipping.group.broker == "paused by the service's policy")
    assert (shipping.group.connected, shipping.group.paused) == (False, True)
    assert (shipping.group.counters.handled, shipping.group.running, shipping.group.waiting) == (1, 0, 0)
    await services.has("shipping.shipping", 5)
    assert held.begun == ["0"]
    assert "is paused by the service's policy" in caplog.text
    for _ in range(5):
        held.go.release()
    await shipping.obeys(paused=False)
    await until(lambda: shipping.group.counters.handled == 6)
    assert held.begun == [f"{number}" for number in range(6)]


async def test_a_group_can_begin_paused(services: Services, shipping: Shipping) -> None:
    bus, seen = shipping.bus, Seen()
    bus.subscribe(OrderPlaced)(seen)
    await started(bus)
    await shipping.obeys(group="shipping", paused=True)
    await until(lambda: not shipping.group.connected)
    await services.bus("orders").publish(OrderPlaced(order_id="waits"))
    await shipping.obeys(group="another", paused=True)  # and so not shipping
    await seen.count(1)


async def test_a_connection_that_breaks_while_a_group_comes_to_rest_loses_nothing(
    services: Services, shipping: Shipping
) -> None:
    bus, held = shipping.bus, Held()
    bus.subscribe(OrderPlaced)(held)
    await started(bus)
    await services.bus("orders").publish(OrderPlaced(order_id="1"))
    await until(lambda: held.begun == ["1"])
    await shipping.obeys(paused=True)
    await asyncio.to_thread(services.broker.control, "close_all_user_connections", "shipping", "test")
    await until(lambda: shipping.group.broker == "paused by the service's policy")
    held.go.release()
    held.go.release()
    await shipping.obeys(paused=False)
    await until(lambda: shipping.group.counters.handled == 1)
    assert held.begun == ["1", "1"]  # the first could not be acknowledged


async def test_with_identity_a_group_waits_for_its_policy_and_remembers_it(services: Services, tmp_path: Path) -> None:
    seen, cache = Seen(), str(tmp_path / "cache")

    def bus_of(mesh: mesh_client.Mesh) -> EventBus:
        """With identity, but a broker in plaintext."""
        return services.bus(
            mesh.service,
            transport=mesh.transport,
            follow_policy=mesh._resolver.follow_policy,
            outbox=f"{mesh.node_id}.sqlite",
        )

    @asynccontextmanager
    async def consumer(mesh: mesh_client.Mesh) -> AsyncIterator[EventBus]:
        async with mesh:
            bus = bus_of(mesh)
            bus.subscribe(OrderPlaced)(seen)
            async with bus:
                yield bus

    async with AsyncExitStack() as stack:
        async with running(tmp_path) as world:
            admin = admin_pb2_grpc.AdminServiceStub(await world.operator())
            document = yaml.safe_dump({"service": "shipping", "events": [{"handlers": [{"publishers": ["orders"]}]}]})
            await admin.ApplyPolicy(admin_pb2.ApplyPolicyRequest(document=document))
            authority, address, enrolment = world.plane.authority, world.plane.address, world.plane.enrolment_address
            assert authority is not None

            async def client(service: str, cache_dir: str, *, joins: bool) -> mesh_client.Mesh:
                token = (await authority.create_token(service, 600.0, 1, "test")).text if joins else None
                return mesh_client.connect(
                    address,
                    service=service,
                    enrolment=enrolment,
                    token=token,
                    identity_dir=tmp_path / service,
                    cache_dir=cache_dir,
                    insecure=False,
                )

            notifications = bus_of(await stack.enter_async_context(await client("notifications", "", joins=True)))

            async def is_forbidden(bus: EventBus) -> None:
                await until(lambda: bus.state().groups[0].connected, "the group's connection")
                await notifications.publish(OrderPlaced(order_id="free of charge"))
                await until(lambda: bus.state().groups[0].counters.dead == {"unauthorized": 1})

            async with consumer(await client("shipping", cache, joins=True)) as bus:
                await is_forbidden(bus)
        # From here on there is no control plane.
        async with consumer(await client("shipping", cache, joins=False)) as bus:
            await is_forbidden(bus)
        mesh = await client("shipping", "", joins=False)
        async with consumer(mesh) as bus:
            await until(lambda: mesh._resolver.discovery.rounds > 1, "that nobody is there")
            await until(lambda: bus.state().groups[0].broker != "not connected yet", "the group's first look")
            assert bus.state().groups[0].broker == WAITS
    assert not seen.events
