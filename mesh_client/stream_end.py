"""How a stream that is read and written at once has ended, in the server's own words."""

from __future__ import annotations

import asyncio
from typing import Any

from grpc.aio import AioRpcError

from mesh_client.at_once import at_once
from mesh_client.calls.requests import WRITE_FAILED

_LOOKS = 100
_LOOK = 0.01
"""Seconds between looks."""


class StreamEnd:
    """Notes the end of a stream: what grpc raises to whoever reads may be of a request which that end has crossed.

    Args:
        call: the stream; its classes are private to grpc.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self._noted: AioRpcError | None = None
        call.add_done_callback(self._note)

    async def instead_of(self, error: AioRpcError) -> AioRpcError:
        """Why the stream ended, given what grpc raised."""
        error = self._noted or error
        for _ in range(_LOOKS):
            if error.details() != WRITE_FAILED:
                break
            await asyncio.sleep(_LOOK)
            error = self._status()
        return error

    def _note(self, ended: Any) -> None:
        del ended
        self._noted = self._status()

    def _status(self) -> AioRpcError:
        call = self._call
        return AioRpcError(
            at_once(call.code()),
            at_once(call.initial_metadata()),
            at_once(call.trailing_metadata()),
            at_once(call.details()),
        )
