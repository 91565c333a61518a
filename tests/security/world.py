"""One real control plane with its two ports, real servers and clients of the mesh, and what an attacker has."""

from __future__ import annotations

import asyncio
import base64
import logging
import re
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import grpc
import grpc.aio
from mesh.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    authority_pb2_grpc,
    certificate_pb2,
    certificate_pb2_grpc,
    discovery_pb2_grpc,
    endpoint_pb2,
    operations_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
)

import mesh_client
from control_plane.identity import ca
from control_plane.identity.certificate_authority import CertificateAuthority
from control_plane.identity.issuance import CreatedToken
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from control_plane.snapshot import EndpointsResource
from mesh_client.core.identity import Principal
from mesh_client.core.model import ResourceKind
from mesh_client.identity.workload import WorkloadIdentity
from mesh_client.mesh import Mesh
from mesh_client.mesh_server import MeshServer
from mesh_client.transport import Transport
from tests.security.mint import Credential, Mint, new_key, signing_request

DOMAIN = "mesh.internal"
TIMEOUT = 30.0
"""Seconds for anything."""
SECRET_REQUEST = b"the card number is 4711"

SignRequest = certificate_pb2.SignCertificateRequest


class Log(logging.Handler):
    """Every record of every logger, and what must stand in none of them."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []
        self._secrets: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{record.levelname} {record.name}: {record.getMessage()}"
        if record.exc_info is not None and record.exc_info[0] is not None:
            text += "".join(traceback.format_exception(*record.exc_info))
        self.lines.append(text)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hears everything within the block."""
        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.DEBUG)
        root.addHandler(self)
        try:
            yield
        finally:
            root.removeHandler(self)
            root.setLevel(level)

    def of(self, logger: str) -> str:
        """What the loggers below a name said from INFO on."""
        return "\n".join(
            line for line in self.lines if not line.startswith("DEBUG") and line.split(" ", 1)[1].startswith(logger)
        )

    @property
    def control_plane(self) -> str:
        """What the control plane said."""
        return self.of("control_plane")

    @property
    def mesh_client(self) -> str:
        """What clients and servers of the mesh said."""
        return self.of("mesh_client")

    def keep_out(self, secret: str | bytes) -> None:
        """A token or a PEM file with keys: none of what makes it secret may be said."""
        text = secret.decode() if isinstance(secret, bytes) else secret
        if text.startswith("mesh1."):
            self._secrets.update(part for part in text.split(".")[1:] if len(part) > 15)
        elif "PRIVATE KEY" in text:
            for body in re.findall(r"PRIVATE KEY-----\n(.*?)\n-----END", text, re.DOTALL):
                lines = body.split("\n")
                self._secrets.update(lines[1:])  # the first says what kind of key it is
                self._secrets.add(base64.b64decode("".join(lines)).hex()[72:136])
        else:
            self._secrets.add(text)

    def check(self, more: str = "") -> None:
        """Nothing secret was said, neither in a record nor in ``more``."""
        said = "\n".join([*self.lines, more])
        assert "PRIVATE KEY" not in said
        assert not re.search(r"mesh1\.[\w-]{8}", said)
        for secret in self._secrets:
            assert secret not in said


class Echo(grpc.GenericRpcHandler):
    """Echoes requests and streams of them, and remembers what reached it."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.callers: list[mesh_client.Caller | None] = []

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        def note(request: bytes) -> None:
            self.received.append(request)
            self.callers.append(mesh_client.current_caller())

        async def unary(request: bytes, context: object) -> bytes:
            note(request)
            return request

        async def stream(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
            async for request in requests:
                note(request)
                yield request

        if handler_call_details.method.endswith("Stream"):
            return grpc.stream_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(unary)


@dataclass
class Raw:
    """A channel that is not the library's, with the stubs of the control plane."""

    channel: grpc.aio.Channel

    @property
    def certificates(self) -> certificate_pb2_grpc.CertificateServiceAsyncStub:
        return certificate_pb2_grpc.CertificateServiceStub(self.channel)

    @property
    def registry(self) -> registry_pb2_grpc.RegistryServiceAsyncStub:
        return registry_pb2_grpc.RegistryServiceStub(self.channel)

    @property
    def discovery(self) -> discovery_pb2_grpc.DiscoveryServiceAsyncStub:
        return discovery_pb2_grpc.DiscoveryServiceStub(self.channel)

    @property
    def admin(self) -> admin_pb2_grpc.AdminServiceAsyncStub:
        return admin_pb2_grpc.AdminServiceStub(self.channel)

    @property
    def operations(self) -> operations_pb2_grpc.OperationsServiceAsyncStub:
        return operations_pb2_grpc.OperationsServiceStub(self.channel)

    @property
    def authority(self) -> authority_pb2_grpc.AuthorityServiceAsyncStub:
        return authority_pb2_grpc.AuthorityServiceStub(self.channel)

    async def echo(self, request: bytes = SECRET_REQUEST, method: str = "/test.Echo/Unary", **options: Any) -> bytes:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary(method)
        return await call(request, timeout=TIMEOUT, **options)


