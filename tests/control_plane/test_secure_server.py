"""A whole control plane with identity on: two ports, and every RPC bound to the identity of its connection."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from mesh.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    authority_pb2,
    authority_pb2_grpc,
    certificate_pb2,
    certificate_pb2_grpc,
    discovery_pb2,
    discovery_pb2_grpc,
    endpoint_pb2,
    registry_pb2,
    registry_pb2_grpc,
    resource_pb2,
)

from control_plane.access import Access
from control_plane.credentials import add_port
from control_plane.gate import Gate
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from mesh_cli.client import CHANNEL_OPTIONS
from mesh_cli.credentials import OperatorCredentials
from mesh_client.core.errors import ConfigError
from mesh_client.core.identity import DEFAULT_TRUST_DOMAIN, Principal
from mesh_client.identity.settings import identity_settings
from mesh_client.identity.workload import WorkloadIdentity
from mesh_client.transport import CONTROL_PLANE, MutualTls
from tests.certificates import TestAuthority

TIMEOUT = 30.0
DENIED = grpc.StatusCode.PERMISSION_DENIED


class World:
    """A control plane, and channels to it with identities of all kinds."""

    def __init__(self, plane: ControlPlane, directory: Path, stack: AsyncExitStack) -> None:
        self.plane = plane
        self.directory = directory
        self._stack = stack

    async def workload(self, service: str, *, token: str | None = None) -> tuple[grpc.aio.Channel, str]:
        """A channel of a workload that has joined, and its id."""
        assert self.plane.authority is not None
        if token is None:
            token = (await self.plane.authority.create_token(service, 600.0, 1, "test")).text
        settings = identity_settings(
            service, [self.plane.address], enrolment=self.plane.enrolment_address, token=token, insecure=False
        )
        assert settings is not None
        identity = WorkloadIdentity(settings)
        transport = MutualTls(identity)
        await transport.start()
        self._stack.push_async_callback(transport.stop)
        await transport.ready()
        channel = await self._stack.enter_async_context(transport.open_channel(self.plane.address, CONTROL_PLANE))
        return channel, identity.state(0.0).workload_id

    async def operator(self, name: str = "alice") -> grpc.aio.Channel:
        """A channel of an operator."""
        assert self.plane.authority is not None
        await self.plane.authority.create_operator(name, self.directory / name)
        credentials = OperatorCredentials.load(self.directory / name)
        return await self._stack.enter_async_context(
            grpc.aio.secure_channel(
                self.plane.address, credentials.channel_credentials, credentials.channel_options(CHANNEL_OPTIONS)
            )
        )


@asynccontextmanager
async def running(directory: Path, **options: Any) -> AsyncIterator[World]:
    plane = ControlPlane(ControlPlaneOptions(data_dir=directory / "state", debounce_quiet=0.005, **options))
    await plane.start()
    try:
        async with AsyncExitStack() as stack:
            yield World(plane, directory, stack)
    finally:
        await plane.stop(0.5)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running(tmp_path) as world:
        yield world


async def refusal(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code(), raised.value.details() or ""


async def end_of(stream: grpc.aio.StreamStreamCall[Any, Any]) -> tuple[grpc.StatusCode, str]:
    try:
        while await stream.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return await stream.code(), await stream.details() or ""


def registration(service: str, id: str = "one") -> registry_pb2.RegisterRequest:
    endpoint = endpoint_pb2.Endpoint(id=id, address="127.0.0.1", port=50051)
    return registry_pb2.RegisterRequest(service=service, endpoint=endpoint)


async def register(
    channel: grpc.aio.Channel, service: str
) -> grpc.aio.StreamStreamCall[registry_pb2.RegisterRequest, registry_pb2.RegisterResponse]:
    stream = registry_pb2_grpc.RegistryServiceStub(channel).Register(timeout=TIMEOUT)
    await stream.write(registration(service))
    return stream


async def watch(
    channel: grpc.aio.Channel, node: discovery_pb2.Node
) -> grpc.aio.StreamStreamCall[discovery_pb2.DeltaResourcesRequest, discovery_pb2.DeltaResourcesResponse]:
    stream = discovery_pb2_grpc.DiscoveryServiceStub(channel).DeltaResources(timeout=TIMEOUT)
    kind = resource_pb2.RESOURCE_TYPE_SERVICE_ENDPOINTS
    await stream.write(discovery_pb2.DeltaResourcesRequest(node=node, type=kind, subscribe=["orders"]))
    return stream


async def endpoints(operator: grpc.aio.Channel, service: str) -> list[str]:
    request = admin_pb2.ListEndpointsRequest(service=service)
    answer = await admin_pb2_grpc.AdminServiceStub(operator).ListEndpoints(request, timeout=TIMEOUT)
    return [each.endpoint.id for each in answer.endpoints]


async def test_a_workload_registers_for_its_own_service_alone(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "control_plane.access")
    orders, _ = await world.workload("orders")
    stream = await register(orders, "orders")
    assert isinstance(await stream.read(), registry_pb2.RegisterResponse)
    assert await endpoints(await world.operator(), "orders") == ["one"]
    refused = await register(orders, "payments")
    said = "spiffe://mesh.internal/service/orders may not register for payments: only payments's own workloads may"
    assert await end_of(refused) == (DENIED, said)
    assert "may not register for payments" in caplog.text
    malformed = await register(orders, "No Service")
    assert (await end_of(malformed))[0] is grpc.StatusCode.INVALID_ARGUMENT
    stream.cancel()


async def test_an_operator_does_not_register(world: World) -> None:
    stream = await register(await world.operator(), "orders")
    assert (await end_of(stream))[0] is DENIED


async def test_a_workload_drains_its_own_service_alone_and_operators_any(world: World) -> None:
    request = registry_pb2.DrainRequest(service="orders", endpoint_id="one")
    for channel in ((await world.workload("orders"))[0], await world.operator()):
        assert (await registry_pb2_grpc.RegistryServiceStub(channel).Drain(request, timeout=TIMEOUT)).complete
    payments, _ = await world.workload("payments")
    code, said = await refusal(registry_pb2_grpc.RegistryServiceStub(payments).Drain(request, timeout=TIMEOUT))
    assert (code, "payments may not drain an endpoint of orders" in said) == (DENIED, True)


async def test_a_node_is_of_the_service_that_its_certificate_names(world: World) -> None:
    orders, workload = await world.workload("orders")
    stream = await watch(orders, discovery_pb2.Node(id="orders-1", service="orders"))
    assert isinstance(await stream.read(), discovery_pb2.DeltaResourcesResponse)
    stub = admin_pb2_grpc.AdminServiceStub(await world.operator())
    (client,) = (await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=TIMEOUT)).clients
    assert (client.service, client.workload_id) == ("orders", workload)
    stream.cancel()
    for service in ("payments", ""):
        code, said = await end_of(await watch(orders, discovery_pb2.Node(id="orders-1", service=service)))
        assert code is DENIED
        assert "spiffe://mesh.internal/service/orders may not watch as" in said
    stream = await watch(await world.operator("bob"), discovery_pb2.Node(id="somebody"))
    assert isinstance(await stream.read(), discovery_pb2.DeltaResourcesResponse)
    stream.cancel()


async def test_the_services_of_operators_are_closed_to_workloads(world: World) -> None:
    orders, _ = await world.workload("orders")
    operator = await world.operator()
    status = admin_pb2.GetStatusRequest()
    code, said = await refusal(admin_pb2_grpc.AdminServiceStub(orders).GetStatus(status, timeout=TIMEOUT))
    assert code is DENIED
    assert said == (
        "spiffe://mesh.internal/service/orders may not call /mesh.v1.AdminService/GetStatus: that takes an operator's "
        "identity"
    )
    assert (await admin_pb2_grpc.AdminServiceStub(operator).GetStatus(status, timeout=TIMEOUT)).control_plane
    ask = authority_pb2.GetCertificateAuthorityRequest()
    code, _ = await refusal(
        authority_pb2_grpc.AuthorityServiceStub(orders).GetCertificateAuthority(ask, timeout=TIMEOUT)
    )
    assert code is DENIED
    answer = await authority_pb2_grpc.AuthorityServiceStub(operator).GetCertificateAuthority(ask, timeout=TIMEOUT)
    assert answer.trust_domain == DEFAULT_TRUST_DOMAIN
    shown = await admin_pb2_grpc.AdminServiceStub(operator).GetStatus(status, timeout=TIMEOUT)
    assert list(shown.denials) == [admin_pb2.Denials(caller="spiffe://mesh.internal/service/orders", count=2)]
    assert shown.trust_domain == DEFAULT_TRUST_DOMAIN


async def test_health_and_reflection_are_for_everybody_with_an_identity(world: World) -> None:
    orders, workload = await world.workload("orders")
    check = health_pb2.HealthCheckRequest()
    health = health_pb2_grpc.HealthStub(orders)
    watching = health.Watch(check, timeout=TIMEOUT)
    assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
    watching.cancel()
    assert (await health.Check(check, timeout=TIMEOUT)).status == health_pb2.HealthCheckResponse.SERVING
    info = reflection_pb2_grpc.ServerReflectionStub(orders).ServerReflectionInfo(timeout=TIMEOUT)
    await info.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    names = {each.name for each in (await info.read()).list_services_response.service}
    assert {"mesh.v1.AdminService", "mesh.v1.AuthorityService", "mesh.v1.CertificateService"} <= names
    info.cancel()
    assert world.plane.authority is not None
    await world.plane.authority.revoke(workload_id=workload)
    assert (await refusal(health.Check(check, timeout=TIMEOUT)))[0] is DENIED


async def test_unknown_methods_are_unknown_to_everybody(world: World) -> None:
    orders, _ = await world.workload("orders")
    method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = orders.unary_unary("/mesh.v1.AdminService/Nothing")
    assert (await refusal(method(b"", timeout=TIMEOUT)))[0] is grpc.StatusCode.UNIMPLEMENTED


async def test_the_enrolment_port_offers_certificates_and_nothing_else(world: World) -> None:
    assert world.plane.authority is not None
    credentials = grpc.ssl_channel_credentials(world.plane.authority.roots_pem)
    name = Principal.control_plane(DEFAULT_TRUST_DOMAIN).dns_name
    options = [("grpc.ssl_target_name_override", name)]
    async with grpc.aio.secure_channel(world.plane.enrolment_address, credentials, options) as channel:
        for call in (
            admin_pb2_grpc.AdminServiceStub(channel).GetStatus(admin_pb2.GetStatusRequest(), timeout=TIMEOUT),
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT),
        ):
            assert (await refusal(call))[0] is grpc.StatusCode.UNIMPLEMENTED
        sign = certificate_pb2_grpc.CertificateServiceStub(channel).SignCertificate
        too_large = certificate_pb2.SignCertificateRequest(certificate_signing_request=bytes(70_000))
        assert (await refusal(sign(too_large, timeout=TIMEOUT)))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    async with grpc.aio.secure_channel(world.plane.address, credentials, options) as channel:
        call = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
        assert (await refusal(call))[0] is grpc.StatusCode.UNAVAILABLE


async def test_a_revoked_workload_loses_its_streams_and_its_lease_at_once(world: World) -> None:
    operator = await world.operator()
    revoked, workload = await world.workload("orders")
    lease = await register(revoked, "orders")
    assert isinstance(await lease.read(), registry_pb2.RegisterResponse)
    stream = await watch(revoked, discovery_pb2.Node(id="orders-1", service="orders"))
    assert isinstance(await stream.read(), discovery_pb2.DeltaResourcesResponse)
    other, _ = await world.workload("orders")
    stays = await watch(other, discovery_pb2.Node(id="orders-2", service="orders"))
    assert isinstance(await stays.read(), discovery_pb2.DeltaResourcesResponse)
    assert await endpoints(operator, "orders") == ["one"]
    request = authority_pb2.RevokeWorkloadRequest(workload_id=workload)
    await authority_pb2_grpc.AuthorityServiceStub(operator).RevokeWorkload(request, timeout=TIMEOUT)
    assert await end_of(lease) == (DENIED, "the workload has been revoked")
    assert await end_of(stream) == (DENIED, "the workload has been revoked")
    assert await endpoints(operator, "orders") == []
    for again in (
        await register(revoked, "orders"),
        await watch(revoked, discovery_pb2.Node(id="x", service="orders")),
    ):
        code, said = await end_of(again)
        assert (code, "the workload has been revoked" in said) == (DENIED, True)
    stays.cancel()


async def test_one_workload_does_not_keep_the_others_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control_plane.discovery.MAX_STREAMS_OF_ONE", 2)
    monkeypatch.setattr("control_plane.registry.MAX_LEASES_OF_ONE", 1)
    greedy, _ = await world.workload("orders")
    node = discovery_pb2.Node(id="orders-1", service="orders")
    streams = [await watch(greedy, node) for _ in range(2)]
    for stream in streams:
        assert isinstance(await stream.read(), discovery_pb2.DeltaResourcesResponse)
    code, said = await end_of(await watch(greedy, node))
    assert (code, said) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "the workload has 2 streams open already")
    lease = await register(greedy, "orders")
    assert isinstance(await lease.read(), registry_pb2.RegisterResponse)
    assert (await end_of(await register(greedy, "orders")))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    other, _ = await world.workload("orders")
    modest = await watch(other, node)
    assert isinstance(await modest.read(), discovery_pb2.DeltaResourcesResponse)
    # What has ended counts no more.
    calls: list[Any] = [*streams, lease]
    for ended in calls:
        await ended.done_writing()
        assert (await end_of(ended))[0] is grpc.StatusCode.OK
    again = await watch(greedy, node)
    assert isinstance(await again.read(), discovery_pb2.DeltaResourcesResponse)
    assert isinstance(await (await register(greedy, "orders")).read(), registry_pb2.RegisterResponse)
    modest.cancel()


async def test_who_changes_policies_is_logged(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "control_plane.admin")
    caplog.set_level(logging.INFO, "control_plane.admin_policies")
    admin = admin_pb2_grpc.AdminServiceStub(await world.operator())
    await admin.ApplyPolicy(admin_pb2.ApplyPolicyRequest(document="service: orders"), timeout=TIMEOUT)
    await admin.DeletePolicy(admin_pb2.DeletePolicyRequest(service="orders"), timeout=TIMEOUT)
    await admin.ConfirmRemovals(admin_pb2.ConfirmRemovalsRequest(), timeout=TIMEOUT)
    stored, deleted, confirmed = (
        record.getMessage() for record in caplog.records if record.name.startswith("control_plane.admin")
    )
    assert stored.startswith("spiffe://mesh.internal/operator/alice (workload ")
    assert "stored the policy of orders, version 1" in stored
    assert "deleted the policy of orders" in deleted
    assert "confirmed the removal of 0 endpoints" in confirmed


async def test_a_restarted_control_plane_is_the_same_authority(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        assert world.plane.authority is not None
        roots = world.plane.authority.roots_pem
        token = (await world.plane.authority.create_token("orders", 600.0, 1, "test")).text
        await world.operator()
    async with running(tmp_path) as world:
        assert world.plane.authority is not None
        assert world.plane.authority.roots_pem == roots
        channel, _ = await world.workload("orders", token=token)
        assert isinstance(await (await register(channel, "orders")).read(), registry_pb2.RegisterResponse)
        credentials = OperatorCredentials.load(tmp_path / "alice")
        options = credentials.channel_options(CHANNEL_OPTIONS)
        async with grpc.aio.secure_channel(world.plane.address, credentials.channel_credentials, options) as operator:
            assert await endpoints(operator, "orders") == ["one"]


async def test_connections_end_by_age_and_come_back(tmp_path: Path) -> None:
    async with running(tmp_path, connection_age=1.0, connection_age_grace=1.0) as world:
        channel, _ = await world.workload("orders")
        stream = await register(channel, "orders")
        response = await stream.read()
        assert isinstance(response, registry_pb2.RegisterResponse)
        code, _ = await end_of(stream)
        assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        again = registry_pb2_grpc.RegistryServiceStub(channel).Register(timeout=TIMEOUT, wait_for_ready=True)
        request = registration("orders")
        request.lease_token = response.lease_token
        await again.write(request)
        resumed = await again.read()
        assert isinstance(resumed, registry_pb2.RegisterResponse)
        assert resumed.lease_token == response.lease_token
        again.cancel()


async def test_a_control_plane_without_identity_says_so_and_has_no_enrolment(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "control_plane.server")
    plane = ControlPlane(ControlPlaneOptions(insecure=True))
    await plane.start()
    await plane.stop(0.0)
    assert (plane.authority, plane.enrolment_address, plane.enrolment_port) == (None, "", 0)
    assert "insecure, as asked" in caplog.text


async def test_an_enrolment_port_that_is_taken_fails_the_start_and_leaves_nothing(tmp_path: Path, world: World) -> None:
    taken = world.plane.enrolment_address
    for _ in range(2):  # the second one finds the data directory free
        plane = ControlPlane(ControlPlaneOptions(data_dir=tmp_path / "other", enrolment_address=taken))
        with pytest.raises(ConfigError, match=f"cannot listen on {taken}"):
            await plane.start()


# -- the gate by itself


async def _one(request: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    if not isinstance(request, bytes):
        assert isinstance(request, AsyncIterator)
        return b"".join([part async for part in request])
    return request


async def _many(request: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
    yield await _one(request, context)


SILENT = {
    "UnaryUnary": "unary_unary",
    "UnaryStream": "unary_stream",
    "StreamUnary": "stream_unary",
    "StreamStream": "stream_stream",
}


async def test_the_gate_guards_all_four_kinds_of_rpcs_of_services_that_nobody_named() -> None:
    made: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "UnaryUnary": grpc.unary_unary_rpc_method_handler(_one),
        "UnaryStream": grpc.unary_stream_rpc_method_handler(_many),
        "StreamUnary": grpc.stream_unary_rpc_method_handler(_one),
        "StreamStream": grpc.stream_stream_rpc_method_handler(_many),
    }
    authority = TestAuthority()
    server = grpc.aio.server(interceptors=[Gate(Access(DEFAULT_TRUST_DOMAIN))])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("somebody.elses.New", made),))
    address = (
        f"127.0.0.1:{add_port(server, '127.0.0.1:0', authority.control_plane().server_credentials(authority.roots))}"
    )
    await server.start()

    async def call(channel: Any, kind: str) -> bytes:
        path = f"/somebody.elses.New/{kind}"
        requests = [b"a", b"b"]
        match kind:
            case "UnaryUnary":
                answer: bytes = await channel.unary_unary(path)(b"ab", timeout=TIMEOUT)
                return answer
            case "UnaryStream":
                return b"".join([part async for part in channel.unary_stream(path)(b"ab", timeout=TIMEOUT)])
            case "StreamUnary":
                joined: bytes = await channel.stream_unary(path)(iter(requests), timeout=TIMEOUT)
                return joined
            case _:
                stream = channel.stream_stream(path)(iter(requests), timeout=TIMEOUT)
                return b"".join([part async for part in stream])

    options = [("grpc.ssl_target_name_override", Principal.control_plane(DEFAULT_TRUST_DOMAIN).dns_name)]
    try:
        for certificate, allowed in ((authority.operator(), True), (authority.service("orders"), False)):
            credentials = certificate.channel_credentials(authority.roots)
            async with grpc.aio.secure_channel(address, credentials, options) as channel:
                for kind in made:
                    if allowed:
                        assert await call(channel, kind) == b"ab"
                    else:
                        # A refusal that crosses a message loses its words (grpc.aio), so streams stay silent.
                        silent: Any = getattr(channel, SILENT[kind])(f"/somebody.elses.New/{kind}")
                        started = silent(timeout=TIMEOUT) if kind.startswith("Stream") else silent(b"", timeout=TIMEOUT)
                        code, said = await refusal(started.read() if kind.endswith("Stream") else started)
                        assert (code, f"may not call /somebody.elses.New/{kind}" in said) == (DENIED, True)
    finally:
        await server.stop(None)
