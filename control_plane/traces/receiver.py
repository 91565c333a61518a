"""OTLP's TraceService: on the mesh port bound to the identity of whoever calls, on the plain port open to this host."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    DESCRIPTOR,
    ExportTracePartialSuccess,
    ExportTraceServiceResponse,
)

from control_plane.access import Access
from control_plane.identity.limits import CallerLimits, StreamLimits
from control_plane.traces.intake import Intake, Sender, Verdict
from control_plane.traces.otlp_wire import MalformedRequestError

SERVICE = DESCRIPTOR.services_by_name["TraceService"].full_name

MAX_AT_ONCE, MAX_OF_ONE = 32, 4
"""Requests that are read at once, of all senders and of one: each may have 4 MiB."""
SEND_TIMEOUT = 10.0
"""Seconds that a sender has to send what it has begun to send."""

_Context = grpc.aio.ServicerContext[Any, ExportTraceServiceResponse]

_log = logging.getLogger(__name__)


class OtlpReceiver:
    """Serves ``opentelemetry.proto.collector.trace.v1.TraceService``.

    A sender is refused with RESOURCE_EXHAUSTED before its request is read when it has sent too much; what is wrong with
    single spans is in the response's ``partial_success``.

    Args:
        intake: takes spans in.
        access: who may send. A workload's spans are its service's, whatever they say; without identities they are whose
            they say.
    """

    def __init__(self, intake: Intake, access: Access) -> None:
        self._intake = intake
        self._access = access
        self._of_one = StreamLimits(MAX_OF_ONE)
        self._at_once = StreamLimits(MAX_AT_ONCE)
        self._told = CallerLimits(1.0 / 60.0, 1)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Adds the service to a server that is not started."""
        # Callers see a unary method. But the handler of one is called once the request has been read, whoever sent it.
        handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_unary_rpc_method_handler(
            self.Export, response_serializer=ExportTraceServiceResponse.SerializeToString
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Export": handler}),))

    async def Export(self, requests: AsyncIterator[bytes], context: _Context) -> ExportTraceServiceResponse:
        """Takes spans in."""
        sender = await self._sender(context)
        if reason := self._intake.refusal(sender):
            await self._exhausted(sender, reason, context)
        with self._of_one.admit(sender.key) as one, self._at_once.admit("") as all_of_them:
            if not (one and all_of_them):
                await self._exhausted(sender, "too many requests at once; send one after the other", context)
            try:
                async with asyncio.timeout(SEND_TIMEOUT):
                    body = await anext(requests, b"")
            except TimeoutError:
                await context.abort(
                    grpc.StatusCode.DEADLINE_EXCEEDED, f"the request did not come within {SEND_TIMEOUT:g} s"
                )
            try:
                verdict = await self._intake.take(body, sender)
            except MalformedRequestError as error:
                self._tell(sender, str(error))
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return self._answer(verdict, sender)

    async def _sender(self, context: _Context) -> Sender:
        who = await self._access.require_workload(context, "send traces")
        if who is None:
            return Sender(context.peer())
        return Sender(who.workload_id, who.service, who.workload_id)

    async def _exhausted(self, sender: Sender, reason: str, context: _Context) -> None:
        self._tell(sender, reason)
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, reason)

    def _answer(self, verdict: Verdict, sender: Sender) -> ExportTraceServiceResponse:
        explanation = verdict.explanation
        if not explanation:
            return ExportTraceServiceResponse()
        self._tell(sender, explanation)
        return ExportTraceServiceResponse(
            partial_success=ExportTracePartialSuccess(rejected_spans=verdict.refused.total(), error_message=explanation)
        )

    def _tell(self, sender: Sender, what: str) -> None:
        """Once a minute for each sender: one that does not give up must not fill the log."""
        if not self._told.take(sender.key, asyncio.get_running_loop().time()):
            _log.warning("traces of %s: %s", sender, what)