@dataclass
class World:
    """What a test attacks, and with what."""

    mint: Mint
    plane: ControlPlane
    log: Log
    directory: Path
    stack: AsyncExitStack
    echoes: dict[MeshServer, Echo] = field(default_factory=dict)

    # -- what operators do

    async def token(self, service: str = "orders", *, uses: int = 1, ttl: float = 600.0) -> str:
        """A join token, as an operator makes it."""
        return (await self.created(service, uses=uses, ttl=ttl)).text

    async def created(self, service: str = "orders", *, uses: int = 1, ttl: float = 600.0) -> CreatedToken:
        """The same with its details."""
        made = await self.authority.create_token(service, ttl, uses, f"spiffe://{DOMAIN}/operator/test")
        self.log.keep_out(made.text)
        return made

    @property
    def authority(self) -> CertificateAuthority:
        """The certificate authority of the control plane."""
        assert self.plane.authority is not None
        return self.plane.authority

    async def revoke(self, workload_id: str) -> None:
        """Revokes one workload."""
        assert await self.authority.revoke(workload_id=workload_id) == [workload_id]

    async def publish(self, service: str, target: str) -> None:
        """Has the control plane believe that an instance of the service is there: an address that changed hands."""
        host, _, port = target.rpartition(":")
        request = registry_pb2.RegisterRequest(
            service=service, endpoint=endpoint_pb2.Endpoint(id=f"{service}-1", address=host, port=int(port))
        )
        raw = await self.stack.enter_async_context(self.mesh(self.mint.service(service)))
        lease = raw.registry.Register(timeout=6 * TIMEOUT)
        self.stack.callback(lease.cancel)
        await lease.write(request)
        assert await lease.read()
        await until(lambda: target in self.published(service))

    def published(self, service: str) -> tuple[str, ...]:
        """Targets of the endpoints that clients are told of."""
        found = self.plane._publisher.snapshot.get(ResourceKind.ENDPOINTS, service)
        return tuple(each.target for each in found.endpoints) if isinstance(found, EndpointsResource) else ()

    # -- what workloads do

    async def join(self, service: str = "orders") -> Credential:
        """The credential of a workload that joined as it should; the attacker has stolen it, or is that workload."""
        key = new_key()
        request = SignRequest(
            certificate_signing_request=signing_request(key), service=service, join_token=await self.token(service)
        )
        async with self.enrolment() as raw:
            return self.credential(key, await raw.certificates.SignCertificate(request, timeout=TIMEOUT))

    def credential(self, key: Any, answer: certificate_pb2.SignCertificateResponse) -> Credential:
        """Of a key and what the control plane answered."""
        self.log.keep_out(ca.key_pem(key))
        chain = b"".join(map(_pem, answer.certificate_chain))
        return Credential(ca.key_pem(key), chain, b"".join(map(_pem, answer.trust_bundle.roots)))

    @asynccontextmanager
    async def serving(
        self, service: str = "orders", *, handlers: Sequence[grpc.GenericRpcHandler] = (), **options: Any
    ) -> AsyncIterator[MeshServer]:
        """A secure server of the library, which registers unless told not to."""
        options = {**await self._proof(service, options), "check_interval": 1.0, **options}
        made = mesh_client.server(service, reflection=False, **options)
        echo = self.echoes[made] = Echo()
        made.add_generic_rpc_handlers((*handlers, echo))
        await made.start()
        try:
            self._keep_key_out(made._transport)
            if options.get("registry") != "none":
                await until(lambda: self.published(service))
            yield made
        finally:
            await made.stop(0)

    @asynccontextmanager
    async def client(self, service: str = "gateway", **options: Any) -> AsyncIterator[Mesh]:
        """A secure client of the library."""
        options = {**await self._proof(service, options), **options}
        async with mesh_client.connect(service=service, cache_dir="", rng=Random(7), **options) as mesh:
            yield mesh
            self._keep_key_out(mesh.transport)

    async def _proof(self, service: str, options: Mapping[str, Any]) -> dict[str, Any]:
        if "mesh" in options or options.get("insecure"):
            return {"control_plane": self.plane.address}
        token = {} if options.keys() & {"token", "token_file", "identity_dir"} else {"token": await self.token(service)}
        enrolment = self.plane.enrolment_address
        return {"control_plane": self.plane.address, "enrolment": enrolment, "insecure": False, **token}

    def _keep_key_out(self, transport: Transport) -> None:
        identity = transport.identity
        if isinstance(identity, WorkloadIdentity) and identity._credential is not None:
            self.log.keep_out(identity._credential.key)

    # -- what attackers do

    @asynccontextmanager
    async def enrolment(
        self, credentials: grpc.ChannelCredentials | None = None, address: str = ""
    ) -> AsyncIterator[Raw]:
        """To the enrolment port."""
        trusting = credentials or grpc.ssl_channel_credentials(self.mint.roots)
        async with self.channel(address or self.plane.enrolment_address, trusting, self.name) as raw:
            yield raw

    @asynccontextmanager
    async def mesh(self, credential: Credential) -> AsyncIterator[Raw]:
        """To the mesh port."""
        async with self.channel(self.plane.address, credential.for_channel(), self.name) as raw:
            yield raw

    @asynccontextmanager
    async def to(self, server: MeshServer, credential: Credential, name: str = "") -> AsyncIterator[Raw]:
        """To a server, as if it were meant."""
        name = name or f"{server.status().service}.{DOMAIN}"
        async with self.channel(server.endpoint.target, credential.for_channel(), name) as raw:
            yield raw

    @property
    def name(self) -> str:
        """The control plane's DNS name."""
        return Principal.control_plane(DOMAIN).dns_name

    @asynccontextmanager
    async def channel(
        self, target: str, credentials: grpc.ChannelCredentials | None, name: str = ""
    ) -> AsyncIterator[Raw]:
        """A connection of its own."""
        options: list[tuple[str, Any]] = [("grpc.use_local_subchannel_pool", 1)]
        if credentials is None:
            async with grpc.aio.insecure_channel(target, options) as channel:
                yield Raw(channel)
            return
        options += [("grpc.ssl_target_name_override", name)] if name else []
        async with grpc.aio.secure_channel(target, credentials, options) as channel:
            yield Raw(channel)

    @asynccontextmanager
    async def impostor(self, credentials: grpc.ServerCredentials | None) -> AsyncIterator[tuple[str, Echo]]:
        """A server of the attacker's that answers everything, and remembers what it was told."""
        server, echo = grpc.aio.server(), Echo()
        server.add_generic_rpc_handlers((echo,))
        if credentials is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", credentials)
        await server.start()
        try:
            yield f"127.0.0.1:{port}", echo
        finally:
            await server.stop(None)


