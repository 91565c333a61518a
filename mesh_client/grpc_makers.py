"""grpc.aio's own ways to make channels and servers, whatever has been put in their place.

OpenTelemetry's contrib instrumentation replaces ``grpc.aio.insecure_channel``, ``secure_channel`` and ``server`` by
ones that add interceptors. Calls of the mesh have spans of their own: they would have two, and pay for interceptors.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import grpc.aio

_channel = importlib.import_module("grpc.aio._channel")
_server = importlib.import_module("grpc.aio._server")

insecure_channel: Callable[..., grpc.aio.Channel] = _channel.insecure_channel
secure_channel: Callable[..., grpc.aio.Channel] = _channel.secure_channel
server: Callable[..., grpc.aio.Server] = _server.server
