"""A small orders server, made with generated code, and the control plane that it registers with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
from mesh.v1 import admin_pb2, admin_pb2_grpc
from shop.v1 import orders_pb2, orders_pb2_grpc

from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from mesh_client.mesh_server import MeshServer
from mesh_client.server import server
from mesh_client.transport import open_channel

ORDER = orders_pb2.GetOrderRequest(order_id="1")


class Orders(orders_pb2_grpc.OrderServiceServicer):
    """Answers with its own name; holds back orders called "held" until released."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.entered = asyncio.Event()
        self.release = asyncio.Event()

    async def PlaceOrder(
        self, request: orders_pb2.PlaceOrderRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> orders_pb2.PlaceOrderResponse:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not here")

    async def ListOrders(
        self, request: orders_pb2.ListOrdersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> orders_pb2.ListOrdersResponse:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not here")

    async def UpdateOrder(
        self, request: orders_pb2.UpdateOrderRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> orders_pb2.UpdateOrderResponse:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not here")

    async def CancelOrder(
        self, request: orders_pb2.CancelOrderRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> orders_pb2.CancelOrderResponse:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not here")

    async def GetOrder(
        self, request: orders_pb2.GetOrderRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> orders_pb2.GetOrderResponse:
        if request.order_id == "held":
            self.entered.set()
            await self.release.wait()
        return orders_pb2.GetOrderResponse(order=orders_pb2.Order(order_id=request.order_id, taken_by=self.name))


def make_server(servicer: Orders | None = None, **options: Any) -> MeshServer:
    """A server of orders that has not started, checked often so that tests are quick."""
    options.setdefault("check_interval", 0.1)
    made = server("orders", **options)
    orders_pb2_grpc.add_OrderServiceServicer_to_server(servicer or Orders(), made)
    return made


@asynccontextmanager
async def running(servicer: Orders | None = None, **options: Any) -> AsyncIterator[MeshServer]:
    """A started server of orders; stopped at the end if it was not before."""
    made = make_server(servicer, **options)
    await made.start()
    try:
        yield made
    finally:
        await made.stop(0.0)


@asynccontextmanager
async def control_plane(**options: Any) -> AsyncIterator[ControlPlane]:
    """A real control plane."""
    plane = ControlPlane(ControlPlaneOptions(**{"insecure": True, **options}))
    await plane.start()
    try:
        yield plane
    finally:
        await plane.stop(0.0)


async def published(address: str, service: str = "orders") -> list[admin_pb2.EndpointStatus]:
    """Endpoints as the control plane shows them to operators; empty for an unknown service."""
    async with open_channel(address) as channel:
        try:
            request = admin_pb2.ListEndpointsRequest(service=service)
            return list((await admin_pb2_grpc.AdminServiceStub(channel).ListEndpoints(request)).endpoints)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return []
            raise


async def get_order(target: str, order_id: str = "1", **options: Any) -> str:
    """Calls a server without the mesh; the name of who answered."""
    async with open_channel(target) as channel:
        stub = orders_pb2_grpc.OrderServiceStub(channel)
        response = await stub.GetOrder(orders_pb2.GetOrderRequest(order_id=order_id), **options)
        return response.order.taken_by
