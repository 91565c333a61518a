"""A server's place in the mesh: the policy that it obeys, its registration, and how it leaves without a failed call."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

from mesh_client.policy_watch import PolicyWatch
from mesh_client.registration import LeaseRegistrar, NoRegistrar, Registrar, drain_everywhere
from mesh_client.tasks import end_tasks

if TYPE_CHECKING:
    from mesh_client.core.model import Endpoint
    from mesh_client.core.policy import ServicePolicy
    from mesh_client.core.registration import RegistrationStatus, Verdict
    from mesh_client.mesh import Mesh
    from mesh_client.server_settings import ServerSettings
    from mesh_client.telemetry import ReportedServer
    from mesh_client.transport import Transport

logger = logging.getLogger(__name__)

BLIND_DRAIN = 1.0
"""Seconds to go on serving when no control plane could be told of the drain."""

LINGER = 0.2
"""Seconds to go on serving after the drain, for calls that were on the wire when their caller acknowledged it."""


class Membership:
    """One server's policy and registration, from when it answers on its port to when its callers know that it leaves.

    Args:
        settings: of the server.
        transport: opens connections to control planes.
        mesh: where to read the service's own policy; None for a connection of its own.
        policy: a fixed policy in place of the control plane's.
        apply: obeys a policy.
        rng: draws waits.
        load: what the server counts of its calls, to be reported.
    """

    def __init__(
        self,
        settings: ServerSettings,
        transport: Transport,
        mesh: Mesh | None,
        policy: ServicePolicy | None,
        apply: Callable[[ServicePolicy], None],
        rng: Random,
        *,
        load: ReportedServer,
    ) -> None:
        self._settings = settings
        self._transport = transport
        self._mesh = mesh
        self._policy = policy
        self._apply = apply
        self._rng = rng
        self._policies = PolicyWatch(settings, transport, mesh, apply, load)
        self._registrar: Registrar = NoRegistrar("not started")
        self._joining: asyncio.Task[None] | None = None

    @property
    def status(self) -> RegistrationStatus:
        """Where the registration stands."""
        return self._registrar.status()

    async def changed(self) -> None:
        """Returns at the next change of the status."""
        await self._registrar.changed()

    def report(self, verdict: Verdict) -> None:
        """Passes on what a self-check found."""
        self._registrar.report(verdict)

    async def join(self, endpoint: Endpoint, verdict: Verdict) -> None:
        """Begins to follow the policy and to register, in the background.

        A secure server registers when it knows whom its policy allows to call it, or that the mesh does not know its
        service yet: its policy then comes with its registration.
        """
        self._registrar = self._make_registrar(endpoint)
        self._registrar.report(verdict)
        if self._mesh is not None:
            self._mesh.known_as(endpoint.id)
        if self._policy is not None:
            self._apply(self._policy)
            self._policies.report_load()
            self._registrar.start()
            return
        await self._policies.start()
        if self._transport.secure and not self._policies.settled:
            name = f"{self._settings.service}/{endpoint.id}"
            logger.info("%s registers once a control plane has told it whom its policy allows to call it", name)
            self._joining = asyncio.create_task(self._register_when_settled(), name=f"policy of {name}")
        else:
            self._registrar.start()

    async def _register_when_settled(self) -> None:
        await self._policies.until_settled()
        self._registrar.start()

    async def leave(self) -> None:
        """Returns when callers know that the server leaves, or can no longer be told, and it is registered nowhere."""
        await end_tasks(self._joining)
        await self._drain()
        await self._registrar.deregister()
        if self._in_mesh:
            await asyncio.sleep(LINGER)

    async def close(self) -> None:
        """Gives back everything that is open, and leaves the registry to find out by itself."""
        await end_tasks(self._joining)
        await self._registrar.close()
        await self._policies.stop()

    def _make_registrar(self, endpoint: Endpoint) -> Registrar:
        settings = self._settings
        if settings.registry.agent is not None:
            from mesh_client.consul_registration import ConsulRegistrar

            return ConsulRegistrar(
                settings.service, endpoint, settings.registry.agent, settings.check_interval, self._rng
            )
        if settings.registry.kind == "control-plane":
            return LeaseRegistrar(settings.service, endpoint, settings.control_planes, self._rng, self._transport)
        return NoRegistrar("by choice")

    async def _drain(self) -> None:
        settings = self._settings
        instance_id = settings.endpoint.id
        report, _ = await asyncio.gather(
            drain_everywhere(
                settings.control_planes,
                settings.service,
                instance_id,
                settings.drain_timeout,
                self._transport,
                lease_token=self._registrar.lease_token,
            ),
            asyncio.wait({asyncio.ensure_future(self._registrar.announce_drain())}, timeout=settings.drain_timeout),
        )
        name = f"{settings.service}/{instance_id}"
        for failure in report.failures:
            logger.warning("drain of %s: no answer from %s", name, failure)
        if report.pending:
            logger.warning("drain of %s: not acknowledged by %s", name, ", ".join(report.pending))
        if report.answered:
            logger.info("drain of %s: acknowledged by %d clients", name, report.acknowledged)
        elif self._in_mesh:
            await asyncio.sleep(min(BLIND_DRAIN, settings.drain_timeout))

    @property
    def _in_mesh(self) -> bool:
        return self._settings.registry.kind != "none" or bool(self._settings.control_planes)
