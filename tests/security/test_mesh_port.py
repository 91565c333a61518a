"""Attacks by those who are in the mesh: as another service, as an operator, and after their revocation."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from mesh.v1 import admin_pb2, authority_pb2, certificate_pb2, discovery_pb2, endpoint_pb2, registry_pb2, resource_pb2

import mesh_client
from mesh_client.core.errors import ConfigError
from mesh_client.core.identity import Principal
from tests.security.mint import Credential, new_key, signing_request
from tests.security.world import DOMAIN, SECRET_REQUEST, TIMEOUT, Log, Raw, SignRequest, World, refused, status, until


def registering(service: str) -> registry_pb2.RegisterRequest:
    """An endpoint of the attacker's."""
    endpoint = endpoint_pb2.Endpoint(id="evil", address="127.0.0.1", port=4711)
    return registry_pb2.RegisterRequest(service=service, endpoint=endpoint)


def watching(service: str) -> discovery_pb2.DeltaResourcesRequest:
    """The first request of a client of a service."""
    return discovery_pb2.DeltaResourcesRequest(
        node=discovery_pb2.Node(id="evil", service=service), type=resource_pb2.RESOURCE_TYPE_SERVICE_ENDPOINTS
    )


async def denied(world: World, attempt: Awaitable[object], words: str, name: str = "the attack") -> None:
    """The attempt is refused with these words, which are in the control plane's log too."""
    error = await refused(attempt, name)
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED, name
    assert words in (error.details() or ""), name
    assert words in world.log.control_plane, name


# -- as another service


async def test_nobody_registers_for_another_service(world: World) -> None:
    for who, service in ((await world.join("payments"), "orders"), (world.mint.operator(), "orders")):
        async with world.mesh(who) as raw:
            lease = raw.registry.Register(timeout=TIMEOUT)
            await lease.write(registering(service))
            await denied(world, lease.read(), f"may not register for {service}: only {service}'s own workloads may")
    assert world.published("orders") == ()


async def test_an_open_registration_does_not_change_its_service(world: World) -> None:
    async with world.mesh(await world.join("payments")) as raw:
        lease = raw.registry.Register(timeout=TIMEOUT)
        await lease.write(registering("payments"))
        assert isinstance(await lease.read(), registry_pb2.RegisterResponse)
        await lease.write(registering("orders"))
        assert (await refused(lease.read())).code() is grpc.StatusCode.INVALID_ARGUMENT
    assert world.published("orders") == ()


async def test_a_server_of_payments_does_not_get_to_be_orders(world: World) -> None:
    """By the library: neither with the token of payments nor with its identity."""
    token = await world.token("payments")
    with pytest.raises(ConfigError, match="the join token is for 'payments', not for 'orders'"):
        mesh_client.server("orders", control_plane=world.plane.address, token=token, insecure=False)
    async with world.client("payments") as mesh:
        with pytest.raises(ConfigError, match="payments's, whose identity a server of orders cannot share"):
            mesh_client.server("orders", control_plane=world.plane.address, mesh=mesh)
    path = world.directory / "token"
    path.touch(0o600)
    path.write_text(token)
    with pytest.raises(ConfigError, match="the join token is for 'payments', not for 'orders'"):
        async with world.serving("orders", token_file=path):
            pass


async def test_a_lease_is_not_taken_over_by_another_service_even_with_its_token(world: World) -> None:
    async with world.mesh(await world.join("orders")) as raw, world.mesh(await world.join("payments")) as other:
        lease = raw.registry.Register(timeout=TIMEOUT)
        await lease.write(registering("orders"))
        answer = await lease.read()
        assert isinstance(answer, registry_pb2.RegisterResponse)
        theft = other.registry.Register(timeout=TIMEOUT)
        request = registering("orders")
        request.lease_token = answer.lease_token
        await theft.write(request)
        await denied(world, theft.read(), "may not register for orders")
        world.log.keep_out(answer.lease_token)


async def test_nobody_drains_another_service(world: World) -> None:
    async with world.serving("orders") as server:
        request = registry_pb2.DrainRequest(service="orders", endpoint_id=server.instance_id)
        for who in ("payments", "control-plane", "operator"):
            async with world.mesh(await world.join(who)) as raw:
                words = "may not drain an endpoint of orders: only orders's own workloads may"
                await denied(world, raw.registry.Drain(request, timeout=TIMEOUT), words, who)
        assert world.published("orders") == (server.endpoint.target,)


