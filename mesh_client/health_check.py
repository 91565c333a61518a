"""The standard gRPC health service of a server, and the server's check of itself through its own port.

Needs the ``server`` extra: ``pip install 'grpc-mesh[server]'``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from mesh_client.core.registration import SelfCheckRecord, Verdict
from mesh_client.transport import Transport

logger = logging.getLogger(__name__)

SERVICE_NAME: str = health.SERVICE_NAME
"""``grpc.health.v1.Health``."""

CHECK_TIMEOUT = 2.0
"""Seconds; a self-check that takes longer is unanswered."""


class _Servicer(health.aio.HealthServicer):  # type: ignore[misc]  # grpc_health has no type information
    """The standard servicer, whose watches can be ended: they would hold up every shutdown for its whole grace."""

    def __init__(self) -> None:
        super().__init__()
        self.closing = asyncio.Event()

    async def Watch(
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse],
    ) -> None:
        """Streams the status until the client has enough, or the server stops."""
        watch = asyncio.ensure_future(super().Watch(request, context))
        closing = asyncio.ensure_future(self.closing.wait())
        try:
            await asyncio.wait({watch, closing}, return_when=asyncio.FIRST_COMPLETED)
            if not watch.done():
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is stopping")
            await watch
        finally:
            watch.cancel()
            closing.cancel()


class HealthReporter:
    """What the health service says of this server as a whole, and of each of its services.

    The overall status is that of the empty name. After `enter_shutdown` everything is NOT_SERVING for good.
    """

    def __init__(self) -> None:
        self._servicer = _Servicer()
        self._names: tuple[str, ...] = ("",)

    async def add_to(self, server: grpc.aio.Server, service_names: Iterable[str]) -> None:
        """Adds the health service to a server that has not started; every named service is SERVING."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        self._names = ("", *service_names)
        for name in self._names:
            await self._servicer.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def set_serving(self, serving: bool, service_name: str | None = None) -> None:
        """Changes the status of one service, of the server as a whole for ``""``, or of everything for None."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names if service_name is None else (service_name,):
            await self._servicer.set(name, status)

    async def enter_shutdown(self) -> None:
        """Everything is NOT_SERVING from now on; watchers are told."""
        await self._servicer.enter_graceful_shutdown()

    def end_watches(self) -> None:
        """Ends the streams of those who watch, so that they do not hold up the stop."""
        self._servicer.closing.set()


class SelfCheck:
    """Calls the server's own health service through its real listening port, again and again.

    What it finds is what registries are told, so a server whose event loop hangs, whose port is gone or that says of
    itself that it is not serving stops being offered to callers.

    It calls as every other caller does, so a certificate that callers would refuse shows here first.

    Args:
        target: the server's own address, as ``host:port``.
        service: the server's service.
        transport: opens its channel, and another one whenever credentials have changed.
        interval: seconds between checks.
        report: told of every verdict, in the event loop.
    """

    def __init__(
        self, target: str, service: str, transport: Transport, interval: float, report: Callable[[Verdict], None]
    ) -> None:
        self._target = target
        self._service = service
        self._transport = transport
        self._interval = interval
        self._report = report
        self._record = SelfCheckRecord()
        self._connect()

    def _connect(self) -> None:
        self._generation = self._transport.generation
        self._channel = self._transport.open_channel(self._target, self._service)
        self._stub = health_pb2_grpc.HealthStub(self._channel)

    @property
    def verdict(self) -> Verdict:
        """What the last decisive check found."""
        return self._record.verdict

    async def check(self) -> Verdict | None:
        """Checks once, within `CHECK_TIMEOUT`; None when the check got no answer and that decides nothing yet."""
        if self._transport.generation != self._generation:
            await self._channel.close()
            self._connect()
        try:
            response = await self._stub.Check(health_pb2.HealthCheckRequest(), timeout=CHECK_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            return self._record.unanswered(f"self-check failed: {error.code().name} {error.details()}")
        if response.status == health_pb2.HealthCheckResponse.SERVING:
            return self._record.answered(True, "self-check passed")
        status = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
        return self._record.answered(False, f"self-check: the server says {status}")

    async def run(self) -> None:
        """Checks until cancelled."""
        while True:
            await asyncio.sleep(self._interval)
            before = self._record.verdict
            verdict = await self.check()
            if verdict is None:
                continue
            if verdict.healthy != before.healthy:
                logger.log(logging.INFO if verdict.healthy else logging.WARNING, "%s", verdict.detail)
            self._report(verdict)

    async def close(self) -> None:
        """Closes its connection."""
        await self._channel.close()
