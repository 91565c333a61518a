"""The gRPC interop test description, through raw channels and through the mesh: both must pass.

Test names are those of https://github.com/grpc/grpc/blob/master/doc/interop-test-descriptions.md.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.integration.channels import KINDS, reach
from tests.integration.interop_service import ECHO_INITIAL, ECHO_TRAILING, InteropService, stubs

PB, PB_GRPC = stubs()
LARGE_REQUEST, LARGE_RESPONSE = 271_828, 314_159
STREAMED_REQUESTS = (27_182, 8, 1_828, 45_904)
STREAMED_RESPONSES = (31_415, 9, 2_653, 58_979)
SPECIAL_MESSAGE = "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n"


class Interop:
    """Stubs on one kind of channel, and the server behind it."""

    def __init__(self, channel: grpc.aio.Channel, service: InteropService) -> None:
        self.stub: Any = PB_GRPC.TestServiceStub(channel)
        self.unimplemented: Any = PB_GRPC.UnimplementedServiceStub(channel)
        self.service = service


@pytest.fixture(params=KINDS)
async def interop(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Interop]:
    """The service of the description, reached raw and through the mesh."""
    service = InteropService()
    async with reach(request.param, tmp_path, service.add_to, service.add_to, service.add_to) as reached:
        yield Interop(reached.channel, service)


def _output_request(size: int, payload: int = 0, interval_us: int = 0) -> Any:
    return PB.StreamingOutputCallRequest(
        response_parameters=[PB.ResponseParameters(size=size, interval_us=interval_us)],
        payload=PB.Payload(body=bytes(payload)),
    )


async def test_empty_unary(interop: Interop) -> None:
    assert await interop.stub.EmptyCall(PB.Empty()) == PB.Empty()


@pytest.mark.parametrize("compression", [None, grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_large_unary(interop: Interop, compression: grpc.Compression | None) -> None:
    request = PB.SimpleRequest(response_size=LARGE_RESPONSE, payload=PB.Payload(body=bytes(LARGE_REQUEST)))
    response = await interop.stub.UnaryCall(request, compression=compression)
    assert response.payload.body == bytes(LARGE_RESPONSE)


async def test_client_streaming(interop: Interop) -> None:
    async def requests() -> AsyncIterator[Any]:
        for size in STREAMED_REQUESTS:
            yield PB.StreamingInputCallRequest(payload=PB.Payload(body=bytes(size)))

    response = await interop.stub.StreamingInputCall(requests())
    assert response.aggregated_payload_size == 74_922
    assert tuple(interop.service.received) == STREAMED_REQUESTS


async def test_client_streaming_by_writes(interop: Interop) -> None:
    call = interop.stub.StreamingInputCall(compression=grpc.Compression.Gzip)
    for size in STREAMED_REQUESTS:
        await call.write(PB.StreamingInputCallRequest(payload=PB.Payload(body=bytes(size))))
    await call.done_writing()
    assert (await call).aggregated_payload_size == 74_922


async def test_server_streaming(interop: Interop) -> None:
    request = PB.StreamingOutputCallRequest(
        response_parameters=[PB.ResponseParameters(size=size) for size in STREAMED_RESPONSES]
    )
    call = interop.stub.StreamingOutputCall(request)
    assert tuple([len(response.payload.body) async for response in call]) == STREAMED_RESPONSES
    assert await call.code() is grpc.StatusCode.OK


async def test_ping_pong(interop: Interop) -> None:
    call = interop.stub.FullDuplexCall()
    for request_size, response_size in zip(STREAMED_REQUESTS, STREAMED_RESPONSES, strict=True):
        await call.write(_output_request(response_size, request_size))
        assert len((await call.read()).payload.body) == response_size
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK
    assert tuple(interop.service.received) == STREAMED_REQUESTS


async def test_empty_stream(interop: Interop) -> None:
    call = interop.stub.FullDuplexCall()
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_cancel_after_begin(interop: Interop) -> None:
    call = interop.stub.StreamingInputCall()
    await call.wait_for_connection()
    assert call.cancel()
    assert await call.code() is grpc.StatusCode.CANCELLED
    assert call.cancelled()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_cancel_after_first_response(interop: Interop) -> None:
    call = interop.stub.FullDuplexCall()
    await call.write(_output_request(STREAMED_RESPONSES[0], STREAMED_REQUESTS[0]))
    assert len((await call.read()).payload.body) == STREAMED_RESPONSES[0]
    assert call.cancel()
    assert await call.code() is grpc.StatusCode.CANCELLED
    assert await call.details() == "Locally cancelled by application!"
    with pytest.raises(asyncio.CancelledError):
        await call.read()
    async with asyncio.timeout(5):
        await interop.service.ended.wait()


async def test_timeout_on_sleeping_server(interop: Interop) -> None:
    call = None
    for timeout in (0.05, 0.5, 5.0):  # on a busy machine the first may pass before the server has heard of the call
        call = interop.stub.FullDuplexCall(timeout=timeout)
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(_output_request(8, 27_182, interval_us=30_000_000))
        await call.code()
        if interop.service.received:
            break
    assert call is not None
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    async with asyncio.timeout(5):
        await interop.service.ended.wait()


@pytest.mark.parametrize("message", ["test status message", SPECIAL_MESSAGE, ""])
async def test_status_code_and_message(interop: Interop, message: str) -> None:
    status = PB.EchoStatus(code=2, message=message)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await interop.stub.UnaryCall(PB.SimpleRequest(response_status=status))
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNKNOWN, message)

    call = interop.stub.FullDuplexCall()
    await call.write(PB.StreamingOutputCallRequest(response_status=status))
    await call.done_writing()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNKNOWN, message)
    assert (await call.code(), await call.details()) == (grpc.StatusCode.UNKNOWN, message)


async def test_unimplemented_method(interop: Interop) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await interop.stub.UnimplementedCall(PB.Empty())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert caught.value.details() == "Method not implemented!"


async def test_unimplemented_service(interop: Interop) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await interop.unimplemented.UnimplementedCall(PB.Empty())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_custom_metadata(interop: Interop) -> None:
    initial, trailing = "test_initial_metadata_value", b"\xab\xab\xab"
    metadata = ((ECHO_INITIAL, initial), (ECHO_TRAILING, trailing))

    call = interop.stub.UnaryCall(PB.SimpleRequest(response_size=LARGE_RESPONSE), metadata=metadata)
    await call
    assert (await call.initial_metadata())[ECHO_INITIAL] == initial
    assert (await call.trailing_metadata())[ECHO_TRAILING] == trailing

    call = interop.stub.FullDuplexCall(metadata=grpc.aio.Metadata(*metadata))
    await call.write(_output_request(STREAMED_RESPONSES[0]))
    assert (await call.initial_metadata())[ECHO_INITIAL] == initial
    await call.done_writing()
    assert len([response async for response in call]) == 1
    assert (await call.trailing_metadata())[ECHO_TRAILING] == trailing

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await interop.stub.UnaryCall(
            PB.SimpleRequest(response_status=PB.EchoStatus(code=5, message="gone")), metadata=metadata
        )
    assert caught.value.initial_metadata()[ECHO_INITIAL] == initial
    assert caught.value.trailing_metadata()[ECHO_TRAILING] == trailing
