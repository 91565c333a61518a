"""What a policy makes of an API: its routes, and the document that describes them. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass

from gateway import openapi
from gateway.descriptors import Api
from gateway.routes import RouteTable, build
from mesh_client.core.edge_policy import EdgePolicy


@dataclass(frozen=True, slots=True)
class ApiInfo:
    """How the OpenAPI document introduces the API."""

    title: str | None = None
    """None: the edge's name."""
    version: str = "1"
    server: str | None = None
    """URL at which callers reach the edge."""


class ExposedApi:
    """Knows both for the policy that was asked for last: endpoints change more often than policies.

    Args:
        api: the protos of all services that policies may expose.
        info: for the document.
    """

    def __init__(self, api: Api, info: ApiInfo) -> None:
        self._api = api
        self._info = info
        self._last: tuple[EdgePolicy, RouteTable, str] | None = None

    def of(self, policy: EdgePolicy) -> tuple[RouteTable, str]:
        """The routes of the services that the policy exposes, and the OpenAPI document of these as JSON.

        Raises:
            GatewayError: the policy does not fit the protos, or these have routes that cannot be described.
        """
        if self._last is None or self._last[0] != policy:
            table, info = build(self._api, list(policy.services)), self._info
            title = policy.edge if info.title is None else info.title
            document = openapi.render(table, title=title, version=info.version, policy=policy, server=info.server)
            self._last = policy, table, json.dumps(document)
        return self._last[1], self._last[2]
