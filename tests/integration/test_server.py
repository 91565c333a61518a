from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import socket
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc
from mesh.v1 import admin_pb2, admin_pb2_grpc, endpoint_pb2, registry_pb2, registry_pb2_grpc
from shop.v1 import orders_pb2_grpc

import mesh_client
from control_plane.server import ControlPlane
from mesh_client.core.errors import ConfigError, InvalidTransitionError, InvalidValueError, MeshError
from mesh_client.core.policy import ServicePolicy
from mesh_client.core.registration import RegistrationState, Verdict
from mesh_client.health_check import HealthReporter, SelfCheck
from mesh_client.mesh_server import MeshServer
from mesh_client.server import server
from mesh_client.server_status import Phase
from mesh_client.transport import PlaintextTransport, add_port, open_channel
from tests.integration.methods import EXPECTED, FORMS, REQUESTS, add_methods, call, echo_unary, handler, thread_pool
from tests.integration.orders import ORDER, Orders, control_plane, get_order, make_server, published, running

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def plane() -> AsyncIterator[ControlPlane]:
    async with control_plane() as made:
        yield made


async def health_of(target: str, service: str = "") -> int:
    async with open_channel(target) as channel:
        response = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
        return int(response.status)


async def listed_services(target: str) -> list[str]:
    async with open_channel(target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        async for response in stub.ServerReflectionInfo(iter([request])):
            return [service.name for service in response.list_services_response.service]
    return []


# -- accepted by generated code, and like a plain server to callers


async def test_a_generated_servicer_is_served_checked_and_reflected() -> None:
    async with running(Orders("me"), registry="none") as made:
        target = made.endpoint.target
        assert target == f"127.0.0.1:{made.port}"
        assert await get_order(target) == "me"
        assert await health_of(target) == SERVING
        assert await health_of(target, "shop.v1.OrderService") == SERVING
        assert await listed_services(target) == [
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
            "shop.v1.OrderService",
        ]


async def test_reflection_can_be_left_out() -> None:
    async with running(registry="none", reflection=False) as made:
        async with open_channel(made.endpoint.target) as channel:
            # Without a request: its write could cross the refusal, and the call would then fail with INTERNAL.
            refused = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
            assert await refused.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("generated", [True, False], ids=["registered methods", "generic handlers"])
async def test_every_form_of_handler_is_served(generated: bool) -> None:
    async with thread_pool(4) as threads:
        made = server("orders", registry="none", migration_thread_pool=threads)
        forms = {f"M{number}": handler(kind, behavior) for number, (kind, behavior) in enumerate(FORMS)}
        add_methods(made, forms, generated=generated)
        await made.start()
        async with open_channel(made.endpoint.target) as channel:
            for number, (kind, _) in enumerate(FORMS):
                responses, _ = await call(channel, kind, f"M{number}", REQUESTS)
                assert responses == EXPECTED[kind]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(channel, "unary_unary", "NoSuch", [b""])
        await made.stop()
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_health_and_reflection_of_the_applications_own_are_left_alone() -> None:
    own = health.aio.HealthServicer()
    made = make_server(registry="none")
    health_pb2_grpc.add_HealthServicer_to_server(own, made)
    reflection.enable_server_reflection(["shop.v1.OrderService"], made)
    await made.start()
    await own.set("database", NOT_SERVING)
    assert await health_of(made.endpoint.target, "database") == NOT_SERVING
    assert await listed_services(made.endpoint.target) == ["shop.v1.OrderService"]
    await made.stop()


async def test_a_handler_of_whatever_method_is_served_and_has_no_health_of_its_own() -> None:
    class AnyMethod(grpc.GenericRpcHandler):
        def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
            return handler("unary_unary", echo_unary)

    made = make_server(registry="none")
    made.add_generic_rpc_handlers([AnyMethod()])
    await made.start()
    async with open_channel(made.endpoint.target) as channel:
        responses, _ = await call(channel, "unary_unary", "Anything", REQUESTS)
    assert responses == EXPECTED["unary_unary"]
    await made.stop()


async def test_interceptors_see_calls_before_admission() -> None:
    seen: list[str] = []

    class Interceptor(grpc.aio.ServerInterceptor):
        async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
            seen.append(handler_call_details.method)
            return await continuation(handler_call_details)

    async with running(registry="none", interceptors=[Interceptor()]) as made:
        await get_order(made.endpoint.target)
    assert "/shop.v1.OrderService/GetOrder" in seen


async def test_more_ports_can_be_opened() -> None:
    made = make_server(Orders("me"), registry="none")
    plain = made.add_insecure_port("127.0.0.1:0")
    local = made.add_secure_port("127.0.0.1:0", grpc.local_server_credentials())
    await made.start()
    assert await get_order(f"127.0.0.1:{plain}") == "me"
    async with grpc.aio.secure_channel(f"127.0.0.1:{local}", grpc.local_channel_credentials()) as channel:
        assert (await orders_pb2_grpc.OrderServiceStub(channel).GetOrder(ORDER)).order.taken_by == "me"
    await made.stop()


# -- what is wrong is said at once


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"service": "Orders!"}, InvalidValueError, "service"),
        ({"address": "localhost"}, ConfigError, "address"),
        ({"address": "unix:/tmp/socket"}, ConfigError, "address"),
        ({"advertise": "0.0.0.0"}, InvalidValueError, "advertise"),
        ({"advertise": "host:0"}, ConfigError, "advertise"),
        ({"registry": "etcd"}, ConfigError, "registry"),
        ({"control_plane": "nowhere"}, ConfigError, "control_plane"),
        ({"instance_id": "a b"}, InvalidValueError, "endpoint.id"),
        ({"weight": 0}, InvalidValueError, "endpoint.weight"),
        ({"zone": "a/b"}, InvalidValueError, "locality.zone"),
        ({"region": "a/b"}, InvalidValueError, "locality.region"),
        ({"metadata": {"": "x"}}, InvalidValueError, "endpoint.metadata"),
        ({"drain_timeout": 301.0}, ConfigError, "drain_timeout"),
        ({"drain_timeout": float("nan")}, ConfigError, "drain_timeout"),
        ({"grace": -1.0}, ConfigError, "grace"),
        ({"check_interval": 0.0}, ConfigError, "check_interval"),
    ],
)
async def test_bad_options_are_refused_by_name(options: dict[str, Any], error: type[MeshError], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        server(**{"service": "orders", **options})


async def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "consul" else find(name))
    server("orders")
    with pytest.raises(ConfigError, match=r"grpc-mesh\[consul\]"):
        server("orders", registry="consul://127.0.0.1:8500")


