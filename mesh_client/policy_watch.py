"""A server's view of its own service's policy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from mesh_client.mesh import Mesh, connect

if TYPE_CHECKING:
    from mesh_client.core.policy import ServicePolicy
    from mesh_client.server_settings import ServerSettings


class PolicyWatch:
    """Obeys the service's own policy, through a mesh connection that is given or its own."""

    def __init__(self, settings: ServerSettings, mesh: Mesh | None, apply: Callable[[ServicePolicy], None]) -> None:
        self._settings = settings
        self._mesh = mesh
        self._apply = apply
        self._exits = contextlib.AsyncExitStack()

    async def start(self) -> None:
        """Begins to watch; the policy comes when the control plane has sent it."""
        settings = self._settings
        mesh = self._mesh
        if mesh is None:
            if not settings.control_planes:
                return
            mesh = await self._exits.enter_async_context(
                connect(
                    settings.control_planes,
                    service=settings.service,
                    zone=settings.endpoint.locality.zone,
                    region=settings.endpoint.locality.region,
                    node_id=settings.endpoint.id,
                )
            )
        self._exits.callback(mesh.watch_policy(settings.service, self._apply))

    async def stop(self) -> None:
        """Ends watching, and its own connection."""
        await self._exits.aclose()
