"""The helpers for users' own tests, used as their docstring says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from random import Random

import grpc
import grpc.aio
import pytest
from mesh.v1 import discovery_pb2, discovery_pb2_grpc, endpoint_pb2, registry_pb2, registry_pb2_grpc, resource_pb2
from shop.v1 import payments_pb2, payments_pb2_grpc

import mesh_client
from mesh_client.core.errors import InvalidValueError
from mesh_client.core.model import Endpoint
from mesh_client.core.policy import ServicePolicy
from mesh_client.testing import FakeClock, InMemoryControlPlane
from tests.ports import held_address


class Payments(payments_pb2_grpc.PaymentServiceServicer):
    """Knows one payment, and breaks where it is asked to."""

    async def GetPayment(
        self,
        request: payments_pb2.GetPaymentRequest,
        context: grpc.aio.ServicerContext[payments_pb2.GetPaymentRequest, payments_pb2.GetPaymentResponse],
    ) -> payments_pb2.GetPaymentResponse:
        return payments_pb2.GetPaymentResponse(payment_id=f"payment of {request.order_id}")

    async def Charge(
        self,
        request: payments_pb2.ChargeRequest,
        context: grpc.aio.ServicerContext[payments_pb2.ChargeRequest, payments_pb2.ChargeResponse],
    ) -> payments_pb2.ChargeResponse:
        await context.abort(grpc.StatusCode.INTERNAL, "out of order")

    async def Refund(
        self,
        request: payments_pb2.RefundRequest,
        context: grpc.aio.ServicerContext[payments_pb2.RefundRequest, payments_pb2.RefundResponse],
    ) -> payments_pb2.RefundResponse:
        await context.abort(grpc.StatusCode.INTERNAL, "out of order")


@pytest.fixture
async def control_plane() -> AsyncIterator[InMemoryControlPlane]:
    with held_address() as address:  # a test stops it and starts it again
        async with InMemoryControlPlane(address) as made:
            yield made


async def test_a_server_registers_is_called_and_leaves(control_plane: InMemoryControlPlane) -> None:
    server = mesh_client.server("payments", control_plane=control_plane.address)
    payments_pb2_grpc.add_PaymentServiceServicer_to_server(Payments(), server)
    await server.start()
    (endpoint,) = await control_plane.registered("payments")
    assert endpoint.port == server.port
    async with mesh_client.connect(control_plane.address, cache_dir="") as mesh:
        stub = payments_pb2_grpc.PaymentServiceStub(mesh.channel("payments"))
        assert (await stub.GetPayment(payments_pb2.GetPaymentRequest(order_id="7"))).payment_id == "payment of 7"
        await control_plane.acknowledged("payments")
        await server.stop()
        assert control_plane.endpoints("payments") == ()
        with pytest.raises(mesh_client.MeshRpcError, match="no endpoints"):
            await stub.GetPayment(payments_pb2.GetPaymentRequest(order_id="7"))


async def test_a_breaker_opens_and_closes_by_a_clock_that_the_test_moves(control_plane: InMemoryControlPlane) -> None:
    server = mesh_client.server("payments", control_plane=control_plane.address)
    payments_pb2_grpc.add_PaymentServiceServicer_to_server(Payments(), server)
    await server.start()
    await control_plane.registered("payments")
    clock = FakeClock(100.0)
    async with mesh_client.connect(control_plane.address, cache_dir="", clock=clock, rng=Random(1)) as mesh:
        stub = payments_pb2_grpc.PaymentServiceStub(mesh.channel("payments"))
        for _ in range(5):
            with pytest.raises(grpc.aio.AioRpcError, match="out of order"):
                await stub.Charge(payments_pb2.ChargeRequest(order_id="7"))
        with pytest.raises(mesh_client.MeshRpcError, match="breaker is open"):
            await stub.GetPayment(payments_pb2.GetPaymentRequest(order_id="7"))
        clock.advance(60.0)
        assert (await stub.GetPayment(payments_pb2.GetPaymentRequest(order_id="7"))).payment_id == "payment of 7"
    await server.stop()


def test_a_clock_does_not_go_back() -> None:
    clock = FakeClock()
    clock.advance(1.5)
    assert clock() == 1.5
    with pytest.raises(InvalidValueError, match="0 or more"):
        clock.advance(-1.0)


async def test_services_come_change_and_go(control_plane: InMemoryControlPlane) -> None:
    async with mesh_client.connect(control_plane.address, cache_dir="") as mesh:
        mesh.channel("orders")
        await control_plane.acknowledged("orders")
        assert mesh.state().services[0].resolution.value == "unknown"
        control_plane.set_endpoints("orders", Endpoint("a", "127.0.0.1", 1), Endpoint("b", "127.0.0.1", 2))
        control_plane.set_policy(ServicePolicy(service="orders", timeout=3.0))
        await control_plane.acknowledged("orders")
        assert [endpoint.id for endpoint in mesh.state().services[0].endpoints] == ["a", "b"]
        control_plane.remove("orders")
        await control_plane.acknowledged("orders")
        assert mesh.state().services[0].resolution.value == "unknown"


async def test_it_can_vanish_and_come_back(control_plane: InMemoryControlPlane) -> None:
    control_plane.set_endpoints("orders", Endpoint("a", "127.0.0.1", 1))
    async with mesh_client.connect(control_plane.address, cache_dir="") as mesh:
        mesh.channel("orders")
        await mesh.synced()
        await control_plane.stop()
        while mesh.state().in_sync:
            await mesh.changed()
        assert mesh.state().services[0].endpoints
        await control_plane.start()
        await mesh.synced()


async def test_a_drain_that_not_everybody_acknowledges_says_who(control_plane: InMemoryControlPlane) -> None:
    control_plane.set_endpoints("orders", Endpoint("a", "127.0.0.1", 1))
    async with grpc.aio.insecure_channel(control_plane.address) as channel:
        stream = discovery_pb2_grpc.DiscoveryServiceStub(channel).DeltaResources()
        await stream.write(
            discovery_pb2.DeltaResourcesRequest(
                node=discovery_pb2.Node(id="mute"),
                type=resource_pb2.RESOURCE_TYPE_SERVICE_ENDPOINTS,
                subscribe=["orders", "other"],
                resync=["orders"],
                unsubscribe=["other"],
            )
        )
        await stream.read()
        request = registry_pb2.DrainRequest(service="orders", endpoint_id="a")
        request.timeout.FromMilliseconds(50)
        result = await registry_pb2_grpc.RegistryServiceStub(channel).Drain(request)
        assert (result.complete, result.acknowledged, list(result.pending)) == (False, 0, ["mute"])
        await stream.done_writing()
        while await stream.read() is not grpc.aio.EOF:
            pass


async def test_a_bad_registration_is_refused(control_plane: InMemoryControlPlane) -> None:
    async with grpc.aio.insecure_channel(control_plane.address) as channel:
        call = registry_pb2_grpc.RegistryServiceStub(channel).Register()
        await call.write(registry_pb2.RegisterRequest(service="orders", endpoint=endpoint_pb2.Endpoint(id="a", port=0)))
        with pytest.raises(grpc.aio.AioRpcError, match="endpoint.address"):
            await call.read()


async def test_waiting_for_registrations_goes_on_until_there_are_enough(control_plane: InMemoryControlPlane) -> None:
    waiting = asyncio.create_task(control_plane.registered("orders", 2))
    control_plane.set_endpoints("orders", Endpoint("a", "127.0.0.1", 1))
    control_plane.set_endpoints("orders", Endpoint("a", "127.0.0.1", 1), Endpoint("b", "127.0.0.1", 2))
    assert len(await waiting) == 2
