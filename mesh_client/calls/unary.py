"""Calls with one response."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any

import grpc
import grpc.aio
from grpc.aio import AioRpcError

from mesh_client.calls.base import MeshCall
from mesh_client.calls.requests import StreamingRequests
from mesh_client.multicallable import Request, Response


class UnaryResponse(MeshCall[Request, Response]):
    """A call that is awaited for its one response."""

    def __await__(self) -> Generator[Any, None, Response]:
        """The response.

        Raises:
            MeshRpcError: the call failed.
            asyncio.CancelledError: it was cancelled.
        """
        try:
            while True:
                call = self._call
                if call is None:
                    if self._error is not None:
                        raise self._error
                    yield from self._next_change().__await__()
                    continue
                self._attended = True
                try:
                    response: Response = yield from call.__await__()
                except AioRpcError:
                    self._attended = False
                    yield from self._ended_well(call).__await__()
                    if self._error is not None:
                        raise self._error from None
                except BaseException:
                    self._attended = False
                    if call.done():  # before its end was seen
                        self.attempt_done(call)
                    raise
                else:
                    if self._code is None and call is self._call:
                        self._succeeded()
                    return response
        except asyncio.CancelledError:
            self.cancel()
            raise
        except AioRpcError:
            raise
        except Exception:
            # Such as metadata that grpc finds bad when it sends it: it leaves such calls open.
            self.cancel()
            raise


class UnaryUnaryCall(UnaryResponse[Request, Response], grpc.aio.UnaryUnaryCall[Request, Response]):
    """One request, one response."""


class StreamUnaryCall(
    StreamingRequests[Request, Response],
    UnaryResponse[Request, Response],
    grpc.aio.StreamUnaryCall[Request, Response],
):
    """A stream of requests, one response."""