async def test_a_port_that_is_taken_fails_the_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        made = make_server(registry="none", address=address)
        with pytest.raises(ConfigError, match="cannot listen"):
            await made.start()
        assert made.status().phase is Phase.STOPPED
        assert await make_server(registry="none", address=address).serve() == 1


async def test_two_servers_never_share_a_port() -> None:
    async with running(registry="none") as made:
        plain = grpc.aio.server()
        with pytest.raises(ConfigError):
            add_port(make_server(registry="none", address=f"127.0.0.1:{made.port}"), f"127.0.0.1:{made.port}")
        await plain.stop(None)


async def test_a_server_that_says_of_itself_that_it_does_not_serve_fails_its_start() -> None:
    own = health.aio.HealthServicer()
    await own.set("", NOT_SERVING)
    made = make_server(registry="none")
    health_pb2_grpc.add_HealthServicer_to_server(own, made)
    with pytest.raises(MeshError, match="NOT_SERVING"):
        await made.start()
    assert made.status().phase is Phase.STOPPED


async def test_a_server_starts_once_and_stops_for_good() -> None:
    made = make_server(registry="none")
    with pytest.raises(InvalidTransitionError, match="endpoint"):
        _ = made.endpoint
    assert made.status().health.detail == "the server is new"
    await made.start()
    with pytest.raises(InvalidTransitionError, match="serving"):
        await made.start()
    await made.stop()
    await made.stop()
    with pytest.raises(InvalidTransitionError, match="stopped"):
        await made.start()


async def test_a_server_that_never_started_can_be_stopped() -> None:
    made = make_server(registry="none")
    await made.stop()
    assert made.status().phase is Phase.STOPPED


async def test_a_server_that_is_starting_cannot_be_stopped() -> None:
    made = make_server(registry="none")
    start = asyncio.create_task(made.start())
    await asyncio.sleep(0)
    with pytest.raises(InvalidTransitionError, match="starting"):
        await made.stop()
    start.cancel()
    await asyncio.wait({start})
    assert made.status().phase is Phase.STOPPED


# -- what others are told to call


async def test_the_registered_address_is_what_was_advertised(plane: ControlPlane) -> None:
    for advertise, target in (
        ("localhost", "localhost:{port}"),
        ("localhost:4711", "localhost:4711"),
        ("[::1]:4711", "[::1]:4711"),
    ):
        async with running(control_plane=plane.address, advertise=advertise) as made:
            assert made.endpoint.target == target.format(port=made.port)


