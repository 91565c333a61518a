"""Registers a server, keeps it registered whatever breaks, and takes it out again without a failed call."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

import grpc
import grpc.aio
from mesh.v1 import registry_pb2, registry_pb2_grpc

from mesh_client.convert import endpoint_to_proto
from mesh_client.core.errors import IdentityError
from mesh_client.core.handshake import explain
from mesh_client.core.model import Endpoint, Health
from mesh_client.core.registration import Registration, RegistrationState, RegistrationStatus, Verdict
from mesh_client.tasks import end_tasks
from mesh_client.transport import CONTROL_PLANE, Transport

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT = 5.0
"""Seconds for a registry to confirm; past that the next address is tried."""

MAX_AGE_REACHED = "UNAVAILABLE: max connection age"
"""How grpc says that a connection has ended because of its age."""

_REFUSALS = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
"""Answers that trying again soon cannot change."""


class Registrar(Protocol):
    """Keeps one endpoint registered. Trouble with the registry is retried, logged and shown; it never raises."""

    @property
    def lease_token(self) -> str:
        """Shows the control plane that the endpoint is this server's; empty where that is said otherwise."""

    def status(self) -> RegistrationStatus:
        """Where the registration stands."""

    async def changed(self) -> None:
        """Returns at the next change of the status."""

    def start(self) -> None:
        """Begins to register, in the background of the running event loop."""

    def report(self, verdict: Verdict) -> None:
        """Passes on what a self-check found."""

    async def announce_drain(self) -> None:
        """Marks the endpoint as leaving where the registry can show that, and stops renewing the registration."""

    async def deregister(self) -> None:
        """Takes the endpoint out of the registry, within a few seconds or not at all; ends every background task."""

    async def close(self) -> None:
        """Ends every background task at once and leaves the registry to find out by itself."""


class Changes:
    """Lets any number of tasks wait for the next change of something."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    def notify(self) -> None:
        """Something has changed."""
        self._next.set()
        self._next = asyncio.Event()

    async def wait(self) -> None:
        """Returns at the next change."""
        await self._next.wait()


class NoRegistrar:
    """For servers that are found by other means, or not at all, or not yet.

    Args:
        why: shown in the status.
    """

    lease_token = ""

    def __init__(self, why: str) -> None:
        self._why = why

    def status(self) -> RegistrationStatus:
        """Always gone."""
        return RegistrationStatus(RegistrationState.GONE, "", 0.0, 0, self._why)

    async def changed(self) -> None:
        """Never returns."""
        await asyncio.Event().wait()

    def start(self) -> None:
        """Does nothing."""

    def report(self, verdict: Verdict) -> None:
        """Does nothing."""

    async def announce_drain(self) -> None:
        """Does nothing."""

    async def deregister(self) -> None:
        """Does nothing."""

    async def close(self) -> None:
        """Does nothing."""


class LeaseRegistrar:
    """Holds a lease with the control plane's own registry: the open stream is the lease.

    Args:
        service: the service.
        endpoint: the endpoint as it is now.
        addresses: control planes, in the order of preference.
        rng: draws waits between attempts.
        transport: opens channels; a new one for each attempt, with the credentials of that moment.

    Raises:
        ConfigError: there is no address.
    """

    def __init__(
        self, service: str, endpoint: Endpoint, addresses: Sequence[str], rng: Random, transport: Transport
    ) -> None:
        self._service = service
        self._endpoint = endpoint
        self._transport = transport
        self._machine = Registration(addresses, rng, time.monotonic())
        self._changes = Changes()
        self._token = ""
        self._wake = asyncio.Event()
        self._leaving = False
        self._task: asyncio.Task[None] | None = None

    @property
    def lease_token(self) -> str:
        """Shows the control plane that the endpoint is this server's; empty before it has registered."""
        return self._token

    def status(self) -> RegistrationStatus:
        """Where the registration stands."""
        return self._machine.status()

    async def changed(self) -> None:
        """Returns at the next change of the status."""
        await self._changes.wait()

    def start(self) -> None:
        """Begins to register, in the background of the running event loop."""
        self._task = asyncio.create_task(self._run(), name=f"lease of {self._service}/{self._endpoint.id}")

    def report(self, verdict: Verdict) -> None:
        """Passes on what a self-check found."""
        health = Health.HEALTHY if verdict.healthy else Health.UNHEALTHY
        if health is not self._endpoint.health:
            self._endpoint = dataclasses.replace(self._endpoint, health=health)
            self._wake.set()

    async def announce_drain(self) -> None:
        """Keeps the lease as it is, and does not come back should it break."""
        self._leave()

    async def deregister(self) -> None:
        """Half-closes the stream and waits for the control plane to end it."""
        self._leave()
        self._leaving = True
        self._wake.set()
        if self._task is not None and self._machine.state is RegistrationState.LEAVING:
            await asyncio.wait({self._task}, timeout=ANSWER_TIMEOUT)
        await self.close()

    async def close(self) -> None:
        """Ends the stream at once; the lease lasts for its grace period."""
        self._leave()
        await end_tasks(self._task)

    def _leave(self) -> None:
        self._machine.leave(time.monotonic())
        self._changes.notify()

    async def _run(self) -> None:
        while self._machine.state is RegistrationState.WAITING:
            wait = self._machine.wait(time.monotonic())
            if wait > 0.0:
                await asyncio.sleep(wait)
                continue
            address = self._machine.attempt(time.monotonic())
            self._changes.notify()
            try:
                async with self._transport.open_channel(address, CONTROL_PLANE) as channel:
                    await self._hold(address, registry_pb2_grpc.RegistryServiceStub(channel))
            except grpc.aio.AioRpcError as error:
                details = error.details() or ""
                why = explain(details, "the control plane", secure=self._transport.secure)
                self._broken(address, why or f"{error.code().name}: {details}", refused=error.code() in _REFUSALS)
            except IdentityError as error:
                self._broken(address, str(error))
            except TimeoutError:
                self._broken(address, f"no answer within {ANSWER_TIMEOUT:g} s")

    def _broken(self, address: str, detail: str, *, refused: bool = False) -> None:
        if self._machine.state is RegistrationState.GONE:
            return
        self._machine.failed(time.monotonic(), f"{address}: {detail}", refused=refused)
        self._changes.notify()
        # A control plane ends connections that have become old, so that certificates are shown anew.
        level = logging.INFO if detail.endswith(MAX_AGE_REACHED) else logging.WARNING
        logger.log(level, "registration of %s/%s with %s: %s", self._service, self._endpoint.id, address, detail)

    async def _hold(self, address: str, stub: registry_pb2_grpc.RegistryServiceAsyncStub) -> None:
        """One lease, from its first request to its end; every other end than the one we asked for raises."""
        call = stub.Register()
        answers = asyncio.create_task(self._read(address, call))
        answers.add_done_callback(lambda _: self._wake.set())
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                stated = await self._state_endpoint(call)
                while self._machine.state is RegistrationState.ATTEMPTING and not answers.done():
                    await self._wake.wait()
                    self._wake.clear()
            while not answers.done() and not self._leaving:
                if self._endpoint is not stated:
                    stated = await self._state_endpoint(call)
                await self._wake.wait()
                self._wake.clear()
            if self._leaving:
                await call.done_writing()
            await answers
        finally:
            answers.cancel()
            call.cancel()
        if not self._leaving:
            self._broken(address, "the control plane ended the lease")
            return
        self._machine.left(time.monotonic())
        self._changes.notify()
        logger.info("deregistered %s/%s from %s", self._service, self._endpoint.id, address)

    async def _state_endpoint(self, call: _RegisterCall) -> Endpoint:
        endpoint = self._endpoint
        request = registry_pb2.RegisterRequest(
            service=self._service, endpoint=endpoint_to_proto(endpoint), lease_token=self._token
        )
        with contextlib.suppress(asyncio.InvalidStateError):  # the stream is over already; reading it tells why
            await call.write(request)
        return endpoint

    async def _read(self, address: str, call: _RegisterCall) -> None:
        async for response in call:
            self._token = response.lease_token or self._token
            if self._machine.state is RegistrationState.GONE:
                return
            if self._machine.confirmed(time.monotonic()):
                self._changes.notify()
                logger.info("registered %s/%s with %s", self._service, self._endpoint.id, address)
            self._wake.set()


