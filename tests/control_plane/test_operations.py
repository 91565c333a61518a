"""OperationsService with processes that say on the wire what the test makes them say."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from mesh.v1 import operations_pb2 as pb
from mesh.v1 import operations_pb2_grpc

from control_plane.operations import attendance, tails
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane

TIMEOUT = 30.0


class Process:
    """A process that attends, by hand."""

    def __init__(self, channel: grpc.aio.Channel, service: str, name: str, id: str) -> None:
        self._stub = operations_pb2_grpc.OperationsServiceStub(channel)
        self.described = pb.Process(service=service, instances=[name], id=id, version="0.1.0")
        self.call: Any = None

    async def attend(self) -> None:
        self.call = self._stub.Attend()
        await self.say(process=self.described)

    async def say(self, **what: Any) -> None:
        await self.call.write(pb.AttendRequest(**what))

    async def asked(self) -> Any:
        """The next thing that it is asked for."""
        async with asyncio.timeout(TIMEOUT):
            response = await self.call.read()
        assert isinstance(response, pb.AttendResponse)
        return getattr(response, response.WhichOneof("kind") or "")

    async def records(
        self, tail: int, *sequences: int, caught_up: bool = False, dropped: int = 0, at: float | None = None
    ) -> None:
        records = [record(number, at=at) for number in sequences]
        await self.say(log_records=pb.LogRecords(tail=tail, records=records, caught_up=caught_up, dropped=dropped))

    async def status(self) -> tuple[grpc.StatusCode, str]:
        """How the stream ends."""
        async with asyncio.timeout(TIMEOUT):
            with contextlib.suppress(grpc.aio.AioRpcError):
                while await self.call.read() is not grpc.aio.EOF:
                    pass
            return await self.call.code(), await self.call.details()


def record(sequence: int, message: str = "", at: float | None = None) -> pb.LogRecord:
    made = pb.LogRecord(sequence=sequence, message=message or f"event {sequence}", level=pb.LOG_LEVEL_INFO)
    made.time.FromNanoseconds(round((sequence if at is None else at) * 1e9))
    return made


class World:
    """A control plane, its operator, and processes."""

    def __init__(self, plane: ControlPlane, stack: AsyncExitStack) -> None:
        self.plane = plane
        self._stack = stack
        self.operator: operations_pb2_grpc.OperationsServiceAsyncStub

    async def open(self) -> None:
        self.operator = operations_pb2_grpc.OperationsServiceStub(await self.channel())

    async def channel(self) -> grpc.aio.Channel:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channel = grpc.aio.insecure_channel(self.plane.address, options=options)
        return await self._stack.enter_async_context(channel)

    async def process(self, service: str = "orders", name: str = "orders-1", id: str = "p1") -> Process:
        """One that attends, and is known to."""
        made = Process(await self.channel(), service, name, id)
        await made.attend()
        self._stack.callback(made.call.cancel)
        await self.known(lambda processes: any(each.id == id for each in processes))
        return made

    async def known(self, condition: Callable[[list[pb.Process]], bool]) -> list[pb.Process]:
        """Who attends, once that is as expected."""
        async with asyncio.timeout(TIMEOUT):
            while True:
                answer = await self.operator.ListProcesses(pb.ListProcessesRequest())
                if condition(list(answer.processes)):
                    return list(answer.processes)
                await asyncio.sleep(0.005)

    @asynccontextmanager
    async def tail(self, **request: Any) -> AsyncIterator[Tail]:
        request = {"service": "orders", "last": 100, **request}
        call = self.operator.TailLogs(pb.TailLogsRequest(**request))
        try:
            yield Tail(call)
        finally:
            call.cancel()


class Tail:
    """What an operator reads."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.processes: list[str] = []
        self.silent: list[str] = []
        self.dropped = 0
        self.records: list[pb.LogRecord] = []

    async def more(self) -> bool:
        async with asyncio.timeout(TIMEOUT):
            response = await self.call.read()
        if response is grpc.aio.EOF:
            return False
        self.processes += [each.id for each in response.processes]
        self.silent += response.silent
        self.dropped += response.dropped
        self.records += response.records
        return True

    async def whole(self) -> list[str]:
        while await self.more():
            pass
        return self.messages

    async def until(self, condition: Callable[[Tail], bool]) -> None:
        while not condition(self):
            assert await self.more()

    @property
    def messages(self) -> list[str]:
        return [each.message for each in self.records]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    plane = ControlPlane(ControlPlaneOptions(insecure=True, control_plane_id="cp-1"))
    await plane.start()
    async with AsyncExitStack() as stack:
        made = World(plane, stack)
        await made.open()
        yield made
    await plane.stop(0.1)


