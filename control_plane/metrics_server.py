"""The endpoint at which Prometheus scrapes a control plane."""

from __future__ import annotations

import asyncio
import logging

from aiohttp import web
from prometheus_client.exposition import choose_encoder

from control_plane.addresses import split_address
from control_plane.metrics import Collected, ControlPlaneCollector
from mesh_client.core.errors import ConfigError

PATH = "/metrics"

_log = logging.getLogger(__name__)


class MetricsServer:
    """Serves metrics until it is closed.

    Args:
        collector: what is served.

    Attributes:
        address: ``host:port`` where it listens, once started.
    """

    def __init__(self, collector: ControlPlaneCollector) -> None:
        self.address = ""
        self._collector = collector
        self._runner: web.AppRunner | None = None

    async def start(self, address: str) -> None:
        """Listens.

        Raises:
            ConfigError: the address cannot be used.
        """
        host, port = split_address(address)
        app = web.Application(client_max_size=1024)
        app.router.add_get(PATH, self._answer)
        runner = self._runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            await self.close()
            raise ConfigError(f"metrics_address: cannot listen on {address!r}: {error.strerror}") from error
        self.address = f"{address.rpartition(':')[0]}:{runner.addresses[0][1]}"
        _log.info("metrics are at http://%s%s", self.address, PATH)

    async def close(self) -> None:
        """Stops listening."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _answer(self, request: web.Request) -> web.Response:
        # Collected at one moment, between two steps of this loop; written elsewhere, so that streams need not wait.
        collected = Collected(self._collector.collect())
        accept = ",".join(request.headers.getall("Accept", ()))
        body, content_type = await asyncio.to_thread(_written, collected, accept)
        headers = {"Content-Type": content_type, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        return web.Response(body=body, headers=headers)


def _written(collected: Collected, accept: str) -> tuple[bytes, str]:
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # a version that is none
        encode, content_type = choose_encoder("")
    return encode(collected), content_type
