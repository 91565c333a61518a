"""Whoever has been revoked stays out, by whatever way they come back."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from cryptography.hazmat.primitives.asymmetric import ec

from tests.control_plane.scripted_consul import scripted_consul
from tests.security.mint import Credential, new_key, signing_request
from tests.security.world import TIMEOUT, Log, Raw, SignRequest, World, open_world, refused, until


async def join_by_consul(world: World, secret: str, key: ec.EllipticCurvePrivateKey) -> Credential:
    """The credential of a workload of inventory that shows a Consul token."""
    request = SignRequest(certificate_signing_request=signing_request(key), service="inventory", consul_token=secret)
    async with world.enrolment() as raw:
        return world.credential(key, await raw.certificates.SignCertificate(request, timeout=TIMEOUT))


async def test_a_revoked_workload_does_not_join_again_by_the_same_consul_token_or_key(log: Log, tmp_path: Path) -> None:
    def described(accessor: str, secret: str) -> dict[str, object]:
        log.keep_out(secret)
        return {"AccessorID": accessor, "SecretID": secret, "ServiceIdentities": [{"ServiceName": "inventory"}]}

    path, secret, accessor = "/v1/acl/token/self", str(uuid.uuid4()), str(uuid.uuid4())
    async with scripted_consul() as consul:
        consul.answer(path, described(accessor, secret))
        async with open_world(tmp_path, log, registry=f"consul://{consul.address}") as world:
            key = new_key()
            evil, sibling = await join_by_consul(world, secret, key), await join_by_consul(world, secret, new_key())
            await world.revoke(evil.workload_id)

            error = await refused(join_by_consul(world, secret, new_key()))
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            assert error.details() == (
                f"workload {evil.workload_id}, which joined by consul token {accessor}, has been revoked, so this "
                "token attests nobody any more: delete it, and give the workload a new one"
            )
            assert f"which joined by consul token {accessor}, has been revoked" in log.control_plane
            # The workloads that joined by it before are others, and go on.
            async with world.mesh(sibling) as raw:
                request = SignRequest(certificate_signing_request=signing_request(new_key()))
                await raw.certificates.SignCertificate(request, timeout=TIMEOUT)

            fresh = str(uuid.uuid4())
            consul.answer(path, described(str(uuid.uuid4()), fresh))
            assert "make a new key" in str((await refused(join_by_consul(world, fresh, key))).details())
            token_request = SignRequest(
                certificate_signing_request=signing_request(key),
                service="inventory",
                join_token=await world.token("inventory"),
            )
            async with world.enrolment() as raw:
                error = await refused(raw.certificates.SignCertificate(token_request, timeout=TIMEOUT))
            assert "make a new key" in str(error.details())
            await join_by_consul(world, fresh, new_key())


# -- open streams of servers


class Streams(grpc.GenericRpcHandler):
    """Methods that stream in each way, and when each began and was over."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.over: list[str] = []
        self.answered: list[bytes] = []

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        name = handler_call_details.method.rpartition("/")[2]

        @contextlib.contextmanager
        def noted() -> Iterator[None]:
            self.begun.append(name)
            try:
                yield
            finally:
                self.over.append(name)

        async def both(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
            with noted():
                async for request in requests:
                    self.answered.append(request)
                    yield request

        async def flood(request: bytes, context: object) -> AsyncIterator[bytes]:
            with noted():
                while True:
                    yield b"x" * 65_536

        async def collect(requests: AsyncIterator[bytes], context: object) -> bytes:
            with noted():
                return b"".join([request async for request in requests])

        async def write(request: bytes, context: Any) -> None:
            with noted():
                await context.write(request)
                await asyncio.Event().wait()

        def plain(requests: Iterator[bytes], context: object) -> Iterator[bytes]:
            with noted():
                for request in requests:
                    self.answered.append(request)
                    yield request

        async def unary(request: bytes, context: object) -> bytes:
            with noted():
                await asyncio.sleep(1.0)
                return request

        made: dict[str, Any] = {
            "Both": grpc.stream_stream_rpc_method_handler(both),
            "Flood": grpc.unary_stream_rpc_method_handler(flood),
            "Collect": grpc.stream_unary_rpc_method_handler(collect),
            "Write": grpc.unary_stream_rpc_method_handler(write),
            "Plain": grpc.stream_stream_rpc_method_handler(plain),
            "Unary": grpc.unary_unary_rpc_method_handler(unary),
        }
        return made.get(name)


async def end_of(call: Any) -> tuple[grpc.StatusCode, str]:
    """How a call ends."""
    async with asyncio.timeout(TIMEOUT):
        return await call.code(), str(await call.details())


def _both(raw: Raw) -> Any:
    call: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = raw.channel.stream_stream("/test.Streams/Both")
    return call()


async def drained(call: Any) -> None:
    """Reads what has come already."""
    async with asyncio.timeout(TIMEOUT):
        async for _ in call:
            pass


async def test_servers_end_the_open_streams_of_a_revoked_workload_at_once_and_nobody_elses(world: World) -> None:
    evil, good = await world.join("gateway"), await world.join("gateway")
    streams = Streams()
    async with (
        world.serving("orders", handlers=[streams]) as server,
        world.to(server, evil) as raw,
        world.to(server, good) as other,
    ):
        channel: Any = raw.channel
        both, kept = _both(raw), _both(other)
        plain = channel.stream_stream("/test.Streams/Plain")()
        for stream in (both, kept, plain):
            await stream.write(b"a")
            assert await stream.read() == b"a"
        collect = channel.stream_unary("/test.Streams/Collect")()
        await collect.write(b"a")
        write = channel.unary_stream("/test.Streams/Write")(b"a")
        assert await write.read() == b"a"
        flood = channel.unary_stream("/test.Streams/Flood")(b"")  # whose answers nobody reads
        unary = channel.unary_unary("/test.Streams/Unary")(b"a")
        await until(lambda: len(streams.begun) == 7)
        await asyncio.sleep(0.2)

        await world.revoke(evil.workload_id)
        said = f"workload {evil.workload_id} has been revoked since this call began"
        for call in (both, collect, write):
            assert await end_of(call) == (grpc.StatusCode.PERMISSION_DENIED, said)
        # This one was writing to somebody who reads nothing: it is over, and they learn of it when they do read.
        await until(lambda: "Flood" in streams.over)
        error = await refused(drained(flood))
        assert (error.code(), error.details()) == (grpc.StatusCode.PERMISSION_DENIED, said)
        # A thread cannot be interrupted: the next message in either direction ends the call, and reaches nobody.
        await plain.write(b"b")
        assert await end_of(plain) == (grpc.StatusCode.PERMISSION_DENIED, said)
        assert b"b" not in streams.answered
        assert await unary == b"a"
        await until(lambda: len(streams.over) == 6)

        await kept.write(b"c")
        assert await kept.read() == b"c"
        assert not server._guard.streams._open.keys() - {good.workload_id}
        assert (
            f"workload {evil.workload_id} has been revoked: its 5 streaming calls of orders end"
            in world.log.mesh_client
        )