async def test_those_that_attend_are_listed_and_gone_when_their_stream_is(world: World) -> None:
    first = await world.process(id="p1", name="orders-2")
    await world.process(id="p2", name="orders-1")
    await world.process(service="payments", name="payments-1", id="p3")
    assert [each.id for each in await world.known(lambda them: len(them) == 3)] == ["p2", "p1", "p3"]
    answer = await world.operator.ListProcesses(pb.ListProcessesRequest(service="payments"))
    assert [each.id for each in answer.processes] == ["p3"]
    first.call.cancel()
    await world.known(lambda them: [each.id for each in them] == ["p2", "p3"])


async def test_a_process_may_get_another_name(world: World) -> None:
    process = await world.process()
    process.described.instances[:] = ["orders-7", "orders-1"]
    await process.say(process=process.described)
    await world.known(lambda them: list(them[0].instances) == ["orders-7", "orders-1"])
    async with world.tail(instance="orders-7") as tail:
        await tail.more()
        assert tail.processes == ["p1"]


async def test_the_past_of_all_processes_is_in_the_order_of_time_and_cut_to_what_was_asked_for(world: World) -> None:
    one = await world.process(id="p1", name="orders-1")
    two = await world.process(id="p2", name="orders-2")
    async with world.tail(last=3, level=pb.LOG_LEVEL_WARNING, logger="shop") as tail:
        start = await one.asked()
        assert (start.last, start.after, start.follow) == (3, 0, False)
        assert (start.level, start.logger) == (pb.LOG_LEVEL_WARNING, "shop")
        await one.records(start.tail, 1, 3, 5)
        await one.records(start.tail, caught_up=True)
        await two.records((await two.asked()).tail, 2, 4, caught_up=True)
        assert await tail.whole() == ["event 3", "event 4", "event 5"]
        assert [(each.service, each.instance, each.process) for each in tail.records] == [
            ("orders", "orders-1", "p1"),
            ("orders", "orders-2", "p2"),
            ("orders", "orders-1", "p1"),
        ]
        assert sorted(tail.processes) == ["p1", "p2"]
        assert tail.silent == []


async def test_nothing_of_the_past_is_sent_to_who_wants_none(world: World) -> None:
    process = await world.process()
    async with world.tail(last=0) as tail:
        await process.records((await process.asked()).tail, 1, 2, caught_up=True)
        assert await tail.whole() == []


async def test_whoever_follows_gets_what_comes_and_what_was_lost_is_counted(world: World) -> None:
    process = await world.process()
    async with world.tail(follow=True) as tail:
        start = await process.asked()
        assert start.follow
        await process.records(start.tail, 1, caught_up=True)
        await tail.until(lambda tail: tail.messages == ["event 1"])
        await process.records(start.tail, 7, 8, dropped=5)
        await tail.until(lambda tail: tail.messages == ["event 1", "event 7", "event 8"])
        assert tail.dropped == 5
        tail.call.cancel()
        assert (await process.asked()) == pb.StopTail(tail=start.tail)


async def test_processes_that_come_later_are_read_too(world: World) -> None:
    async with world.tail(follow=True) as tail:
        await tail.more()
        assert tail.processes == []
        other = await world.process(service="payments", id="other")
        process = await world.process()
        start = await process.asked()
        await process.records(start.tail, 1, caught_up=True)
        await tail.until(lambda tail: tail.messages == ["event 1"])
        assert tail.processes == ["p1"]
        await world.operator.SetLogLevel(pb.SetLogLevelRequest(service="nobody"))
        other.call.cancel()


