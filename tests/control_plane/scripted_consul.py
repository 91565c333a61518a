"""An HTTP server that answers as Consul does, or as a test wants it to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from control_plane.sources.consul_http import ConsulAddress


@dataclass
class ScriptedConsul:
    """What it answers, by path; a path without an answer hangs, as a blocking query does while nothing changes."""

    port: int = 0
    answers: dict[str, web.Response] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str], str]] = field(default_factory=list)
    """Path, parameters and token of each request."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    ending: bool = False
    asked: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def address(self) -> ConsulAddress:
        return ConsulAddress("127.0.0.1", self.port)

    def answer(self, path: str, body: Any, *, index: int | None = 1, status: int = 200, **headers: str) -> None:
        """Sets the answer of a path from now on; questions that wait get it too."""
        if index is not None:
            headers["X-Consul-Index"] = str(index)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        if isinstance(body, bytes):
            self.answers[path] = web.Response(body=body, status=status, headers=names)
        else:
            self.answers[path] = web.json_response(body, status=status, headers=names)
        self.changed.set()
        self.changed = asyncio.Event()

    async def until_asked(self, times: int) -> None:
        """Returns when that many more questions came.

        Raises:
            TimeoutError: they do not within 30 s.
        """
        wanted = len(self.requests) + times
        async with asyncio.timeout(30.0):
            while len(self.requests) < wanted:
                self.asked.clear()
                await self.asked.wait()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.requests.append((request.path, dict(request.query), request.headers.get("X-Consul-Token", "")))
        self.asked.set()
        while not self.ending:
            made = self.answers.get(request.path)
            waits_for = int(request.query.get("index", 0))
            if made is not None and (
                made.status != 200 or waits_for == 0 or int(made.headers.get("X-Consul-Index", 0)) != waits_for
            ):
                return web.Response(body=made.body, status=made.status, headers=made.headers)
            await self.changed.wait()
        return web.Response(status=503)


@contextlib.asynccontextmanager
async def scripted_consul() -> AsyncIterator[ScriptedConsul]:
    """A running one."""
    consul = ScriptedConsul()
    runner = web.ServerRunner(web.Server(consul.handle), shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    consul.port = runner.addresses[0][1]
    try:
        yield consul
    finally:
        # Questions that hang are answered first: aiohttp's server does not end with them open.
        consul.ending = True
        consul.changed.set()
        await runner.cleanup()