@asynccontextmanager
async def open_world(
    directory: Path, log: Log, *, identity: Mapping[str, Any] | None = None, **options: Any
) -> AsyncIterator[World]:
    """A control plane whose issuing key the test has too."""
    mint = Mint(directory / "ca")
    log.keep_out(ca.key_pem(mint.issuer.key))
    plane = ControlPlane(ControlPlaneOptions(identity=replace(mint.options(), **(identity or {})), **options))
    await plane.start()
    try:
        async with AsyncExitStack() as stack:
            yield World(mint, plane, log, directory, stack)
    finally:
        await plane.stop(0)


async def refused(attempt: Awaitable[object], name: str = "the attack") -> grpc.aio.AioRpcError:
    """The error that an attempt ends with."""
    try:
        await attempt
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError(f"{name} succeeded")


async def status(raw: Raw) -> admin_pb2.GetStatusResponse:
    """What operators alone may see."""
    return await raw.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=TIMEOUT)


async def until(condition: Callable[[], Any], changed: Callable[[], Any] | None = None) -> None:
    """Returns once the condition holds, which is looked at after each change."""
    async with asyncio.timeout(TIMEOUT):
        while not condition():
            await (asyncio.sleep(0.005) if changed is None else changed())


def _pem(certificate: bytes) -> bytes:
    body = base64.encodebytes(certificate).replace(b"\n", b"")
    lines = [body[start : start + 64] for start in range(0, len(body), 64)]
    return b"-----BEGIN CERTIFICATE-----\n" + b"\n".join(lines) + b"\n-----END CERTIFICATE-----\n"
