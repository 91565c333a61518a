"""Kong's admin API as far as a gateway uses it, on a real socket: what Kong 3.9 without a database answers.

Written after kong/api/routes/config.lua and health.lua of Kong 3.9, and what was measured with one. It is the other
side; nothing of the gateway is in it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

from tests.ports import held_address

EMPTY = "0" * 32


class KongServer:
    """A Kong that can be down, slow, busy, and restarted."""

    def __init__(self) -> None:
        self.address = ""
        self.loads: list[dict[str, Any]] = []
        """Configurations that it has loaded."""
        self.asked: list[tuple[str, int]] = []
        """Requests to ``/config``, with what was answered."""
        self.header: tuple[str, str] | None = None
        """What requests must have."""
        self.delay = 0.0
        self.answers: list[web.Response] = []
        """In place of what it would do, for the next requests to ``/config``."""
        self.page = 1_000
        self._hash = EMPTY
        self._runner: web.AppRunner | None = None

    @property
    def configuration(self) -> dict[str, Any]:
        """What it has loaded last; nothing after a start."""
        return self.loads[-1] if self._hash != EMPTY else {}

    def targets(self, upstream: str) -> list[str]:
        """The targets that it has."""
        for entity in self.configuration.get("upstreams", []):
            if entity["name"] == upstream:
                return [item["target"] for item in entity["targets"]]
        return []

    def restart(self) -> None:
        """It has nothing any more."""
        self._hash = EMPTY

    def replace(self, text: str) -> None:
        """Somebody else gives it a configuration."""
        self._load(text)

    async def start(self, port: int = 0, socket: Path | None = None) -> None:
        app = web.Application(middlewares=[self._authorize])
        app.add_routes(
            [
                web.post("/config", self._config),
                web.get("/status", self._status),
                web.get("/upstreams/{name}/targets", self._targets),
            ]
        )
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site: web.BaseSite
        if socket is not None:
            site = web.UnixSite(self._runner, str(socket))
        else:
            site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        if socket is None:
            self.address = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @web.middleware
    async def _authorize(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.header is not None and request.headers.get(self.header[0]) != self.header[1]:
            return web.json_response({"message": "Unauthorized"}, status=401)
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _config(self, request: web.Request) -> web.StreamResponse:
        answer = await self._answer(request)
        self.asked.append((request.path_qs, answer.status))
        return answer

    async def _answer(self, request: web.Request) -> web.Response:
        await asyncio.sleep(self.delay)
        if self.answers:
            return self.answers.pop(0)
        text = (await request.json()).get("config")
        if not isinstance(text, str):
            return web.json_response({"message": "expected a declarative configuration"}, status=400)
        try:
            document = yaml.safe_load(text)
        except yaml.YAMLError:
            return _invalid({"error": "failed parsing declarative configuration"})
        if request.query.get("check_hash") == "1" and _hash(text) == self._hash:
            return web.Response(status=304)
        if document.get("_format_version") != "3.0":
            return _invalid({"_format_version": "expected one of: 1.1, 2.1, 3.0"})
        for index, service in enumerate(document.get("services", [])):
            if service["protocol"] not in ("grpc", "grpcs"):
                entry = {"protocol": "expected one of: grpc, grpcs", "@entity": [f"got {text}"]}
                return _invalid({"services": [None] * index + [entry]})
        self._load(text)
        # The real one answers with all entities, keys included.
        return web.json_response(document, status=201)

    def _load(self, text: str) -> None:
        self.loads.append(yaml.safe_load(text))
        self._hash = _hash(text)

    async def _status(self, request: web.Request) -> web.Response:
        return web.json_response({"configuration_hash": self._hash, "database": {"reachable": True}})

    async def _targets(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if not any(entity["name"] == name for entity in self.configuration.get("upstreams", [])):
            return web.json_response({"message": "Not found"}, status=404)
        start, size = int(request.query.get("offset", "0")), min(int(request.query.get("size", "100")), self.page)
        found = [{"target": target, "weight": 100} for target in self.targets(name)]
        following = f"/upstreams/{name}/targets?offset={start + size}" if start + size < len(found) else None
        return web.json_response({"data": found[start : start + size], "next": following})


def _hash(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _invalid(fields: dict[str, Any]) -> web.Response:
    body = {
        "code": 14,
        "name": "invalid declarative configuration",
        "message": f"declarative config is invalid: {fields}",
        "fields": fields,
    }
    return web.json_response(body, status=400)


@asynccontextmanager
async def running_kong() -> AsyncIterator[KongServer]:
    """One that runs."""
    kong = KongServer()
    with held_address() as address:  # tests stop it and start it again
        await kong.start(int(address.rpartition(":")[2]))
        try:
            yield kong
        finally:
            await kong.stop()