async def test_a_wildcard_advertises_the_address_towards_the_control_plane(plane: ControlPlane) -> None:
    async with running(control_plane=plane.address, address="0.0.0.0:0") as made:
        assert made.endpoint.target == f"127.0.0.1:{made.port}"
    async with running(control_plane=plane.address, address="[::]:0") as made:
        assert made.endpoint.target == f"127.0.0.1:{made.port}"


async def test_a_wildcard_without_anybody_to_ask_needs_an_address_to_advertise() -> None:
    made = make_server(registry="none", address="0.0.0.0:0")
    with pytest.raises(ConfigError, match="advertise"):
        await made.start()


async def test_everything_that_is_said_of_the_instance_is_registered(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESH_CONTROL_PLANE", plane.address)
    monkeypatch.setenv("MESH_ZONE", "eu-1a")
    monkeypatch.setenv("MESH_REGION", "eu-1")
    async with running(instance_id="orders-1", weight=7, metadata={"version": "v2"}) as made:
        await made.registered()
        (found,) = await published(plane.address)
    assert found.endpoint.id == "orders-1"
    assert found.endpoint.port == made.port
    assert found.endpoint.weight == 7
    assert (found.endpoint.locality.zone, found.endpoint.locality.region) == ("eu-1a", "eu-1")
    assert dict(found.endpoint.metadata) == {"version": "v2"}


async def test_it_registers_where_the_mesh_client_that_it_is_given_is(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESH_CONTROL_PLANE", "127.0.0.1:1")
    async with (
        mesh_client.connect(plane.address, service="orders", cache_dir="") as mesh,
        running(Orders(), mesh=mesh) as made,
    ):
        async with asyncio.timeout(10.0):
            await made.registered()


# -- policy


async def apply_policy(plane: ControlPlane, document: str) -> None:
    async with open_channel(plane.address) as channel:
        await admin_pb2_grpc.AdminServiceStub(channel).ApplyPolicy(admin_pb2.ApplyPolicyRequest(document=document))


@pytest.mark.parametrize("own_mesh", [True, False], ids=["its own connection", "a mesh that is given"])
async def test_the_services_policy_is_obeyed_as_it_changes(plane: ControlPlane, own_mesh: bool) -> None:
    servicer = Orders()
    async with mesh_client.connect(plane.address, cache_dir="") as mesh:
        async with running(servicer, control_plane=plane.address, mesh=None if own_mesh else mesh) as made:
            target = made.endpoint.target
            await made.registered()
            held = asyncio.create_task(get_order(target, "held"))
            await servicer.entered.wait()
            assert await get_order(target) == ""
            await apply_policy(plane, "service: orders\nserver_concurrency_limit: {max_in_flight: 1}")
            async with asyncio.timeout(10.0):
                while await admitted(target):
                    await asyncio.sleep(0.01)
                await apply_policy(plane, "service: orders")
                while not await admitted(target):
                    await asyncio.sleep(0.01)
            servicer.release.set()
            await held


async def admitted(target: str) -> bool:
    async with open_channel(target) as channel:
        code = await orders_pb2_grpc.OrderServiceStub(channel).GetOrder(ORDER).code()
    assert code in (grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED)
    return code is grpc.StatusCode.OK


async def test_a_fixed_policy_needs_no_control_plane() -> None:
    policy = ServicePolicy.parse({"service": "orders", "rate_limits": [{"requests_per_second": 0.01}]})
    async with running(registry="none", policy=policy) as made:
        await get_order(made.endpoint.target)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await get_order(made.endpoint.target)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await health_of(made.endpoint.target) == SERVING, "health is never limited"


# -- health


async def test_a_server_that_cannot_serve_is_published_as_unhealthy_until_it_can(plane: ControlPlane) -> None:
    async with running(control_plane=plane.address) as made:
        await made.registered()
        await made.set_serving(False)
        assert await health_of(made.endpoint.target, "shop.v1.OrderService") == NOT_SERVING
        await until_health(plane, endpoint_pb2.HEALTH_STATUS_UNHEALTHY)
        assert not made.status().health.healthy
        assert await get_order(made.endpoint.target) == ""
        await made.set_serving(True)
        await until_health(plane, endpoint_pb2.HEALTH_STATUS_HEALTHY)
        assert made.status().health.healthy


async def until_health(plane: ControlPlane, health: int) -> None:
    async with asyncio.timeout(10.0):
        while [found.endpoint.health for found in await published(plane.address)] != [health]:
            await asyncio.sleep(0.01)


async def test_a_watch_that_fails_fails_as_it_would_without_the_mesh() -> None:
    class Broken:
        async def write(self, _: object) -> None:
            raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        await HealthReporter()._servicer.Watch(health_pb2.HealthCheckRequest(), Broken())  # type: ignore[arg-type]  # only its write is used


async def test_a_watch_of_the_health_ends_with_its_client() -> None:
    async with running(registry="none") as made:
        async with open_channel(made.endpoint.target) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == SERVING
            watch.cancel()


async def test_a_port_that_does_not_answer_is_reported_at_the_second_check(nobody: str) -> None:
    reported: asyncio.Queue[Verdict] = asyncio.Queue()
    check = SelfCheck(nobody, "orders", PlaintextTransport(), 0.01, reported.put_nowait)
    running_checks = asyncio.create_task(check.run())
    verdict = await asyncio.wait_for(reported.get(), 30.0)
    assert not verdict.healthy
    assert verdict.detail.startswith("self-check failed: UNAVAILABLE")
    running_checks.cancel()
    await asyncio.wait({running_checks})
    await check.close()


async def test_one_services_health_can_be_set_alone() -> None:
    async with running(registry="none") as made:
        await made.set_serving(False, "shop.v1.OrderService")
        assert await health_of(made.endpoint.target, "shop.v1.OrderService") == NOT_SERVING
        assert await health_of(made.endpoint.target) == SERVING


# -- leaving


async def test_a_server_that_leaves_serves_new_calls_until_every_client_knows(plane: ControlPlane) -> None:
    first, second = Orders("first"), Orders("second")
    async with (
        running(first, control_plane=plane.address, instance_id="first") as leaving,
        running(second, control_plane=plane.address, instance_id="second") as staying,
        mesh_client.connect(plane.address, cache_dir="") as mesh,
    ):
        await leaving.registered()
        await staying.registered()
        stub = orders_pb2_grpc.OrderServiceStub(mesh.channel("orders"))
        answered: list[str] = []
        failed: list[BaseException] = []
        going = True

        async def keep_calling() -> None:
            while going:
                try:
                    answered.append((await stub.GetOrder(ORDER, wait_for_ready=True)).order.taken_by)
                except grpc.aio.AioRpcError as error:
                    failed.append(error)

        callers = [asyncio.create_task(keep_calling()) for _ in range(4)]
        async with asyncio.timeout(10.0):
            while len(set(answered)) < 2:
                await asyncio.sleep(0.01)
        await leaving.stop()
        answered.clear()
        async with asyncio.timeout(10.0):
            while len(answered) < 50:
                await asyncio.sleep(0.01)
        going = False
        await asyncio.gather(*callers)
    assert not failed
    assert set(answered) == {"second"}


async def test_while_it_drains_it_says_not_serving_and_still_serves(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh_client.membership.LINGER", 2.0)  # longer than what is asked of it meanwhile may take
    servicer = Orders("me")
    async with running(servicer, control_plane=plane.address) as made:
        await made.registered()
        async with open_channel(made.endpoint.target) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == SERVING
            held = asyncio.create_task(get_order(made.endpoint.target, "held"))
            await servicer.entered.wait()
            stop = asyncio.create_task(made.stop())
            assert (await watch.read()).status == NOT_SERVING
            assert made.status().phase is Phase.DRAINING
            assert made.status().in_flight == 1
            assert await get_order(made.endpoint.target) == "me"
            servicer.release.set()
            assert await held == "me"
            await stop
            with pytest.raises(grpc.aio.AioRpcError, match="the server is stopping"):
                await watch.read()
        assert await published(plane.address) == []
        assert made.status().registration.state is RegistrationState.GONE


async def test_calls_that_never_end_by_themselves_learn_when_to(plane: ControlPlane) -> None:
    servicer = Orders("me")
    async with running(servicer, control_plane=plane.address, grace=3600.0) as made:
        servicer.release = made.stopping
        await made.registered()
        held = asyncio.create_task(get_order(made.endpoint.target, "held"))
        await servicer.entered.wait()
        stop = asyncio.create_task(made.stop())
        await made.stopping.wait()
        assert made.status().phase is Phase.STOPPING
        assert await published(plane.address) == []
        assert await held == "me"
        await stop


async def test_who_waits_for_a_server_to_stop_is_not_forgotten_when_it_never_served() -> None:
    made = make_server(registry="none")
    assert not made.stopping.is_set()
    await made.stop()
    assert made.stopping.is_set()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        made = make_server(registry="none", address=f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(ConfigError):
            await made.start()
    assert made.stopping.is_set()


def test_the_server_class_is_part_of_the_api() -> None:
    assert mesh_client.MeshServer is MeshServer
    with pytest.raises(AttributeError, match="has no attribute 'MeshProxy'"):
        _ = mesh_client.MeshProxy  # type: ignore[attr-defined]  # that there is none is the point


async def test_calls_that_outlast_the_grace_are_aborted() -> None:
    servicer = Orders()
    async with running(servicer, registry="none", grace=0.05) as made:
        held = asyncio.create_task(get_order(made.endpoint.target, "held"))
        await servicer.entered.wait()
        await made.stop()
        with pytest.raises(grpc.aio.AioRpcError):
            await held
        assert made.status().in_flight == 0


async def test_clients_that_did_not_acknowledge_are_named(caplog: pytest.LogCaptureFixture) -> None:
    class Registry(registry_pb2_grpc.RegistryServiceServicer):
        async def Register(self, requests: Any, _: object) -> AsyncIterator[registry_pb2.RegisterResponse]:
            async for _request in requests:
                yield registry_pb2.RegisterResponse()

        async def Drain(self, request: registry_pb2.DrainRequest, _: object) -> registry_pb2.DrainResponse:
            return registry_pb2.DrainResponse(acknowledged=1, pending=["gateway-1", "gateway-2"])

    registry = grpc.aio.server()
    registry_pb2_grpc.add_RegistryServiceServicer_to_server(Registry(), registry)
    address = f"127.0.0.1:{add_port(registry, '127.0.0.1:0')}"
    await registry.start()
    async with running(control_plane=address) as made:
        await made.registered()
        await made.stop()
    assert "not acknowledged by gateway-1, gateway-2" in caplog.text
    await registry.stop(None)


async def test_a_drain_that_reaches_nobody_is_short(nobody: str) -> None:
    clock = asyncio.get_running_loop().time
    async with running(control_plane=nobody, drain_timeout=0.3) as made:
        started = clock()
        await made.stop()
        assert 0.3 <= clock() - started < 10.0


async def test_a_server_outside_of_the_mesh_stops_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh_client.membership.LINGER", 600.0)
    async with running(registry="none") as made:
        await made.stop()


async def test_stopping_twice_at_once_is_stopping_once(plane: ControlPlane) -> None:
    async with running(control_plane=plane.address) as made:
        await made.registered()
        await asyncio.gather(made.stop(), made.stop())
        assert await made.wait_for_termination(1.0) is False


# -- serve


async def serving(made: Any) -> asyncio.Task[int]:
    """`serve` as a task, once the server serves."""
    task = asyncio.create_task(made.serve())
    while made.status().phase is not Phase.SERVING:
        await asyncio.sleep(0.005)
    return task


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_serve_with_0(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    task = await serving(make_server(registry="none"))
    os.kill(os.getpid(), number)
    assert await task == 0
    assert signal.getsignal(number) is before


async def test_a_second_signal_aborts_calls_and_ends_serve_with_1() -> None:
    servicer = Orders()
    made = make_server(servicer, registry="none")
    task = await serving(made)
    held = asyncio.create_task(get_order(made.endpoint.target, "held"))
    await servicer.entered.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    while made.status().phase is not Phase.STOPPING:
        await asyncio.sleep(0.005)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await task == 1
    with pytest.raises(grpc.aio.AioRpcError):
        await held


async def test_signals_during_the_start_are_obeyed() -> None:
    for signals, code in ((1, 0), (2, 1)):
        made = make_server(registry="none")
        task = asyncio.create_task(made.serve())
        await asyncio.sleep(0)
        assert made.status().phase is Phase.NEW
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGTERM)
        assert await task == code
        assert made.status().phase is Phase.STOPPED


async def test_serve_goes_on_with_a_server_that_was_started_and_ends_when_it_is_stopped() -> None:
    made = make_server(registry="none")
    await made.start()
    task = await serving(made)
    await made.stop()
    assert await task == 0


async def test_serving_that_ends_by_itself_is_a_failure() -> None:
    made = make_server(registry="none")
    task = await serving(made)
    await made._inner.stop(None)
    assert await task == 1
    assert made.status().phase is Phase.STOPPED


async def test_serve_that_is_cancelled_stops_at_once() -> None:
    servicer = Orders()
    made = make_server(servicer, registry="none")
    task = await serving(made)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert made.status().phase is Phase.STOPPED


def test_serve_outside_of_the_main_thread_says_what_to_do() -> None:
    async def serve() -> int:
        return await server("orders", registry="none").serve()

    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        with pytest.raises(ConfigError, match="main thread"):
            threads.submit(asyncio.run, serve()).result()
