"""A server's view of its own service's policy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from mesh_client.core.store import Resolution
from mesh_client.mesh import Mesh, make_mesh

if TYPE_CHECKING:
    from mesh_client.core.policy import ServicePolicy
    from mesh_client.server_settings import ServerSettings
    from mesh_client.telemetry import ReportedServer
    from mesh_client.transport import Transport


class PolicyWatch:
    """Obeys the service's own policy, through a mesh connection that is given or its own.

    Args:
        settings: of the server.
        transport: opens a connection of its own to the control planes.
        mesh: the connection to use; None for one of its own.
        apply: obeys a policy.
        load: what the server counts of its calls, which that connection reports.
    """

    def __init__(
        self,
        settings: ServerSettings,
        transport: Transport,
        mesh: Mesh | None,
        apply: Callable[[ServicePolicy], None],
        load: ReportedServer,
    ) -> None:
        self._load = load
        self._settings = settings
        self._transport = transport
        self._mesh = mesh
        self._apply = apply
        self._known = False
        self._exits = contextlib.AsyncExitStack()

    @property
    def settled(self) -> bool:
        """Whether the policy has been obeyed once, or a control plane has said that it does not know the service."""
        if self._known or self._mesh is None:
            return self._known
        return any(
            state.service == self._settings.service and state.resolution is Resolution.UNKNOWN
            for state in self._mesh.state().services
        )

    async def start(self) -> None:
        """Begins to watch; the policy comes when the control plane has sent it."""
        settings = self._settings
        if self._mesh is None:
            if not settings.control_planes:
                return
            self._mesh = await self._exits.enter_async_context(
                make_mesh(
                    settings.control_planes,
                    settings.service,
                    settings.endpoint.locality,
                    self._transport,
                    node_id=settings.endpoint.id,
                )
            )
        self.report_load()
        self._exits.callback(self._mesh.watch_policy(settings.service, self._obey))

    def report_load(self) -> None:
        """Begins to report the server's load, if there is a connection to do that on."""
        if self._mesh is not None:
            self._exits.callback(self._mesh.report_load_of(self._load))

    async def until_settled(self) -> None:
        """Returns once it is `settled`; only after `start`. At once where there is no control plane to wait for."""
        mesh = self._mesh
        while mesh is not None and not self.settled:
            await mesh.changed()

    async def stop(self) -> None:
        """Ends watching, and its own connection."""
        await self._exits.aclose()

    def _obey(self, policy: ServicePolicy) -> None:
        self._apply(policy)
        self._known = True
