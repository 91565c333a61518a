"""Calls that the server ends while requests are still being written: callers learn what the server said.

grpc.aio makes "INTERNAL: Internal error from Core" of a write that crosses the call's end, now and then; hence so many
calls at once.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import grpc
import grpc.aio
import pytest

import mesh_client
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from mesh_client.context import PREVIOUS_ATTEMPTS_KEY
from tests.integration.mesh_rig import Rig, open_rig

SERVICE = "hasty"
CALLS = 60
RESPONSES = [b"0", b"1", b"2"]
OPTIONS = {"retry": {"max_attempts": 1}, "circuit_breaker": {"enabled": False}, "outlier_detection": {"enabled": False}}
MANY = {"max_attempts": 10, "backoff": {"initial": "1ms"}, "budget": {"ratio": 1.0, "min_per_second": 10_000.0}}


async def refuse(_: AsyncIterator[bytes], context: Any) -> bytes:
    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "not today", (("told", "later"),))
    return b""


async def refuse_stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    yield await refuse(requests, context)


async def answer(_: AsyncIterator[bytes], __: Any) -> bytes:
    return b"0"


async def answer_stream(_: AsyncIterator[bytes], __: Any) -> AsyncIterator[bytes]:
    for response in RESPONSES:
        yield response


async def answer_and_refuse(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    for response in RESPONSES:
        yield response
    await refuse(requests, context)


async def moody(_: AsyncIterator[bytes], context: Any) -> bytes:
    """Fails the first two attempts of each call."""
    if int(dict(context.invocation_metadata()).get(PREVIOUS_ATTEMPTS_KEY, 0)) < 2:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
    return b"0"


def add_to(server: grpc.aio.Server) -> None:
    """Methods that read no request."""
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Refuse": grpc.stream_unary_rpc_method_handler(refuse),
        "Answer": grpc.stream_unary_rpc_method_handler(answer),
        "Moody": grpc.stream_unary_rpc_method_handler(moody),
        "RefuseStream": grpc.stream_stream_rpc_method_handler(refuse_stream),
        "AnswerStream": grpc.stream_stream_rpc_method_handler(answer_stream),
        "AnswerAndRefuse": grpc.stream_stream_rpc_method_handler(answer_and_refuse),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Hasty", methods),))


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path) as rig:
        await rig.serve(SERVICE, "a", add_to)
        yield rig


async def channel_with(rig: Rig, **policy: Any) -> Any:
    mesh = await rig.mesh()
    channel = await rig.channel(mesh, SERVICE, ["a"])
    await rig.policy(mesh, {"service": SERVICE, **OPTIONS, **policy})
    return channel


async def some_requests() -> AsyncIterator[bytes]:
    for _ in range(3):
        yield b"x"


async def write_all(call: Any) -> None:
    try:
        await call.wait_for_connection()
        for _ in range(3):
            await call.write(b"x")
        await call.done_writing()
    except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
        pass  # the server has ended the call already


async def outcome(channel: Any, method: str, style: str) -> tuple[str, ...]:
    """Code, details and trailing metadata, and the responses before that."""
    streams = method.endswith("Stream") or method == "AnswerAndRefuse"
    multicallable = (channel.stream_stream if streams else channel.stream_unary)(f"/test.Hasty/{method}")
    call = multicallable(some_requests() if style == "iterate" else None, timeout=20.0)
    got = []
    try:
        if style == "write":
            await write_all(call)
        if not streams:
            got.append(await call)
        else:
            read = partial(anext, aiter(call), grpc.aio.EOF) if style == "iterate" else call.read
            while (response := await read()) is not grpc.aio.EOF:
                got.append(response)
    except grpc.aio.AioRpcError as error:
        return (
            error.code().name,
            error.details() or "",
            str(error.trailing_metadata().get("told")),
            *map(bytes.decode, got),
        )
    return (await call.code()).name, "", "None", *map(bytes.decode, got)


REFUSED = ("RESOURCE_EXHAUSTED", "not today", "later")


@pytest.mark.parametrize("style", ["iterate", "write"])
@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("Refuse", REFUSED),
        ("RefuseStream", REFUSED),
        ("Answer", ("OK", "", "None", "0")),
        ("AnswerStream", ("OK", "", "None", "0", "1", "2")),
        ("AnswerAndRefuse", (*REFUSED, "0", "1", "2")),
    ],
)
async def test_what_the_server_said_reaches_a_caller_that_still_writes(
    rig: Rig, method: str, expected: tuple[str, ...], style: str
) -> None:
    channel = await channel_with(rig)
    outcomes = Counter(await asyncio.gather(*(outcome(channel, method, style) for _ in range(CALLS))))
    assert outcomes == {expected: CALLS}


async def test_a_refusal_that_a_write_crossed_is_retried_as_any_other(rig: Rig) -> None:
    channel = await channel_with(rig, retry=MANY)
    outcomes = Counter(await asyncio.gather(*(outcome(channel, "Moody", "write") for _ in range(CALLS))))
    assert outcomes == {("OK", "", "None", "0"): CALLS}


async def test_reading_again_after_the_end_says_the_same(rig: Rig) -> None:
    channel = await channel_with(rig)
    call = channel.stream_stream("/test.Hasty/AnswerAndRefuse")()
    for response in RESPONSES:
        assert await call.read() == response
    for _ in range(2):
        with pytest.raises(grpc.aio.AioRpcError, match="not today"):
            await call.read()


async def test_a_control_plane_that_refuses_a_client_is_understood() -> None:
    plane = ControlPlane(ControlPlaneOptions(insecure=True, max_streams=1))
    await plane.start()
    try:
        async with mesh_client.connect(plane.address, cache_dir="") as first:
            while not first.state().in_sync:
                await first.changed()
            await asyncio.gather(*(refused(plane.address, seed) for seed in range(20)))
    finally:
        await plane.stop(0)


async def refused(address: str, seed: int) -> None:
    async with mesh_client.connect(address, cache_dir="", rng=Random(seed)) as mesh:
        for service in ("a", "b"):
            mesh.channel(service)
        while "unreachable" not in mesh.state().control_plane:
            await mesh.changed()
        assert "RESOURCE_EXHAUSTED: this control plane serves at most 1 streams" in mesh.state().control_plane
