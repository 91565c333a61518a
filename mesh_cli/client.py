"""How the `mesh` command talks to a control plane: the one place that makes its channel, and that names its errors."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self, TypeVar

import grpc
from mesh.v1 import admin_pb2_grpc

from mesh_client.core.errors import MeshError

Request = TypeVar("Request")
Response = TypeVar("Response")

CHANNEL_OPTIONS: tuple[tuple[str, object], ...] = (
    # A status with thousands of clients is larger than gRPC's default of 4 MiB.
    ("grpc.max_receive_message_length", 256 * 1024 * 1024),
    ("grpc.enable_http_proxy", 0),
)

_CONNECTED_WITHIN = 0.25
"""Seconds in which a channel that has just been answered shows that it is connected. It is a thread's wake-up."""

_ANSWERED_BY_NOBODY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class UnreachableError(MeshError):
    """No control plane could be reached; the message says which were tried and what to do."""


class RefusedError(MeshError):
    """The control plane answered with an error.

    Attributes:
        code: its status code.
        details: its message alone.
    """

    def __init__(self, code: grpc.StatusCode, details: str, address: str) -> None:
        super().__init__(f"the control plane at {address} answered {code.name}: {details}")
        self.code = code
        self.details = details


def open_channel(address: str) -> grpc.Channel:
    """A channel to one control plane, in plaintext. Whoever adds identity to the command changes this alone."""
    return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)


class AdminClient:
    """Calls `AdminService` of the first control plane of a list that can be reached.

    Args:
        addresses: ``host:port`` of each control plane, the preferred one first; at least one.
        timeout: seconds within which each must connect, and each call must be answered.
    """

    def __init__(self, addresses: Sequence[str], timeout: float) -> None:
        self._addresses = tuple(addresses)
        self._timeout = timeout
        self._channel: grpc.Channel | None = None
        self._stub: admin_pb2_grpc.AdminServiceStub | None = None
        self.address = self._addresses[0]
        """The control plane that is called."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; the next call opens another."""
        if self._channel is not None:
            self._channel.close()
        self._channel = self._stub = None

    @property
    def stub(self) -> admin_pb2_grpc.AdminServiceStub:
        """The stub whose methods `call` takes."""
        if self._stub is None:
            self._channel = self._connect()
            self._stub = admin_pb2_grpc.AdminServiceStub(self._channel)
        return self._stub

    def call(self, method: grpc.UnaryUnaryMultiCallable[Request, Response], request: Request) -> Response:
        """The answer to one request.

        Raises:
            UnreachableError: nobody answered in time.
            RefusedError: the control plane answered with an error.
        """
        try:
            return method(request, timeout=self._timeout)
        except grpc.RpcError as error:
            raise self._explain(error) from None

    def _connect(self) -> grpc.Channel:
        """A channel to the first address that accepts a connection, or to the last: its failure is then the call's."""
        *preferred, last = self._addresses
        for address in preferred:
            channel = open_channel(address)
            if _connects(channel, self._timeout):
                self.address = address
                return channel
            channel.close()
        self.address = last
        return open_channel(last)

    def _explain(self, error: grpc.RpcError) -> MeshError:
        code, details = error.code(), error.details() or ""
        if code in _ANSWERED_BY_NOBODY:
            if self._channel is None or not _is_connected(self._channel):
                # gRPC prefixes the cause with the history of the channel; the cause alone helps.
                return UnreachableError(unreachable_message(self._addresses, details.rpartition("last error: ")[2]))
            if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                return UnreachableError(
                    f"the control plane at {self.address} did not answer within {self._timeout:g} s; "
                    "it may be overloaded: try a longer --timeout, and look at its log"
                )
        if code is grpc.StatusCode.UNIMPLEMENTED:
            details = "it is not a grpc-mesh control plane, or one of another version; check --control-plane"
        return RefusedError(code, details, self.address)


def unreachable_message(addresses: Sequence[str], cause: str) -> str:
    """What to tell somebody whose control plane cannot be reached."""
    cause = " ".join(cause.split())
    return (
        f"cannot reach the control plane at {' or '.join(addresses)} ({cause}); is it running? "
        "Start one with `mesh control-plane`, or name another with --control-plane or MESH_CONTROL_PLANE"
    )


def _connects(channel: grpc.Channel, timeout: float) -> bool:
    """Whether the channel connects at its first try, within ``timeout`` seconds."""
    settled = threading.Event()
    seen: list[grpc.ChannelConnectivity] = []

    def watch(state: grpc.ChannelConnectivity) -> None:
        if state in (grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE):
            seen.append(state)
            settled.set()

    channel.subscribe(watch, try_to_connect=True)
    settled.wait(timeout)
    channel.unsubscribe(watch)
    return seen[:1] == [grpc.ChannelConnectivity.READY]


def _is_connected(channel: grpc.Channel) -> bool:
    """Whether the other side is there, so that an error is its own and not the connection's."""
    try:
        grpc.channel_ready_future(channel).result(timeout=_CONNECTED_WITHIN)
    except grpc.FutureTimeoutError:
        return False
    return True
