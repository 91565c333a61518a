"""The access log on real servers, for every form of handler and every way in which a call can end."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from random import Random
from typing import Any

import grpc
import grpc.aio
import pytest

import mesh_client
from mesh_client.access_log import AccessLog, access_log_rate
from mesh_client.admission import Admission
from mesh_client.context import CALLER_METADATA_KEY
from mesh_client.core.errors import ConfigError
from mesh_client.core.policy import ServicePolicy
from mesh_client.guard import Guard
from mesh_client.transport import open_channel
from tests.integration import methods
from tests.integration.methods import EXPECTED, FORMS, REQUESTS, SERVICE, call, failure, handler, serving

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
DEADLINES = (0.2, 1.0, 5.0)
"""Seconds that a call has, one after the other: on a busy machine the first may pass before the server hears of it."""
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"

AnyContext = grpc.aio.ServicerContext[Any, Any]


class Lines:
    """What the access log has said."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def __iter__(self) -> Iterator[Any]:
        return iter([record for record in self._caplog.records if record.name == "mesh_client.access"])

    async def some(self) -> list[Any]:
        """All lines, of which the first may come a moment after the caller has its answer."""
        async with asyncio.timeout(30):
            while not list(self):
                await asyncio.sleep(0.005)
        return list(self)

    async def one(self) -> Any:
        """The only line."""
        (record,) = await self.some()
        return record


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    caplog.set_level(logging.INFO)
    return Lines(caplog)


def access_log(rate: float = 1.0) -> AccessLog:
    return AccessLog(rate, Guard("orders", secure=False), Random(1))


async def code_of(rpc: Any) -> str:
    """How a call ends, once everything is read."""
    try:
        if hasattr(rpc, "read"):
            while await rpc.read() is not grpc.aio.EOF:
                pass
        else:
            await rpc
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


def form_name(value: object) -> str | None:
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(("kind", "behavior"), FORMS, ids=form_name)
async def test_every_form_of_handler_answers_as_before_and_is_logged(
    kind: str, behavior: Callable[..., Any], lines: Lines
) -> None:
    async with serving(("M", handler(kind, behavior)), wrap=access_log()) as target, open_channel(target) as channel:
        responses, _ = await call(
            channel, kind, "M", REQUESTS, metadata=(("traceparent", PARENT), (CALLER_METADATA_KEY, "web"))
        )
        assert responses == EXPECTED[kind]
        line = await lines.one()
    assert line.levelname == "INFO"
    assert (line.method, line.code, line.trace_id, line.claimed_caller) == (f"{SERVICE}/M", "OK", TRACE, "web")
    assert line.getMessage().startswith(f"{SERVICE}/M OK in ")
    assert line.duration_ms >= 0.0
    assert line.peer.startswith("ipv4:127.0.0.1:")
    assert not hasattr(line, "caller")
    if kind.startswith("unary"):
        assert line.request_bytes == 1
    if kind.endswith("unary"):
        assert line.response_bytes == len(EXPECTED[kind][0])
    elif "writer" not in behavior.__name__:
        assert line.responses == 3


async def abort(_: bytes, context: AnyContext) -> bytes:
    await context.abort(grpc.StatusCode.NOT_FOUND, "no")
    raise AssertionError


async def set_code(_: bytes, context: AnyContext) -> bytes:
    context.set_code(grpc.StatusCode.INTERNAL)
    return b""


async def crash(_: bytes, __: AnyContext) -> bytes:
    raise RuntimeError("a defect")


async def abort_after_one(_: bytes, context: AnyContext) -> AsyncIterator[bytes]:
    yield b"one"
    await context.abort(grpc.StatusCode.ABORTED, "no")


def plain_abort(_: bytes, context: grpc.ServicerContext) -> bytes:
    context.abort(grpc.StatusCode.NOT_FOUND, "no")
    raise AssertionError


def plain_set_code(_: bytes, context: grpc.ServicerContext) -> bytes:
    context.set_code(grpc.StatusCode.INTERNAL)
    return b""


def plain_crash(_: bytes, __: grpc.ServicerContext) -> bytes:
    raise RuntimeError("a defect")