async def test_nobody_watches_as_another_service(world: World) -> None:
    async with world.mesh(await world.join("payments")) as raw:
        for service, words in (("orders", "may not watch as orders"), ("", "may not watch as a node of no service")):
            stream = raw.discovery.DeltaResources(timeout=TIMEOUT)
            await stream.write(watching(service))
            await denied(world, stream.read(), words)


async def test_streams_that_say_nothing_do_not_keep_others_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control_plane.discovery.MAX_STREAMS_OF_ONE", 3)
    monkeypatch.setattr("control_plane.discovery.REFUSAL_PATIENCE", 0.01)
    stranger = world.mint.sign(Principal.service(DOMAIN, "orders"), common_names=["nobody"])
    async with (
        world.mesh(await world.join("payments")) as greedy,
        world.mesh(stranger) as nobody,
        world.mesh(await world.join("orders")) as other,
    ):
        silent = [greedy.discovery.DeltaResources(timeout=TIMEOUT) for _ in range(5)]
        codes = [asyncio.ensure_future(each.code()) for each in silent]
        await until(lambda: sum(each.done() for each in codes) == 2)
        assert [each.result() for each in codes if each.done()] == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 2
        unnamed = nobody.discovery.DeltaResources(timeout=TIMEOUT)
        assert await unnamed.code() is grpc.StatusCode.PERMISSION_DENIED
        stream = other.discovery.DeltaResources(timeout=TIMEOUT)
        await stream.write(watching("orders"))
        assert isinstance(await stream.read(), discovery_pb2.DeltaResourcesResponse)
        for each in silent:
            each.cancel()
        await asyncio.gather(*codes)
        await until(lambda: len(world.plane._hub._streams) == 1)
        assert sum(world.plane._hub._open.values()) == 1


async def test_a_refusal_right_behind_the_first_request_is_heard(world: World) -> None:
    async with world.mesh(await world.join("orders")) as raw:
        streams = [raw.discovery.DeltaResources(timeout=TIMEOUT) for _ in range(8)]
        for stream in streams:
            await stream.write(watching("orders"))
            await stream.write(watching("payments"))
        for stream in streams:
            error = await refused(_to_the_end(stream))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert error.details() == "node: must not change within a stream"


# -- as an operator or a control plane


def _attempts(raw: Raw) -> dict[str, Awaitable[object]]:
    """Everything that operators alone may do."""
    admin, authority = raw.admin, raw.authority
    made: dict[str, Awaitable[object]] = {}
    for stub, service in (
        (admin, admin_pb2.DESCRIPTOR.services_by_name["AdminService"]),
        (authority, authority_pb2.DESCRIPTOR.services_by_name["AuthorityService"]),
    ):
        for method in service.methods:
            package = admin_pb2 if stub is admin else authority_pb2
            request = getattr(package, method.input_type.name)()
            made[f"/{service.full_name}/{method.name}"] = getattr(stub, method.name)(request, timeout=TIMEOUT)
    return made


async def test_workloads_do_not_get_to_do_what_operators_do(world: World) -> None:
    control_plane = world.mint.sign(Principal.control_plane(DOMAIN))
    for who in (await world.join("orders"), await world.join("operator"), control_plane):
        async with world.mesh(who) as raw:
            attempts = _attempts(raw)
            assert len(attempts) > 10
            for method, attempt in attempts.items():
                await denied(world, attempt, f"may not call {method}: that takes an operator's identity", method)
    assert all(token.uses_left == 0 for token in await world.authority.tokens())


async def test_a_workload_that_does_not_give_up_does_not_fill_the_log(world: World) -> None:
    async with world.mesh(await world.join("payments")) as raw, world.mesh(await world.join("orders")) as other:
        began = time.monotonic()
        for _ in range(6):
            await asyncio.gather(*(refused(status(raw)) for _ in range(50)))
        await denied(world, status(other), "that takes an operator's identity")
    said = world.log.control_plane.count("refused: spiffe://mesh.internal/service/payments")
    assert 100 <= said <= 101 + time.monotonic() - began  # one more each second
    assert world.plane.access.denials[f"spiffe://{DOMAIN}/service/payments"] == 300
    assert "refused: spiffe://mesh.internal/service/orders" in world.log.control_plane


async def test_an_operator_of_another_trust_domain_is_none(world: World) -> None:
    stranger = world.mint.sign(Principal.operator(DOMAIN, "alice"), uris=["spiffe://mesh.internal.evil/operator/alice"])
    async with world.mesh(stranger) as raw:
        error = await refused(raw.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=TIMEOUT))
    assert error.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE)


