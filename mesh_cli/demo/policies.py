"""The policies that the demo's services are called with, and how they are put in force."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from functools import partial
from types import TracebackType
from typing import Self

import grpc
from mesh.v1 import admin_pb2, admin_pb2_grpc, traffic_pb2, traffic_pb2_grpc
from mesh.v1.resource_pb2 import RESOURCE_TYPE_SERVICE_POLICY

from mesh_cli.client import CHANNEL_OPTIONS
from mesh_cli.demo.identity import Identities
from mesh_cli.demo.system import CUSTOMERS, EDGE
from mesh_client.core.policy import Algorithm, ServicePolicy

Policy = dict[str, object]

PER_TRY_TIMEOUT = 1.0
"""Seconds after which an attempt at orders is given up and another instance is tried."""

EDGE_TIMEOUT = 2.0
"""Seconds that the edge waits for an answer."""

OPEN_DURATION = 1.5
"""Seconds that a breaker stays open: even where a machine stands still for so long that one opens, the demo goes on."""

_RETRY = {
    "max_attempts": 4,
    "per_try_timeout": f"{PER_TRY_TIMEOUT}s",
    "backoff": {"initial": "10ms", "max": "100ms"},
    "budget": {"ratio": 0.5, "min_per_second": 50},
}

# Short times, so that the demo shows in seconds what a real policy does in minutes.
_OUTLIERS = {"consecutive_failures": 3, "base_ejection": "2s", "max_ejection": "4s", "max_ejected_percent": 50}

_BREAKER = {"consecutive_failures": 5, "open_duration": f"{OPEN_DURATION}s"}

_POLL = 0.02
_TIMEOUT = 10.0


def orders(algorithm: Algorithm = Algorithm.LEAST_REQUEST) -> Policy:
    """Orders: balanced by the algorithm; RING_HASH goes by the key that the customer sets."""
    balancer: Policy = {"algorithm": algorithm.value}
    if algorithm is Algorithm.RING_HASH:
        balancer["hash_key"] = {"source": "EXPLICIT"}
    return {
        "service": "orders",
        "retry": _RETRY,
        "circuit_breaker": _BREAKER,
        "outlier_detection": _OUTLIERS,
        "load_balancer": balancer,
        "authorization": [_rule(CUSTOMERS, "shop.v1.OrderService/*"), _rule(EDGE, "shop.v1.OrderService/*")],
    }


def inventory() -> Policy:
    """Inventory: as orders."""
    return {
        "service": "inventory",
        "retry": _RETRY,
        "circuit_breaker": _BREAKER,
        "outlier_detection": _OUTLIERS,
        "authorization": [
            _rule("orders", "shop.v1.InventoryService/*"),
            _rule(CUSTOMERS, "shop.v1.InventoryService/GetStock"),
            _rule(EDGE, "shop.v1.InventoryService/*"),
        ],
    }


def payments() -> Policy:
    """Payments: a breaker that opens after five failed calls."""
    return {
        "service": "payments",
        "retry": {**_RETRY, "max_attempts": 2},
        "circuit_breaker": _BREAKER,
        "outlier_detection": {"enabled": False},
        "authorization": [_rule("orders", "shop.v1.PaymentService/*"), _rule(CUSTOMERS, "shop.v1.PaymentService/*")],
    }


def edge() -> Policy:
    """The edge: orders and inventory by REST, for everybody."""
    return {
        "edge": EDGE,
        "services": {
            # Short, so that an instance that hangs is noticed, and ejected, in seconds.
            "shop.v1.OrderService": {"upstream": "orders", "timeout": f"{EDGE_TIMEOUT}s"},
            "shop.v1.InventoryService": {"upstream": "inventory", "timeout": f"{EDGE_TIMEOUT}s"},
        },
    }


def _rule(caller: str, method: str) -> Policy:
    return {"callers": [caller], "methods": [method]}


class Operator:
    """Applies policies through the control plane's `AdminService`, and asks it what it knows.

    Args:
        address: ``host:port`` of the control plane.
        identities: has the credentials to show it.
    """

    def __init__(self, address: str, identities: Identities) -> None:
        self._address = address
        self._identities = identities
        self._connect()

    def _connect(self) -> None:
        credentials = self._identities.credentials()
        self._channel = grpc.aio.secure_channel(
            self._address, credentials.channel_credentials, credentials.channel_options(CHANNEL_OPTIONS)
        )
        self._stub = admin_pb2_grpc.AdminServiceStub(self._channel)

    async def reconnect(self) -> None:
        """Connects anew, with the credentials of this moment."""
        await self._channel.close()
        self._connect()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def apply(self, policy: Policy) -> None:
        """Stores a policy; returns when every client that follows the service obeys it.

        Raises:
            grpc.aio.AioRpcError: the policy was refused.
            TimeoutError: somebody does not obey it.
        """
        service = str(policy["service"])
        await self._stub.ApplyPolicy(
            admin_pb2.ApplyPolicyRequest(document=json.dumps(policy)), timeout=_TIMEOUT, wait_for_ready=True
        )
        version = ServicePolicy.parse(policy).version

        async def published() -> bool:
            return await self._published(service) == version

        await _until(published)
        await _until(partial(self._obeyed, service))

    async def apply_edge(self, policy: Policy) -> None:
        """Stores the policy of an edge, whoever follows it.

        Raises:
            grpc.aio.AioRpcError: the policy was refused.
        """
        await self._stub.ApplyPolicy(
            admin_pb2.ApplyPolicyRequest(document=json.dumps(policy), kind=admin_pb2.POLICY_KIND_EDGE),
            timeout=_TIMEOUT,
            wait_for_ready=True,
        )

    async def explain(self, service: str) -> traffic_pb2.ExplainResponse:
        """Why calls to a service fail, or did.

        Raises:
            grpc.aio.AioRpcError: nothing is known of it.
        """
        stub = traffic_pb2_grpc.TrafficServiceStub(self._channel)
        return await stub.Explain(traffic_pb2.ExplainRequest(service=service), timeout=_TIMEOUT, wait_for_ready=True)

    async def endpoints(self, service: str) -> set[str]:
        """Ids of the endpoints of a service; empty when it is not known."""
        try:
            answer = await self._stub.ListEndpoints(
                admin_pb2.ListEndpointsRequest(service=service), timeout=_TIMEOUT, wait_for_ready=True
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return set()
            raise
        return {endpoint.endpoint.id for endpoint in answer.endpoints}

    async def until_listed(self, service: str, name: str) -> None:
        """Returns when the control plane lists an endpoint.

        Raises:
            TimeoutError: it does not.
        """

        async def listed() -> bool:
            return name in await self.endpoints(service)

        await _until(listed)

    async def _status(self) -> admin_pb2.GetStatusResponse:
        return await self._stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=_TIMEOUT, wait_for_ready=True)

    async def _published(self, service: str) -> str:
        services = (await self._status()).services
        return next((known.policy_version for known in services if known.service == service), "")

    async def _obeyed(self, service: str) -> bool:
        return all(
            subscription.acknowledged_version == subscription.current_version
            for client in (await self._status()).clients
            for subscription in client.subscriptions
            if subscription.service == service and subscription.type == RESOURCE_TYPE_SERVICE_POLICY
        )


async def _until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Asks again and again: the control plane's API for operators has no watch."""
    async with asyncio.timeout(_TIMEOUT):
        while not await holds():
            await asyncio.sleep(_POLL)
