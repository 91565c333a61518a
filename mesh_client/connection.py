"""The connection to one endpoint."""

from __future__ import annotations

from typing import Any, Protocol

import grpc.aio

from mesh_client.core.balancer import Node

FOR_EVER = 1e9
"""Seconds, some 30 years: calls in flight end by themselves."""


class Method(Protocol):
    """A method, as far as a connection needs to know it."""

    key: int

    def make(self, channel: grpc.aio.Channel) -> Any:
        """Makes grpc's multicallable on a channel."""


class Connection:
    """A grpc channel to one endpoint, with its multicallables made once.

    Connects when first called. Belongs to the event loop that it was made in.

    Args:
        node: the endpoint.
        channel: to it.
    """

    __slots__ = ("channel", "explained", "multicallables", "node")

    def __init__(self, node: Node, channel: grpc.aio.Channel) -> None:
        self.node = node
        self.channel = channel
        self.multicallables: dict[int, Any] = {}
        self.explained = False
        """Whether it has been logged why it cannot be made."""

    def multicallable(self, method: Method) -> Any:
        """Grpc's multicallable for the method on this connection."""
        made = self.multicallables[method.key] = method.make(self.channel)
        return made

    async def retire(self) -> None:
        """Closes when the last call in flight on it has ended. It must be out of every picker's reach already.

        Closing earlier would raise CancelledError inside the application's await. Grpc knows the calls of its own
        channel; those of the connection that came in place of this one to the same endpoint do not hold it up.
        """
        await self.channel.close(FOR_EVER)
