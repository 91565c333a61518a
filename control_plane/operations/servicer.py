"""OperationsService: what operators ask of processes that run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import grpc
import grpc.aio
from mesh.v1 import operations_pb2 as pb
from mesh.v1 import operations_pb2_grpc

from control_plane.access import Access, caller
from control_plane.access import Context as AnyContext
from control_plane.dashboard.links import DashboardLinks
from control_plane.dashboard.sessions import TooManyCodesError
from control_plane.operations.attendance import Attendances, Context, Stream
from control_plane.operations.diagnosis import Diagnosis
from control_plane.operations.drains import DrainRefusedError, OperatorDrains, UnknownEndpointError
from control_plane.operations.own_log import OwnLog, OwnProcess
from control_plane.operations.roster import CONTROL_PLANE, means
from control_plane.operations.tails import Tails, TooManyTailsError
from control_plane.registry import DEFAULT_DRAIN_TIMEOUT, MAX_DRAIN_TIMEOUT
from mesh_client.core.errors import ConfigError, InvalidValueError
from mesh_client.core.log_levels import DEFAULT_DURATION, check_duration, check_logger
from mesh_client.core.model import check_service_name

_TailContext = grpc.aio.ServicerContext[pb.TailLogsRequest, pb.TailLogsResponse]
_LevelContext = grpc.aio.ServicerContext[pb.SetLogLevelRequest, pb.SetLogLevelResponse]
_ListContext = grpc.aio.ServicerContext[pb.ListProcessesRequest, pb.ListProcessesResponse]

_DrainContext = grpc.aio.ServicerContext[pb.DrainEndpointsRequest, pb.DrainEndpointsResponse]
_DiagnosisContext = grpc.aio.ServicerContext[pb.GetDiagnosisRequest, pb.GetDiagnosisResponse]
_LinkContext = grpc.aio.ServicerContext[pb.CreateDashboardLinkRequest, pb.CreateDashboardLinkResponse]
_UndrainContext = grpc.aio.ServicerContext[pb.UndrainEndpointsRequest, pb.UndrainEndpointsResponse]

_log = logging.getLogger(__name__)


class OperationsServicer(operations_pb2_grpc.OperationsServiceServicer):
    """Serves ``mesh.v1.OperationsService``. To be made inside the event loop.

    All but `Attend` is for operators, which the gate sees to.

    Args:
        control_plane: name of this control plane.
        access: who may attend as what.
        max_streams: processes that may attend.
        log: the control plane's own log; None for one that cannot be asked.
        drains: takes endpoints out of what clients get.
        diagnosis: knows whether all is well.
        links: to the dashboard.
    """

    def __init__(
        self,
        control_plane: str,
        access: Access,
        max_streams: int,
        log: OwnLog | None,
        drains: OperatorDrains,
        diagnosis: Diagnosis,
        links: DashboardLinks,
    ) -> None:
        self._links = links
        self._drains = drains
        self._diagnosis = diagnosis
        self._attendances = Attendances(access, max_streams)
        self._own = None if log is None else OwnProcess(log, control_plane)
        self._tails = Tails(self._processes)
        if self._own is not None:
            self._own.deliver_to(self._tails)

    async def Attend(
        self, request_iterator: AsyncIterator[pb.AttendRequest], context: Context
    ) -> AsyncIterator[pb.AttendResponse]:
        """A process is at hand while the stream is open."""
        async with aclosing(self._attendances.serve(aiter(request_iterator), context, self._tails)) as responses:
            async for response in responses:
                yield response

    async def ListProcesses(self, request: pb.ListProcessesRequest, context: _ListContext) -> pb.ListProcessesResponse:
        """Those that attend."""
        return pb.ListProcessesResponse(
            processes=[
                process.described for process in self._processes() if request.service in ("", process.key.service)
            ]
        )

    async def SetLogLevel(self, request: pb.SetLogLevelRequest, context: _LevelContext) -> pb.SetLogLevelResponse:
        """Changes levels."""
        try:
            check_logger(request.logger)
            duration = request.duration
            seconds = duration.seconds + duration.nanos / 1e9 if request.HasField("duration") else DEFAULT_DURATION
            check_duration(seconds)
            if request.level not in pb.LogLevel.values():
                raise InvalidValueError("level", request.level, "a LogLevel")
        except InvalidValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        change = pb.ChangeLogLevel(logger=request.logger, level=request.level)
        change.duration.FromNanoseconds(round(seconds * 1e9))
        meant = self._find(request.service, request.instance)
        who, level = _who(context), pb.LogLevel.Name(request.level)
        _log.info("%s sets levels of %d processes of %s to %s", who, len(meant), request.service, level)
        errors = await asyncio.gather(*(process.change_level(change) for process in meant))
        return pb.SetLogLevelResponse(
            outcomes=[
                pb.LogLevelOutcome(process=process.described, error=error)
                for process, error in zip(meant, errors, strict=True)
            ]
        )

    async def TailLogs(self, request: pb.TailLogsRequest, context: _TailContext) -> AsyncIterator[pb.TailLogsResponse]:
        """Records, until there are no more or the operator leaves."""
        try:
            check_logger(request.logger)
            _log.info("%s reads the log of %s", _who(context), request.service)
            with self._tails.reading(request) as tail:
                async with aclosing(tail.responses()) as responses:
                    async for response in responses:
                        yield response
        except InvalidValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except TooManyTailsError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))

    async def DrainEndpoints(
        self, request: pb.DrainEndpointsRequest, context: _DrainContext
    ) -> pb.DrainEndpointsResponse:
        """Takes endpoints out of what clients get."""
        async with _refusing(context):
            service = check_service_name(request.service)
            timeout = DEFAULT_DRAIN_TIMEOUT
            if request.HasField("timeout"):
                timeout = request.timeout.seconds + request.timeout.nanos / 1e9
            if not 0.0 <= timeout <= MAX_DRAIN_TIMEOUT:
                raise InvalidValueError("timeout", timeout, f"0 to {MAX_DRAIN_TIMEOUT:.0f} seconds")
            who = _who(context)
            named = ", ".join(request.endpoint_ids) or "all endpoints"
            _log.warning("%s drains %s of %s%s", who, named, service, " by force" if request.force else "")
            endpoints = await self._drains.drain(service, request.endpoint_ids, timeout, who, force=request.force)
        return pb.DrainEndpointsResponse(endpoints=endpoints)

    async def UndrainEndpoints(
        self, request: pb.UndrainEndpointsRequest, context: _UndrainContext
    ) -> pb.UndrainEndpointsResponse:
        """Gives them to clients again."""
        async with _refusing(context):
            service = check_service_name(request.service)
            back = await self._drains.undrain(service, request.endpoint_ids)
        _log.warning("%s takes back the drain of %s of %s", _who(context), ", ".join(back) or "nothing", service)
        return pb.UndrainEndpointsResponse(endpoint_ids=back)

    async def GetDiagnosis(
        self, request: pb.GetDiagnosisRequest, context: _DiagnosisContext
    ) -> pb.GetDiagnosisResponse:
        """Facts on which `mesh check` decides."""
        return await self._diagnosis.gather("" if self._own is None else self._own.key.process)

    async def CreateDashboardLink(
        self, request: pb.CreateDashboardLinkRequest, context: _LinkContext
    ) -> pb.CreateDashboardLinkResponse:
        """A link to the dashboard, as whoever asks."""
        try:
            answer = self._links.create(context)
        except ConfigError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except TooManyCodesError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        _log.info("%s asked for a link to the dashboard", _who(context))
        return answer

    async def close(self) -> None:
        """Ends every stream, so that processes go to another control plane at once."""
        self._attendances.close()
        self._tails.close()
        if self._own is not None:
            await self._own.close()

    def _processes(self) -> list[OwnProcess | Stream]:
        own = [] if self._own is None else [self._own]
        # A service of that name would be taken for the control plane.
        return [*own, *(each for each in self._attendances.roster if each.key.service != CONTROL_PLANE)]

    def _find(self, service: str, instance: str) -> list[OwnProcess | Stream]:
        return [process for process in self._processes() if means(process, service, instance)]


def _who(context: AnyContext) -> str:
    """Who asks, as records have it."""
    who = caller(context)
    return "somebody" if who is None else who.spiffe_id


@asynccontextmanager
async def _refusing(context: AnyContext) -> AsyncIterator[None]:
    """Ends the call with the status code of the error that comes out of the block."""
    try:
        yield
    except InvalidValueError as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    except UnknownEndpointError as error:
        await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
    except DrainRefusedError as error:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