async def test_a_control_plane_does_not_renew_and_an_operator_gets_no_more_time(
    world: World, log: Log, tmp_path: Path
) -> None:
    request = SignRequest(certificate_signing_request=signing_request(new_key()))
    async with world.mesh(world.mint.sign(Principal.control_plane(DOMAIN))) as raw:
        await denied(world, raw.certificates.SignCertificate(request, timeout=TIMEOUT), "control planes sign their own")
    files = await world.authority.create_operator("alice", tmp_path / "alice", lifetime=600.0)
    log.keep_out(files.key.read_bytes())
    operator = Credential(files.key.read_bytes(), files.chain.read_bytes(), files.roots.read_bytes())
    key = new_key()
    request = SignRequest(certificate_signing_request=signing_request(key))
    async with world.mesh(operator) as raw:
        answer = await raw.certificates.SignCertificate(request, timeout=TIMEOUT)
    assert world.credential(key, answer).leaf.not_valid_after_utc == operator.leaf.not_valid_after_utc


# -- after revocation


async def test_a_revoked_workload_may_nothing_any_more(world: World) -> None:
    credential = await world.join("orders")
    await world.revoke(credential.workload_id)
    request = SignRequest(certificate_signing_request=signing_request(new_key()))
    async with world.mesh(credential) as raw:
        lease, stream = raw.registry.Register(timeout=TIMEOUT), raw.discovery.DeltaResources(timeout=TIMEOUT)
        bundle = raw.certificates.WatchTrustBundle(timeout=TIMEOUT)
        await lease.write(registering("orders"))
        await stream.write(watching("orders"))
        drain = registry_pb2.DrainRequest(service="orders", endpoint_id="x")
        for name, attempt in (
            ("renew", raw.certificates.SignCertificate(request, timeout=TIMEOUT)),
            ("follow the bundle", bundle.read()),
            ("register", lease.read()),
            ("watch", stream.read()),
            ("drain", raw.registry.Drain(drain, timeout=TIMEOUT)),
        ):
            error = await refused(attempt, name)
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED, name
            assert "the workload has been revoked" in (error.details() or ""), name
    assert f"(workload {credential.workload_id}) at ipv4:127.0.0.1" in world.log.control_plane
    assert world.log.control_plane.count("the workload has been revoked") == 5
    assert world.published("orders") == ()


async def test_a_revoked_operator_is_none_any_more(world: World, log: Log, tmp_path: Path) -> None:
    files = await world.authority.create_operator("alice", tmp_path / "alice")
    log.keep_out(files.key.read_bytes())
    operator = Credential(files.key.read_bytes(), files.chain.read_bytes(), files.roots.read_bytes())
    async with world.mesh(operator) as raw:
        assert (await status(raw)).control_plane
        await world.revoke(operator.workload_id)
        await denied(world, status(raw), "the workload has been revoked")
        request = SignRequest(certificate_signing_request=signing_request(new_key()))
        await denied(world, raw.certificates.SignCertificate(request, timeout=TIMEOUT), "has been revoked")


async def test_open_streams_of_a_revoked_workload_are_cut_at_once_and_nobody_elses(world: World) -> None:
    credential, other = await world.join("orders"), await world.join("orders")
    async with world.mesh(credential) as raw, world.mesh(other) as good:
        streams = []
        for each, name in ((raw, "evil"), (good, "good")):
            lease, stream = each.registry.Register(timeout=TIMEOUT), each.discovery.DeltaResources(timeout=TIMEOUT)
            bundle = each.certificates.WatchTrustBundle(timeout=TIMEOUT)
            request = registering("orders")
            request.endpoint.id = name
            await lease.write(request)
            await stream.write(watching("orders"))
            await bundle.write(certificate_pb2.WatchTrustBundleRequest())
            assert isinstance(await lease.read(), registry_pb2.RegisterResponse)
            assert isinstance(await stream.read(), discovery_pb2.DeltaResourcesResponse)
            assert isinstance(await bundle.read(), certificate_pb2.WatchTrustBundleResponse)
            streams.append((lease, stream, bundle))
        await until(lambda: len(world.published("orders")) == 2)
        await world.revoke(credential.workload_id)
        for cut in streams[0]:
            error = await refused(_to_the_end(cut))
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            assert "the workload has been revoked" in (error.details() or "")
        # Out of what callers are told, at once; the others go on.
        await until(lambda: len(world.published("orders")) == 1)
        answer = await streams[1][2].read()
        assert isinstance(answer, certificate_pb2.WatchTrustBundleResponse)
        assert list(answer.trust_bundle.revoked_workloads) == [credential.workload_id]
        assert not any(each.done() for each in streams[1])
    assert f"workload {credential.workload_id} has been revoked: its 3 streams are cut" in world.log.control_plane


