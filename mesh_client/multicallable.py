"""Methods of a service, ready to be called on any of its connections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import grpc.aio
from grpc.aio import UsageError

from mesh_client.target import Target

Request = TypeVar("Request")
Response = TypeVar("Response")
CLOSED = "Channel is closed."
Serializer = Callable[[Request], bytes]
Deserializer = Callable[[bytes], Response]


class Closable(Protocol):
    """A channel, as far as its methods need to know it."""

    target: Target
    closed: bool


class MultiCallable(Generic[Request, Response]):
    """A method of a service, ready to be called. The base of the four kinds.

    Attributes:
        target: the service.
        name: full method name with leading slash.
        serialise: gives the request as it is sent, once for all attempts. What it raises reaches the application; grpc
            would send an empty message instead.
        key: finds this method among a connection's multicallables.
    """

    kind = ""

    def __init__(
        self,
        channel: Closable,
        name: str,
        request_serializer: Serializer[Request] | None,
        response_deserializer: Deserializer[Response] | None,
        registered: bool | None,
    ) -> None:
        self.channel = channel
        self.target = channel.target
        self.name = name
        self.request_serializer = request_serializer
        self.serialise: Callable[[Request], Any] = _as_it_is if request_serializer is None else request_serializer
        self.response_deserializer = response_deserializer
        self.key: int = channel.target.method_key(self.kind, name, response_deserializer)
        self._registered = registered

    def make(self, channel: grpc.aio.Channel) -> Any:
        """Makes grpc's multicallable on a channel."""
        make = getattr(channel, self.kind)
        return make(self.name, None, self.response_deserializer, _registered_method=self._registered)

    def refuse(self) -> NoReturn:
        """Raises `UsageError`, because the channel has been closed."""
        raise UsageError(CLOSED)


def _as_it_is(request: Request) -> Request:
    return request