_RegisterCall = grpc.aio.StreamStreamCall[registry_pb2.RegisterRequest, registry_pb2.RegisterResponse]


@dataclass(frozen=True, slots=True)
class DrainReport:
    """How a drain ended over all control planes.

    Attributes:
        answered: control planes that answered.
        acknowledged: subscribers that know that the endpoint leaves.
        pending: node ids of subscribers that may not know yet.
        failures: control planes that did not answer, each with the reason.
    """

    answered: int = 0
    acknowledged: int = 0
    pending: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()


async def drain_everywhere(
    addresses: Sequence[str],
    service: str,
    endpoint_id: str,
    timeout: float,
    transport: Transport,
    *,
    lease_token: str = "",
) -> DrainReport:
    """Takes an endpoint out of what the clients of every control plane get, and waits until they have acknowledged.

    Args:
        addresses: control planes.
        service: the endpoint's service.
        endpoint_id: the endpoint.
        timeout: seconds, at most 300; clients that have not acknowledged by then are reported as pending.
        transport: opens channels.
        lease_token: of the endpoint's lease: shows whose it is when this process has become another workload since.
    """
    request = registry_pb2.DrainRequest(service=service, endpoint_id=endpoint_id, lease_token=lease_token)
    request.timeout.FromNanoseconds(round(timeout * 1e9))
    # The control plane bounds the wait; the deadline is for one that hangs.
    results = await asyncio.gather(*(_drain(address, request, timeout + 1.0, transport) for address in addresses))
    answers = [result for result in results if isinstance(result, registry_pb2.DrainResponse)]
    return DrainReport(
        answered=len(answers),
        acknowledged=sum(answer.acknowledged for answer in answers),
        pending=tuple(node for answer in answers for node in answer.pending),
        failures=tuple(result for result in results if isinstance(result, str)),
    )


async def _drain(
    address: str, request: registry_pb2.DrainRequest, deadline: float, transport: Transport
) -> registry_pb2.DrainResponse | str:
    try:
        async with transport.open_channel(address, CONTROL_PLANE) as channel:
            return await registry_pb2_grpc.RegistryServiceStub(channel).Drain(request, timeout=deadline)
    except grpc.aio.AioRpcError as error:
        return f"{address}: {error.code().name} {error.details()}"
    except IdentityError as error:
        return f"{address}: {error}"