async def test_a_process_that_comes_back_is_read_on_from_where_it_was_left(world: World) -> None:
    process = await world.process()
    async with world.tail(follow=True, last=10) as tail:
        start = await process.asked()
        await process.records(start.tail, 1, 2, caught_up=True)
        await tail.until(lambda tail: len(tail.records) == 2)
        again = Process(await world.channel(), "orders", "orders-1", "p1")
        await again.attend()
        resumed = await again.asked()
        assert (resumed.tail, resumed.after, resumed.last) == (start.tail, 2, 1000)
        await process.records(start.tail, 3)  # on the stream that does not count any more
        await again.records(resumed.tail, 3, 4, caught_up=True)
        await tail.until(lambda tail: tail.messages == [f"event {number}" for number in (1, 2, 3, 4)])
        assert tail.processes == ["p1"]
        again.call.cancel()


async def test_one_that_does_not_answer_is_named_and_not_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tails, "PAST_PATIENCE", 2.0)
    await world.process(id="p1", name="hangs")
    two = await world.process(id="p2", name="orders-2")
    async with world.tail() as tail:
        await two.records((await two.asked()).tail, 1, caught_up=True)
        assert await tail.whole() == ["event 1"]
        assert tail.silent == ["hangs"]


async def test_one_that_ends_is_not_waited_for(world: World) -> None:
    process = await world.process()
    async with world.tail() as tail:
        await process.records((await process.asked()).tail, 1)
        await tail.more()
        process.call.cancel()
        assert await tail.whole() == ["event 1"]


async def test_a_slow_operator_loses_records_and_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tails, "MAX_WAITING", 50)
    process = await world.process()
    async with world.tail(follow=True, last=0) as tail:
        start = await process.asked()
        await process.records(start.tail, caught_up=True)
        await tail.until(lambda tail: bool(tail.processes))
        for first in range(1, 2_001, 100):
            await process.records(start.tail, *range(first, first + 100))
        await process.records(start.tail, 9_999)
        await tail.until(lambda tail: tail.messages[-1:] == ["event 9999"])
        assert len(tail.records) + tail.dropped == 2_001


async def test_there_are_not_more_readers_than_may_be(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tails, "MAX_TAILS", 1)
    async with world.tail(follow=True) as tail:
        await tail.more()
        async with world.tail() as other:
            assert await other.call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    async with asyncio.timeout(TIMEOUT):
        while world.plane._operations._tails._tails:  # that the first one has left comes after its end
            await asyncio.sleep(0)
    async with world.tail() as again:
        await again.whole()


async def test_levels_are_changed_in_each_process_that_is_meant(world: World) -> None:
    one = await world.process(id="p1", name="orders-1")
    two = await world.process(id="p2", name="orders-2")
    request = pb.SetLogLevelRequest(service="orders", logger="shop", level=pb.LOG_LEVEL_DEBUG)
    answering = asyncio.ensure_future(world.operator.SetLogLevel(request))
    for process, error in ((one, ""), (two, "no")):
        asked = await process.asked()
        assert (asked.logger, asked.level, asked.duration.seconds) == ("shop", pb.LOG_LEVEL_DEBUG, 600)
        await process.say(log_level_changed=pb.LogLevelChanged(change=99))  # of nothing that was asked
        await process.say(log_level_changed=pb.LogLevelChanged(change=asked.change, error=error))
    answer = await answering
    assert [(each.process.id, each.error) for each in answer.outcomes] == [("p1", ""), ("p2", "no")]