async def _to_the_end(stream: grpc.aio.StreamStreamCall[Any, Any]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while await stream.read() is not grpc.aio.EOF:
            pass


async def test_calls_of_a_revoked_workload_are_refused_and_its_streams_end_at_once(world: World) -> None:
    credential = await world.join("gateway")
    async with world.serving("orders") as server, world.to(server, credential) as raw:
        method: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = raw.channel.stream_stream("/test.Echo/Stream")
        stream = method(timeout=TIMEOUT)
        await stream.write(b"before")
        assert await stream.read() == b"before"
        await world.revoke(credential.workload_id)
        identity = server._transport.identity
        assert identity is not None
        await until(lambda: credential.workload_id in identity.revoked)
        error = await refused(raw.echo())
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        words = f"gateway calls from workload {credential.workload_id}, which has been revoked"
        assert words in (error.details() or "")
        assert words in world.log.mesh_client
        assert (await refused(_to_the_end(stream))).code() is grpc.StatusCode.PERMISSION_DENIED
        error = await refused(raw.echo())
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert world.echoes[server].received == [b"before"]


async def test_a_revoked_client_of_the_library_neither_renews_nor_calls(log: Log, world: World) -> None:
    async with world.serving("orders") as server, world.client("gateway") as mesh:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = mesh.channel("orders").unary_unary("/test.Echo/Unary")
        assert await call(b"hello", timeout=TIMEOUT) == b"hello"
        identity = mesh.transport.identity
        assert identity is not None
        await world.revoke(identity.state(0.0).workload_id)
        theirs = server._transport.identity
        assert theirs is not None
        await until(lambda: theirs.revoked)
        with pytest.raises(mesh_client.MeshRpcError) as caught:
            await call(SECRET_REQUEST, timeout=TIMEOUT)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "which has been revoked" in (caught.value.details() or "")
        await until(lambda: "the workload has been revoked" in log.mesh_client)
        assert world.echoes[server].received == [b"hello"]


# -- what the log shows of what others say

_FORGED = "x\nERROR control_plane: forged\x1b[2J"


async def test_nobody_writes_lines_of_their_own_into_the_log(world: World) -> None:
    """Nor what a terminal would obey."""
    node = discovery_pb2.Node(id="x", service="orders")
    watches = [
        discovery_pb2.DeltaResourcesRequest(node=discovery_pb2.Node(id="x", service=_FORGED)),
        discovery_pb2.DeltaResourcesRequest(node=discovery_pb2.Node(id=_FORGED, service="orders")),
        discovery_pb2.DeltaResourcesRequest(node=discovery_pb2.Node(id="x", service="orders", user_agent=_FORGED)),
        discovery_pb2.DeltaResourcesRequest(node=node, subscribe=[_FORGED]),
        discovery_pb2.DeltaResourcesRequest(node=node, unsubscribe=[_FORGED]),
        discovery_pb2.DeltaResourcesRequest(node=node, held_versions={_FORGED: _FORGED}),
        discovery_pb2.DeltaResourcesRequest(node=node, response_nonce=_FORGED),
    ]
    for request in watches:
        request.type = resource_pb2.RESOURCE_TYPE_SERVICE_ENDPOINTS
    bad = registering("orders")
    bad.endpoint.id = _FORGED
    token = await world.token("orders")
    async with world.mesh(await world.join("orders")) as raw, world.enrolment() as stranger:
        for request in watches:
            stream = raw.discovery.DeltaResources(timeout=TIMEOUT)
            await stream.write(request)
            # What was taken is followed by what is not: the refusal names the stream.
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await stream.read()
                await stream.write(watching("payments"))
            await refused(_to_the_end(stream))
        for registration in (registering(_FORGED), bad):
            lease = raw.registry.Register(timeout=TIMEOUT)
            await lease.write(registration)
            assert await lease.code() is not grpc.StatusCode.OK
        for service, endpoint in (("orders", _FORGED), (_FORGED, "x")):
            drain = registry_pb2.DrainRequest(service=service, endpoint_id=endpoint)
            await refused(raw.registry.Drain(drain, timeout=TIMEOUT))
        for service, text in ((_FORGED, token), ("orders", _FORGED)):
            joining = SignRequest(
                certificate_signing_request=signing_request(new_key()), service=service, join_token=text
            )
            await refused(stranger.certificates.SignCertificate(joining, timeout=TIMEOUT))
        renewal = SignRequest(certificate_signing_request=signing_request(new_key()), service=_FORGED)
        await refused(raw.certificates.SignCertificate(renewal, timeout=TIMEOUT))
    for line in world.log.lines:
        assert "forged\x1b" not in line
        assert "\nERROR control_plane: forged" not in line
