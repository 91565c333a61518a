"""Attacks on what operators see of running processes: on their logs and levels, and on whom they take a process for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from mesh.v1 import operations_pb2 as pb

from control_plane.operations import attendance
from mesh_client.core.identity import Principal
from tests.security.world import DOMAIN, TIMEOUT, Raw, World, refused, until

DENIED = grpc.StatusCode.PERMISSION_DENIED


def process(service: str, id: str = "p1", instance: str = "") -> pb.AttendRequest:
    return pb.AttendRequest(process=pb.Process(service=service, id=id, instances=[instance or f"{service}-1"]))


@asynccontextmanager
async def attending(raw: Raw, service: str, id: str = "p1") -> AsyncIterator[Any]:
    """A stream on which a process attends, as far as it is let."""
    call: Any = raw.operations.Attend(timeout=6 * TIMEOUT)
    try:
        await call.write(process(service, id))
        yield call
    finally:
        call.cancel()


async def known(world: World, count: int) -> None:
    """Returns when so many attend."""
    await until(lambda: len(world.plane._operations._attendances.roster) == count)


async def test_what_operators_do_is_for_operators(world: World) -> None:
    for who in (await world.join("orders"), await world.join("control-plane")):
        async with world.mesh(who) as raw:
            stub = raw.operations
            requests = (
                stub.ListProcesses(pb.ListProcessesRequest(), timeout=TIMEOUT),
                stub.DrainEndpoints(pb.DrainEndpointsRequest(service="orders"), timeout=TIMEOUT),
                stub.UndrainEndpoints(pb.UndrainEndpointsRequest(service="orders"), timeout=TIMEOUT),
                stub.GetDiagnosis(pb.GetDiagnosisRequest(), timeout=TIMEOUT),
                stub.SetLogLevel(pb.SetLogLevelRequest(service="orders"), timeout=TIMEOUT),
                stub.TailLogs(pb.TailLogsRequest(service="orders", last=10), timeout=TIMEOUT).read(),
            )
            for request in requests:
                error = await refused(request)
                assert (error.code(), "operator's identity" in (error.details() or "")) == (DENIED, True)


async def test_nobody_attends_as_another_service(world: World) -> None:
    for who in (await world.join("payments"), world.mint.operator(), world.mint.service("control-plane")):
        async with world.mesh(who) as raw, attending(raw, "orders") as call:
            error = await refused(call.read())
            assert error.code() is DENIED
            assert "may not attend as orders: only orders's own workloads may" in (error.details() or "")


async def test_nobody_attends_without_an_identity_of_this_mesh(world: World) -> None:
    stranger = world.mint.sign(Principal.service(DOMAIN, "orders"), common_names=["nobody"])
    async with world.mesh(stranger) as raw, attending(raw, "orders") as call:
        assert (await refused(call.read())).code() is DENIED


async def test_a_workload_is_asked_for_its_own_log_alone(world: World) -> None:
    async with (
        world.mesh(await world.join("orders")) as orders,
        world.mesh(await world.join("payments")) as payments,
        world.mesh(world.mint.operator()) as operator,
        attending(orders, "orders") as first,
        attending(payments, "payments", "p2"),
    ):
        await known(world, 2)
        tail = operator.operations.TailLogs(
            pb.TailLogsRequest(service="payments", last=10, follow=True), timeout=TIMEOUT
        )
        response = await tail.read()
        assert isinstance(response, pb.TailLogsResponse)
        assert [each.id for each in response.processes] == ["p2"]
        own = operator.operations.TailLogs(pb.TailLogsRequest(service="orders", last=10, follow=True), timeout=TIMEOUT)
        asked = await first.read()
        assert asked.start_tail.tail == 2  # the other is the first, and was never asked of this process
        tail.cancel()
        own.cancel()


async def test_records_cannot_be_slipped_into_another_process_or_service(world: World) -> None:
    async with (
        world.mesh(await world.join("orders")) as orders,
        world.mesh(await world.join("payments")) as payments,
        world.mesh(world.mint.operator()) as operator,
        attending(orders, "orders", "victim") as victim,
        attending(payments, "payments", "victim") as attacker,
    ):
        await known(world, 2)
        tail = operator.operations.TailLogs(pb.TailLogsRequest(service="orders", last=10, follow=True), timeout=TIMEOUT)
        number = (await victim.read()).start_tail.tail
        forged = pb.LogRecord(message="forged", service="orders", instance="orders-1", process="victim", sequence=9)
        await attacker.write(
            pb.AttendRequest(log_records=pb.LogRecords(tail=number, records=[forged], caught_up=True, dropped=5))
        )
        claimed = pb.LogRecord(message="true", service="payments", instance="x", process="y", sequence=1)
        await victim.write(pb.AttendRequest(log_records=pb.LogRecords(tail=number, records=[claimed], caught_up=True)))
        seen: list[pb.LogRecord] = []
        while not seen:
            response = await tail.read()
            assert isinstance(response, pb.TailLogsResponse)
            assert response.dropped == 0
            seen += response.records
        assert [(each.message, each.service, each.instance, each.process) for each in seen] == [
            ("true", "orders", "orders-1", "victim")
        ]
        tail.cancel()


async def test_a_service_called_like_the_control_plane_is_not_taken_for_it(world: World) -> None:
    async with (
        world.mesh(await world.join("control-plane")) as raw,
        world.mesh(world.mint.operator()) as operator,
        attending(raw, "control-plane", "evil") as call,
    ):
        await known(world, 1)
        tail = operator.operations.TailLogs(pb.TailLogsRequest(service="control-plane", last=10), timeout=TIMEOUT)
        response = await tail.read()
        assert isinstance(response, pb.TailLogsResponse)
        assert "evil" not in [each.id for each in response.processes]
        tail.cancel()
        call.cancel()


async def test_a_revoked_workload_attends_no_more(world: World) -> None:
    who = await world.join("orders")
    async with world.mesh(who) as raw, attending(raw, "orders") as call:
        await known(world, 1)
        await world.revoke(who.workload_id)
        error = await refused(call.read())
        assert (error.code(), "has been revoked" in (error.details() or "")) == (DENIED, True)
        async with attending(raw, "orders") as again:
            assert (await refused(again.read())).code() is DENIED


async def test_one_workload_does_not_keep_the_others_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attendance, "MAX_STREAMS_OF_ONE", 2)
    async with world.mesh(await world.join("orders")) as greedy, world.mesh(await world.join("orders")) as other:
        silent = [greedy.operations.Attend(timeout=TIMEOUT) for _ in range(2)]
        await until(lambda: world.plane._operations._attendances._open.total() == 2)
        async with attending(greedy, "orders") as call:
            assert (await refused(call.read())).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        async with attending(other, "orders", "p9"):
            await known(world, 1)
        for each in silent:
            each.cancel()
        await until(lambda: not world.plane._operations._attendances._open)