def plain_stream_abort(_: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
    # Before the first response: grpc lets an abort overtake one that is being written.
    context.abort(grpc.StatusCode.ABORTED, "no")
    yield b"one"


@pytest.mark.parametrize(
    ("kind", "behavior", "code", "level"),
    [
        ("unary_unary", abort, "NOT_FOUND", "INFO"),
        ("unary_unary", set_code, "INTERNAL", "WARNING"),
        ("unary_unary", crash, "UNKNOWN", "WARNING"),
        ("unary_stream", abort_after_one, "ABORTED", "INFO"),
        ("unary_unary", plain_abort, "NOT_FOUND", "INFO"),
        ("unary_unary", plain_set_code, "INTERNAL", "WARNING"),
        ("unary_unary", plain_crash, "UNKNOWN", "WARNING"),
        ("unary_stream", plain_stream_abort, "ABORTED", "INFO"),
    ],
    ids=form_name,
)
async def test_failures_are_logged_whatever_the_sample_is(
    kind: str, behavior: Callable[..., Any], code: str, level: str, lines: Lines
) -> None:
    wrapped = access_log(rate=0.0)
    async with serving(("M", handler(kind, behavior)), wrap=wrapped) as target, open_channel(target) as channel:
        assert await code_of(getattr(channel, kind)(f"/{SERVICE}/M")(b"")) == code
        line = await lines.one()
    assert (line.code, line.levelname) == (code, level)
    assert not hasattr(line, "sampled")
    if kind == "unary_stream":
        assert line.responses == (1 if behavior is abort_after_one else 0)


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream"])
async def test_calls_that_are_cancelled_and_those_that_are_late_are_told_apart(
    kind: str, lines: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    entered = asyncio.Event()

    async def hang(_: bytes, __: AnyContext) -> bytes:
        entered.set()
        await asyncio.Event().wait()
        return b""

    async def hang_after_one(_: bytes, __: AnyContext) -> AsyncIterator[bytes]:
        yield b"one"
        await hang(b"", __)

    hanging = handler(kind, hang if kind == "unary_unary" else hang_after_one)
    async with serving(("M", hanging), wrap=access_log(rate=0.0)) as target, open_channel(target) as channel:
        method = getattr(channel, kind)(f"/{SERVICE}/M")
        for timeout in DEADLINES:
            assert await code_of(method(b"", timeout=timeout)) == "DEADLINE_EXCEEDED"
            if entered.is_set():
                break
        assert {line.code for line in await lines.some()} == {"DEADLINE_EXCEEDED"}
        caplog.clear()
        entered.clear()
        rpc = method(b"", timeout=30)
        await entered.wait()
        rpc.cancel()
        assert (await lines.one()).code == "CANCELLED"


async def test_a_plain_handler_that_is_too_late_is_logged_as_that(lines: Lines) -> None:
    def late(_: bytes, context: grpc.ServicerContext) -> bytes:
        entered.set()
        given_up.wait(10)
        while context.time_remaining() > 0.0:  # the server hears of a deadline a moment later
            time.sleep(0.005)
        return b""

    entered, given_up = threading.Event(), threading.Event()
    async with (
        serving(("M", handler("unary_unary", late)), wrap=access_log()) as target,
        open_channel(target) as channel,
    ):
        for timeout in DEADLINES:
            failed = await failure(channel, "unary_unary", "M", timeout=timeout)
            assert failed.code is grpc.StatusCode.DEADLINE_EXCEEDED
            if entered.is_set():
                break
        given_up.set()
        assert {line.code for line in await lines.some()} == {"DEADLINE_EXCEEDED"}


async def test_successes_are_sampled(lines: Lines) -> None:
    echo = handler("unary_unary", methods.echo_unary)
    async with serving(("M", echo), wrap=access_log(rate=0.2)) as target, open_channel(target) as channel:
        for _ in range(200):
            await call(channel, "unary_unary", "M", REQUESTS)
    logged = list(lines)
    assert 20 <= len(logged) <= 60
    assert {line.sampled for line in logged} == {0.2}


async def test_what_admission_refuses_is_logged(lines: Lines) -> None:
    guard = Guard("orders", secure=False)
    admission = Admission(Random(1), guard)
    admission.apply(
        ServicePolicy.parse({"service": "orders", "authorization": [{"callers": ["web"], "methods": ["*"]}]})
    )
    logged = AccessLog(0.0, guard, Random(1))
    wrapped = logged.wrap(f"/{SERVICE}/M", admission.wrap(f"/{SERVICE}/M", handler("unary_unary", methods.echo_unary)))
    async with serving(("M", wrapped)) as target, open_channel(target) as channel:
        assert (await failure(channel, "unary_unary", "M")).code is grpc.StatusCode.PERMISSION_DENIED
        assert (await lines.one()).code == "PERMISSION_DENIED"


async def test_nothing_is_made_for_a_log_that_is_off_at_run_time(
    lines: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "mesh_client.access")
    crashing = ("Crash", handler("unary_unary", crash))
    echo = ("M", handler("unary_unary", methods.echo_unary))
    async with serving(echo, crashing, wrap=access_log()) as target, open_channel(target) as channel:
        await call(channel, "unary_unary", "M", REQUESTS)
        await failure(channel, "unary_unary", "Crash")
    assert list(lines) == []


@pytest.mark.parametrize("generated", [True, False])
@pytest.mark.parametrize("rate", [None, 1.0])
async def test_a_mesh_server_has_one_if_asked(rate: float | None, generated: bool, lines: Lines) -> None:
    server = mesh_client.server("orders", registry="none", policy=ServicePolicy(service="orders"), access_log=rate)
    methods.add_methods(server, {"M": handler("unary_unary", methods.echo_unary)}, generated=generated)
    await server.start()
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        await call(channel, "unary_unary", "M", REQUESTS)
        if rate is not None:
            assert (await lines.one()).method == f"{SERVICE}/M"
    await server.stop(0)
    assert len(list(lines)) == (0 if rate is None else 1)


def test_the_variable_is_obeyed_and_an_argument_overrides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MESH_ACCESS_LOG", raising=False)
    assert access_log_rate(None) is None
    assert access_log_rate(0.0) == 0.0
    monkeypatch.setenv("MESH_ACCESS_LOG", "0.01")
    assert access_log_rate(None) == 0.01
    assert access_log_rate(1.0) == 1.0
    monkeypatch.setenv("MESH_ACCESS_LOG", "off")
    assert access_log_rate(None) is None
    for text in ("much", "2", "nan"):
        monkeypatch.setenv("MESH_ACCESS_LOG", text)
        with pytest.raises(ConfigError, match=f"MESH_ACCESS_LOG: '{text}' is not allowed"):
            access_log_rate(None)
    with pytest.raises(ConfigError, match="access_log: -1 is not allowed"):
        access_log_rate(-1)


def test_protobuf_messages_are_measured_and_streams_are_not(lines: Lines) -> None:
    from mesh.v1 import admin_pb2

    from mesh_client.access_log import _size

    message = admin_pb2.Denials(caller="nobody")
    assert _size(message) == len(message.SerializeToString())
    assert _size(iter(())) is None
