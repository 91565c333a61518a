"""Processes of the mesh at hand for operators: real clients and servers, on a real control plane."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
import grpc.aio
import pytest
from mesh.v1 import operations_pb2 as pb
from mesh.v1 import operations_pb2_grpc

import mesh_client
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from mesh_client import log_service
from mesh_client.core.errors import InvalidValueError
from mesh_client.core.log_ring import LogFilter
from mesh_client.core.policy import Backoff, ServicePolicy
from mesh_client.log_service import LogService
from mesh_client.logs import Logs, current_logs
from mesh_client.testing import InMemoryControlPlane

log = logging.getLogger("shop")
SHOP = LogFilter(logger="shop")
TIMEOUT = 30.0

if TYPE_CHECKING:
    Stub: TypeAlias = operations_pb2_grpc.OperationsServiceAsyncStub


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Logs]:
    """The log of this process, written to nowhere."""
    monkeypatch.setattr("mesh_client.logs._current", None)
    level = logging.getLogger().level
    yield mesh_client.configure_logs(stream=io.StringIO())
    if (current := current_logs()) is not None:
        current.detach()
    logging.getLogger().setLevel(level)


@pytest.fixture
async def plane(logs: Logs) -> AsyncIterator[ControlPlane]:
    plane = ControlPlane(ControlPlaneOptions(insecure=True, control_plane_id="cp-1"), log=LogService(logs))
    await plane.start()
    yield plane
    await plane.stop(0.1)


@pytest.fixture
async def operator(plane: ControlPlane) -> AsyncIterator[Stub]:
    async with grpc.aio.insecure_channel(plane.address) as channel:
        yield operations_pb2_grpc.OperationsServiceStub(channel)


async def processes(operator: Stub, service: str, condition: Callable[[list[pb.Process]], bool]) -> list[pb.Process]:
    """Those of a service, once they are as expected."""
    async with asyncio.timeout(TIMEOUT):
        while True:
            answer = await operator.ListProcesses(pb.ListProcessesRequest(service=service))
            if condition(list(answer.processes)):
                return list(answer.processes)
            await asyncio.sleep(0.01)


async def last(operator: Stub, service: str = "orders", **request: Any) -> list[pb.LogRecord]:
    request = {"service": service, "last": 100, "logger": "shop", **request}
    call = operator.TailLogs(pb.TailLogsRequest(**request))
    return [record async for response in call for record in response.records]


async def test_a_client_and_its_server_are_one_process_with_all_their_names(
    plane: ControlPlane, operator: Stub
) -> None:
    async with mesh_client.connect(plane.address, service="orders", cache_dir="") as mesh:
        server = mesh_client.server("orders", control_plane=plane.address, mesh=mesh, instance_id="orders-1")
        await server.start()
        (process,) = await processes(operator, "orders", lambda them: bool(them) and "orders-1" in them[0].instances)
        assert list(process.instances) == ["orders-1", mesh.node_id]
        assert (process.version, process.grpc_version) == ("0.1.0", grpc.__version__)
        assert process.runtime.startswith("CPython 3.")
        assert process.clock.seconds > 0
        await server.stop(0)
    await processes(operator, "orders", lambda them: them == [])


async def test_a_server_by_itself_attends_by_its_instance(plane: ControlPlane, operator: Stub) -> None:
    server = mesh_client.server("orders", control_plane=plane.address, instance_id="orders-1")
    await server.start()
    (process,) = await processes(operator, "orders", lambda them: len(them) == 1)
    assert list(process.instances) == ["orders-1"]
    await server.stop(0)


async def test_one_whose_policy_is_fixed_too_if_it_has_a_client(plane: ControlPlane, operator: Stub) -> None:
    async with mesh_client.connect(plane.address, service="orders", cache_dir="") as mesh:
        policy = ServicePolicy(service="orders")
        server = mesh_client.server(
            "orders", control_plane=plane.address, mesh=mesh, policy=policy, instance_id="orders-1"
        )
        await server.start()
        await processes(operator, "orders", lambda them: bool(them) and "orders-1" in them[0].instances)
        await server.stop(0)


async def test_its_log_is_read_and_followed(plane: ControlPlane, operator: Stub, logs: Logs) -> None:
    log.warning("before, with a secret: Bearer abcdefgh12345678")
    async with mesh_client.connect(plane.address, service="orders", cache_dir="") as mesh:
        await processes(operator, "orders", bool)
        (record,) = await last(operator)
        assert record.message == "before, with a secret: Bearer [removed]"
        assert (record.service, record.instance, record.process) == ("orders", mesh.node_id, logs.process)
        assert record.level == pb.LOG_LEVEL_WARNING
        follow = operator.TailLogs(pb.TailLogsRequest(service="orders", last=5, logger="shop", follow=True))
        seen: list[pb.LogRecord] = []

        async def until(count: int) -> None:
            async with asyncio.timeout(TIMEOUT):
                while len(seen) < count:
                    response = await follow.read()
                    assert isinstance(response, pb.TailLogsResponse)
                    seen.extend(response.records)

        await until(1)
        log.info("placed", extra={"order": {"id": "o-1"}})
        await until(2)
        assert json.loads(seen[1].fields) == {"order": {"id": "o-1"}}
        threading.Thread(target=lambda: log.error("from a thread")).start()
        await until(3)
        assert seen[2].message == "from a thread"
        try:
            raise LookupError("lost")
        except LookupError:
            log.exception("went wrong")
        await until(4)
        assert seen[3].exception.endswith("LookupError: lost")
        follow.cancel()
        async with asyncio.timeout(TIMEOUT):
            while logs._sinks:
                await asyncio.sleep(0.01)


async def test_what_is_logged_faster_than_it_is_sent_is_counted(
    plane: ControlPlane, operator: Stub, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_service, "MAX_KEPT", 50)
    async with mesh_client.connect(plane.address, service="orders", cache_dir=""):
        await processes(operator, "orders", bool)
        follow = operator.TailLogs(pb.TailLogsRequest(service="orders", logger="shop", follow=True))
        await follow.read()
        async with asyncio.timeout(TIMEOUT):
            while not logs._sinks:
                await asyncio.sleep(0.01)
        for number in range(1_000):
            log.info("number %d", number)
        seen, dropped, newest = 0, 0, ""
        async with asyncio.timeout(TIMEOUT):
            while newest != "number 999":
                response = await follow.read()
                assert isinstance(response, pb.TailLogsResponse)
                seen += len(response.records)
                dropped += response.dropped
                newest = response.records[-1].message if response.records else newest
        assert seen + dropped == 1_000
        assert dropped > 500
        follow.cancel()


async def test_large_records_come_in_messages_that_are_not_too_large(plane: ControlPlane, operator: Stub) -> None:
    for _ in range(150):
        log.info("\U0001f600" * 8_000)
    async with mesh_client.connect(plane.address, service="orders", cache_dir=""):
        await processes(operator, "orders", bool)
        records = await last(operator, last=1_000)
    assert 100 <= len(records) <= 150  # as many as are kept


async def test_levels_change_for_a_while_and_fall_back_by_themselves(plane: ControlPlane, operator: Stub) -> None:
    async with mesh_client.connect(plane.address, service="orders", cache_dir=""):
        await processes(operator, "orders", bool)

        async def change(level: pb.LogLevel.ValueType, seconds: float = 600.0, logger: str = "shop") -> str:
            request = pb.SetLogLevelRequest(service="orders", logger=logger, level=level)
            request.duration.FromNanoseconds(round(seconds * 1e9))
            (outcome,) = (await operator.SetLogLevel(request)).outcomes
            return outcome.error

        assert await change(pb.LOG_LEVEL_DEBUG) == ""
        assert log.getEffectiveLevel() == logging.DEBUG
        assert await change(pb.LOG_LEVEL_ERROR, 2.0) == ""  # longer than its answer may take
        assert log.getEffectiveLevel() == logging.ERROR
        async with asyncio.timeout(TIMEOUT):
            while log.level:
                await asyncio.sleep(0.01)
        assert await change(pb.LOG_LEVEL_DEBUG) == ""
        assert await change(pb.LOG_LEVEL_UNSPECIFIED) == ""
        assert await change(pb.LOG_LEVEL_UNSPECIFIED) == ""
        assert log.level == logging.NOTSET
        for number in range(100):
            assert await change(pb.LOG_LEVEL_DEBUG, logger=f"shop.{number}") == ""
        assert "at most 100" in await change(pb.LOG_LEVEL_DEBUG)
        assert logging.getLogger("shop.7").level == logging.DEBUG
    assert logging.getLogger("shop.7").level == logging.NOTSET


async def test_levels_outlast_the_connection(plane: ControlPlane, operator: Stub) -> None:
    async with mesh_client.connect(plane.address, service="orders", cache_dir="") as mesh:
        (before,) = await processes(operator, "orders", bool)
        await operator.SetLogLevel(pb.SetLogLevelRequest(service="orders", logger="shop", level=pb.LOG_LEVEL_DEBUG))
        for client in list(plane._hub._streams):
            client.end(grpc.StatusCode.UNAVAILABLE, "go elsewhere")
        # It may be back before anybody has seen that it was gone.
        await processes(operator, "orders", lambda them: any(each.clock != before.clock for each in them))
        assert log.level == logging.DEBUG
        del mesh
    assert log.level == logging.NOTSET


async def test_the_control_planes_own_log_and_levels_are_there_too(plane: ControlPlane, operator: Stub) -> None:
    log.info("something of the control plane's")
    (process,) = await processes(operator, "control-plane", bool)
    assert list(process.instances) == ["cp-1"]
    (record,) = await last(operator, "control-plane")
    assert (record.service, record.instance) == ("control-plane", "cp-1")
    follow = operator.TailLogs(pb.TailLogsRequest(service="control-plane", logger="shop", follow=True))
    await follow.read()
    await follow.read()
    log.info("more of it", extra={"a": 1})
    response = await follow.read()
    assert isinstance(response, pb.TailLogsResponse)
    assert [each.message for each in response.records] == ["more of it"]
    follow.cancel()
    request = pb.SetLogLevelRequest(service="control-plane", instance="cp-1", logger="shop", level=pb.LOG_LEVEL_DEBUG)
    (outcome,) = (await operator.SetLogLevel(request)).outcomes
    assert (outcome.error, log.level) == ("", logging.DEBUG)
    await plane.stop(0.1)
    assert log.level == logging.NOTSET


@pytest.mark.parametrize("why", ["MESH_OPERATIONS=0", "no log"])
async def test_a_process_attends_only_if_it_is_wanted_and_has_a_log(
    why: str, plane: ControlPlane, operator: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "no log":
        monkeypatch.setattr("mesh_client.logs._current", None)
    else:
        monkeypatch.setenv("MESH_OPERATIONS", "0")
    async with mesh_client.connect(plane.address, service="orders", cache_dir="") as mesh:
        mesh.known_as("orders-1")
        await mesh.synced()
        await asyncio.sleep(0)
        assert (await operator.ListProcesses(pb.ListProcessesRequest(service="orders"))).processes == []


async def test_a_control_plane_without_operations_is_none_the_worse(logs: Logs) -> None:
    async with InMemoryControlPlane() as plane:
        plane.set_endpoints("inventory")
        async with mesh_client.connect(plane.address, service="orders", cache_dir="") as mesh:
            mesh.channel("inventory")
            await mesh.synced()
    assert [kept.entry.message for kept in logs.last(10, LogFilter(30, "mesh_client.attendance"))] == []


async def test_one_that_is_refused_says_so_once_and_goes_on(
    plane: ControlPlane, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(process: pb.Process, *, secure: bool) -> pb.Process:
        raise InvalidValueError("process", process.id, "another one")

    monkeypatch.setattr("control_plane.operations.attendance._checked", refuse)
    told = LogFilter(30, "mesh_client.attendance")
    async with mesh_client.connect(plane.address, service="orders", cache_dir="") as mesh:
        await mesh.synced()
        for _ in range(2):
            async with asyncio.timeout(TIMEOUT):
                while not logs.last(10, told):
                    await asyncio.sleep(0.01)
            for client in list(plane._hub._streams):
                client.end(grpc.StatusCode.UNAVAILABLE, "go elsewhere")
            await mesh.changed()
            await mesh.synced()
    (kept,) = logs.last(10, told)
    assert kept.entry.message.startswith("operators cannot ask this process: INVALID_ARGUMENT: process: ")


async def test_one_that_is_turned_away_tries_again(
    plane: ControlPlane, operator: Stub, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh_client.attendance.RETRY", Backoff(initial=0.01, max=0.01, multiplier=1.0))
    logging.getLogger("mesh_client.attendance").setLevel(logging.DEBUG)
    plane._operations._attendances._max_streams = 0
    async with mesh_client.connect(plane.address, service="orders", cache_dir=""):
        async with asyncio.timeout(TIMEOUT):
            while not logs.last(10, LogFilter(10, "mesh_client.attendance")):
                await asyncio.sleep(0.01)
        plane._operations._attendances._max_streams = 10
        await processes(operator, "orders", bool)
    logging.getLogger("mesh_client.attendance").setLevel(logging.NOTSET)
