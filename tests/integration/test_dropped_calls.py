"""Calls that a server drops because it begins to stop. Nobody cancelled them, and callers are never told so."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from mesh_client.errors import MeshRpcError
from tests.integration.dropping_server import dropping_server
from tests.integration.echo_service import EchoService
from tests.integration.mesh_rig import Rig, open_rig

SERVICE = "echo"
METHODS = {
    "UnaryUnary": "unary_unary",
    "UnaryStream": "unary_stream",
    "StreamUnary": "stream_unary",
    "StreamStream": "stream_stream",
}


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path) as rig:
        yield rig


def call(channel: grpc.aio.Channel, kind: str) -> Any:
    """A call; a stream of requests is left open, for a write to a call that is over fails in another way."""
    method = getattr(channel, METHODS[kind])(f"/test.Echo/{kind}")
    return method(timeout=30.0) if kind.startswith("Stream") else method(b"1", timeout=30.0)


async def result(made: Any) -> Any:
    return [response async for response in made] if hasattr(made, "__aiter__") else await made


@pytest.mark.parametrize("resets", [False, True], ids=["trailers", "reset"])
@pytest.mark.parametrize("kind", ["UnaryUnary", "UnaryStream"])
async def test_a_dropped_call_is_made_again_elsewhere(rig: Rig, kind: str, resets: bool) -> None:
    async with dropping_server(resets=resets) as dropping:
        await rig.register(SERVICE, "stopping", dropping.port)
        await rig.serve(SERVICE, "staying", EchoService().add_to)
        mesh = await rig.mesh()
        await rig.policy(mesh, {"service": SERVICE, "load_balancer": {"algorithm": "ROUND_ROBIN"}})
        channel = await rig.channel(mesh, SERVICE, ["stopping", "staying"])
        for _ in range(4):
            assert await result(call(channel, kind)) in (b"1", [b"0"])
    assert dropping.calls > 0


@pytest.mark.parametrize("resets", [False, True], ids=["trailers", "reset"])
@pytest.mark.parametrize("kind", METHODS)
async def test_a_call_that_is_dropped_everywhere_is_unavailable_and_not_cancelled(
    rig: Rig, kind: str, resets: bool
) -> None:
    async with dropping_server(resets=resets) as dropping:
        await rig.register(SERVICE, "stopping", dropping.port)
        channel = await rig.channel(await rig.mesh(), SERVICE, ["stopping"])
        made = call(channel, kind)
        with pytest.raises(MeshRpcError) as caught:
            await result(made)
        assert not made.cancelled()
        assert await made.code() is caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "the server dropped the call" in str(caught.value)
    assert [attempt.code for attempt in caught.value.mesh.attempts] == ["UNAVAILABLE"] * 3
    assert dropping.calls == 3


@pytest.mark.parametrize("kind", METHODS)
async def test_a_server_that_answers_cancelled_is_an_error_and_no_cancellation(rig: Rig, kind: str) -> None:
    class Refusing(grpc.GenericRpcHandler):
        def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
            async def refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
                await context.abort(grpc.StatusCode.CANCELLED, "not any more")

            return getattr(grpc, f"{METHODS[kind]}_rpc_method_handler")(refuse)  # type: ignore[no-any-return]  # found by name

    await rig.serve(SERVICE, "refusing", lambda server: server.add_generic_rpc_handlers((Refusing(),)))
    channel = await rig.channel(await rig.mesh(), SERVICE, ["refusing"])
    made = call(channel, kind)
    with pytest.raises(MeshRpcError, match="not any more") as caught:
        await result(made)
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    assert len(caught.value.mesh.attempts) == 1
