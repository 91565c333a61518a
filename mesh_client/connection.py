"""The connection to one endpoint."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import grpc.aio

from mesh_client import transport
from mesh_client.core.balancer import Node

RETIRE_POLL = 0.1
"""Seconds between looks at whether calls are still in flight on an endpoint that has left."""


class Method(Protocol):
    """A method, as far as a connection needs to know it."""

    key: int

    def make(self, channel: grpc.aio.Channel) -> Any:
        """Makes grpc's multicallable on a channel."""


class Connection:
    """A grpc channel to one endpoint, with its multicallables made once.

    Connects when first called. Belongs to the event loop that it was made in.
    """

    __slots__ = ("channel", "multicallables", "node")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.channel = transport.open_channel(node.endpoint.target)
        self.multicallables: dict[int, Any] = {}

    def multicallable(self, method: Method) -> Any:
        """Grpc's multicallable for the method on this connection."""
        made = self.multicallables[method.key] = method.make(self.channel)
        return made

    async def retire(self) -> None:
        """Closes when the last call in flight has ended. The endpoint must be out of every picker already.

        Closing earlier would raise CancelledError inside the application's await.
        """
        while self.node.load.outstanding:  # An event would put work at the end of every call.
            await asyncio.sleep(RETIRE_POLL)
        await self.channel.close()