async def test_a_process_that_does_not_answer_is_told_of(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attendance, "ANSWER_TIMEOUT", 0.05)
    await world.process()
    request = pb.SetLogLevelRequest(service="orders", instance="orders-1", level=pb.LOG_LEVEL_DEBUG)
    (outcome,) = (await world.operator.SetLogLevel(request)).outcomes
    assert outcome.error == "no answer within 0.05 s"
    elsewhere = await world.operator.SetLogLevel(pb.SetLogLevelRequest(service="orders", instance="orders-9"))
    assert not elsewhere.outcomes


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (pb.SetLogLevelRequest(service="orders", logger="no such logger"), "logger"),
        (pb.SetLogLevelRequest(service="orders", level=17), "level"),  # type: ignore[arg-type]  # of a later version
        # Protobuf takes a mapping for a message, which its stubs do not know.
        (pb.SetLogLevelRequest(service="orders", duration={"seconds": 100_000}), "24 hours"),  # type: ignore[arg-type]
    ],
)
async def test_what_cannot_be_done_is_refused(request_: pb.SetLogLevelRequest, words: str, world: World) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=words) as refused:
        await world.operator.SetLogLevel(request_)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_logger_that_cannot_be_is_refused_to_readers(world: World) -> None:
    async with world.tail(logger="no such logger") as tail:
        assert await tail.call.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (pb.AttendRequest(), "in the first request"),
        (pb.AttendRequest(process=pb.Process(service="orders")), "process.id"),
        (pb.AttendRequest(process=pb.Process(service="No Name", id="1")), "service"),
    ],
)
async def test_who_does_not_say_who_it_is_is_refused(first: pb.AttendRequest, words: str, world: World) -> None:
    process = Process(await world.channel(), "orders", "orders-1", "p1")
    process.call = operations_pb2_grpc.OperationsServiceStub(await world.channel()).Attend()
    await process.call.write(first)
    code, details = await process.status()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert words in details


async def test_who_says_nothing_is_let_go(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attendance, "FIRST_WORD", 0.05)
    call = operations_pb2_grpc.OperationsServiceStub(await world.channel()).Attend()
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_what_breaks_the_rules_ends_the_stream(world: World) -> None:
    process = await world.process()
    await process.say(process=pb.Process(service="payments", id="p1"))
    code, details = await process.status()
    assert (code, "the same service" in details) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    process = await world.process()
    await process.records(1, *range(101))
    code, details = await process.status()
    assert (code, "at most 100" in details) == (grpc.StatusCode.INVALID_ARGUMENT, True)


async def test_what_a_process_says_of_itself_is_bounded(world: World) -> None:
    process = Process(await world.channel(), "orders", "n" * 1_000, "p1")
    process.described.instances.extend(map(str, range(100)))
    process.described.host = "h" * 1_000
    await process.attend()
    (seen,) = await world.known(bool)
    assert len(seen.instances) == 10
    assert {len(seen.instances[0]), len(seen.host)} == {200}
    process.call.cancel()


async def test_one_that_takes_nothing_is_let_go(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attendance, "MAX_UNSENT", 2)
    monkeypatch.setattr(attendance, "ANSWER_TIMEOUT", 0.05)
    await world.process()
    hanging = world.plane._operations._attendances.roster
    (stream,) = hanging

    async def never() -> pb.AttendResponse:
        await asyncio.Event().wait()
        raise AssertionError

    # As when its connection takes nothing more.
    monkeypatch.setattr(stream._unsent, "get", never)
    monkeypatch.setattr(stream._unsent, "empty", lambda: True)
    await asyncio.gather(
        *(world.operator.SetLogLevel(pb.SetLogLevelRequest(service="orders")) for _ in range(4)), return_exceptions=True
    )
    await world.known(lambda them: them == [])


async def test_more_than_may_attend_are_refused() -> None:
    plane = ControlPlane(ControlPlaneOptions(insecure=True, max_streams=1))
    await plane.start()
    async with AsyncExitStack() as stack:
        world = World(plane, stack)
        await world.open()
        await world.process()
        other = Process(await world.channel(), "orders", "orders-2", "p2")
        await other.attend()
        assert (await other.status())[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    await plane.stop(0.1)


async def test_all_streams_end_when_the_control_plane_stops() -> None:
    plane = ControlPlane(ControlPlaneOptions(insecure=True))
    await plane.start()
    async with AsyncExitStack() as stack:
        world = World(plane, stack)
        await world.open()
        process = await world.process()
        async with world.tail(follow=True) as tail:
            await process.records((await process.asked()).tail, caught_up=True)
            await tail.more()
            await plane.stop(1.0)
            assert (await process.status())[0] is grpc.StatusCode.UNAVAILABLE
            with contextlib.suppress(grpc.aio.AioRpcError):
                await tail.whole()
            assert await tail.call.code() in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)
