"""Attacks on joining and renewing: tokens, requests for signing, floods, and callers who take their time."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest
from aiohttp import test_utils, web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, hmac, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from mesh.v1 import certificate_pb2, discovery_pb2, resource_pb2

from control_plane.identity import ca
from mesh_client.core.identity import Principal
from tests.control_plane.scripted_consul import scripted_consul
from tests.security.mint import BOTH, new_key, self_signed, signing_request
from tests.security.world import DOMAIN, TIMEOUT, Log, SignRequest, World, open_world, refused, status, until

REFUSED = "the attestation is not accepted; the control plane's log says why"


def asking(token: str, service: str = "orders", request: bytes | None = None) -> SignRequest:
    """A request for a first certificate."""
    csr = signing_request(new_key()) if request is None else request
    return SignRequest(certificate_signing_request=csr, service=service, join_token=token)


async def refusal(world: World, request: SignRequest) -> grpc.aio.AioRpcError:
    """How the enrolment port refuses a request."""
    async with world.enrolment() as raw:
        return await refused(raw.certificates.SignCertificate(request, timeout=TIMEOUT))


async def joined(world: World, request: SignRequest) -> certificate_pb2.SignCertificateResponse:
    """What the enrolment port answers to a good request."""
    async with world.enrolment() as raw:
        return await raw.certificates.SignCertificate(request, timeout=TIMEOUT)


# -- tokens


def _encoded(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def _payload(token: str) -> dict[str, object]:
    payload = token.split(".")[1]
    decoded: dict[str, object] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return decoded


def _restated(token: str, **changes: object) -> str:
    """Other claims under the old signature."""
    head, _, signature = token.split(".")
    return f"{head}.{_encoded(json.dumps({**_payload(token), **changes}, separators=(',', ':')).encode())}.{signature}"


def _resigned(token: str, sign: Callable[[bytes], bytes]) -> str:
    signed = token.rpartition(".")[0]
    return f"{signed}.{_encoded(sign(signed.encode()))}"


def _by_hmac(key: bytes) -> Callable[[bytes], bytes]:
    def sign(content: bytes) -> bytes:
        code = hmac.HMAC(key, hashes.SHA256())
        code.update(content)
        return code.finalize()

    return sign


def _changed(text: str, position: int) -> str:
    return text[:position] + ("A" if text[position] != "A" else "B") + text[position + 1 :]


def forgeries(token: str, public: bytes) -> dict[str, str]:
    """What can be made of a token without its key. ``public`` is the key that checks it."""
    head, payload, signature = token.split(".")
    other = ed25519.Ed25519PrivateKey.generate()
    made = {
        "another header": f"mesh2.{payload}.{signature}",
        "a header in capitals": f"MESH1.{payload}.{signature}",
        "no header": f"{payload}.{signature}",
        "a JWT's header without algorithm": f"{_encoded(b'{}')}.{payload}.{signature}",
        "no signature": f"{head}.{payload}.",
        "no signature nor dot": f"{head}.{payload}",
        "an empty signature of zeros": f"{head}.{payload}.{_encoded(bytes(64))}",
        "a signature that is short": f"{head}.{payload}.{_encoded(base64.urlsafe_b64decode(signature + '==')[:63])}",
        "two signatures": f"{token}.{signature}",
        "padding": f"{token}==",
        "a newline": f"{token}\n",
        "a space": f" {token}",
        "the other base64": token.replace("-", "+").replace("_", "/") + ("" if "-" in token or "_" in token else "+"),
        "another service": _restated(token, service="payments"),
        "more time": _restated(token, expires=2**52),
        "another id": _restated(token, id="0" * 16),
        "another root": _restated(token, roots=["ab" * 32]),
        "another field": _restated(token, uses=1000),
        "a key of somebody else": _resigned(token, other.sign),
        "a MAC by the public key": _resigned(token, _by_hmac(public)),
        "a MAC by nothing": _resigned(token, _by_hmac(b"\0")),
        "the payload twice": f"{head}.{payload}.{payload}",
        "nothing": "",
        "a lot": "mesh1." + "A" * 5000,
        "a null byte": f"{token}\0",
        "letters beyond ASCII": token.replace("m", "\u217f", 1),
    }
    parts = {"header": 0, "payload": len(head) + 1, "signature": len(head) + len(payload) + 2}
    ends = {"header": len(head), "payload": parts["signature"] - 1, "signature": len(token)}
    for part, begin in parts.items():
        positions = {begin, (begin + ends[part]) // 2, ends[part] - 1}
        made.update({f"{part}, character {each - begin}": _changed(token, each) for each in sorted(positions)})
    return made


async def test_a_token_that_was_tampered_with_is_worthless(world: World) -> None:
    created = await world.created()
    key = world.authority.issuance._public_key
    public = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    async with world.enrolment() as raw:
        for name, forged in forgeries(created.text, public).items():
            world.log.lines.clear()
            service = "payments" if name == "another service" else "orders"
            attempt = raw.certificates.SignCertificate(asking(forged, service), timeout=TIMEOUT)
            error = await refused(attempt, name)
            # Whatever is wrong, the answer is the same: whoever guesses learns nothing.
            assert (error.code(), error.details()) == (grpc.StatusCode.UNAUTHENTICATED, REFUSED), name
            assert "no certificate for ipv4:127.0.0.1" in world.log.control_plane, name
            world.log.check()
        # None of them spent its use.
        await raw.certificates.SignCertificate(asking(created.text), timeout=TIMEOUT)


async def test_a_token_of_another_mesh_is_worthless(log: Log, tmp_path: Path, world: World) -> None:
    (tmp_path / "other").mkdir()
    async with open_world(tmp_path / "other", log) as other:
        assert (await refusal(world, asking(await other.token()))).details() == REFUSED
    assert "this control plane did not sign it" in world.log.control_plane


async def test_a_token_is_spent_once_however_many_use_it_at_once(world: World) -> None:
    token = await world.token()
    async with AsyncExitStack() as stack:
        raws = [await stack.enter_async_context(world.enrolment()) for _ in range(20)]
        attempts = (raw.certificates.SignCertificate(asking(token), timeout=TIMEOUT) for raw in raws)
        answers = await asyncio.gather(*map(_outcome, attempts))
    errors = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert len(answers) - len(errors) == 1
    assert {(error.code(), error.details()) for error in errors} == {(grpc.StatusCode.UNAUTHENTICATED, REFUSED)}
    assert world.log.control_plane.count("is unknown, revoked, ended or spent") == 19
    # Nor later.
    assert (await refusal(world, asking(token))).code() is grpc.StatusCode.UNAUTHENTICATED


async def _outcome(attempt: Awaitable[object]) -> object:
    try:
        return await attempt
    except grpc.aio.AioRpcError as error:
        return error


async def test_a_recorded_request_gives_the_recorder_nothing(world: World) -> None:
    """The same bytes again give a certificate for the same key, which whoever replays them has not."""
    key, token = new_key(), await world.token()
    request = asking(token, request=signing_request(key))
    first = world.credential(key, await joined(world, request))
    again = world.credential(key, await joined(world, request))
    assert first.workload_id == again.workload_id
    assert again.leaf.public_key() == key.public_key()
    # Another key is another workload, and there is no use left for it.
    assert (await refusal(world, asking(token))).code() is grpc.StatusCode.UNAUTHENTICATED
    # Nor is there a way back for a revoked one.
    await world.revoke(first.workload_id)
    error = await refusal(world, request)
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert f"workload {first.workload_id} has been revoked" in world.log.control_plane


async def test_tokens_that_ended_or_were_revoked_are_worthless(world: World) -> None:
    revoked, ended = await world.created(), await world.created(ttl=60.0)
    assert await world.authority.revoke_token(revoked.details.id)
    assert (await refusal(world, asking(revoked.text))).details() == REFUSED
    assert f"token {revoked.details.id} is unknown, revoked" in world.log.control_plane
    world.authority.issuance._clock = lambda: ended.details.expires
    assert (await refusal(world, asking(ended.text))).details() == REFUSED
    assert f"token {ended.details.id} has ended" in world.log.control_plane


@pytest.mark.parametrize(
    "service",
    ["orders", "inventory2", "inventory.orders", "Inventory", "", "inventory\0", "*", "control-plane", "../x"],
)
async def test_a_token_for_inventory_never_becomes_somebody_else(world: World, service: str) -> None:
    created = await world.created("inventory")
    error = await refusal(world, asking(created.text, service))
    assert error.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT)
    assert "no certificate for ipv4:127.0.0.1" in world.log.control_plane
    # And whatever is asked for beside, it is inventory.
    greedy = _greedy(new_key())
    answer = await joined(world, asking(created.text, "inventory", greedy))
    _is_just(answer, Principal.service(DOMAIN, "inventory"))


@pytest.mark.parametrize("service", ["control-plane", "operator", "mesh", "root", "localhost", "workload"])
async def test_services_with_great_names_are_services(world: World, service: str) -> None:
    credential = await world.join(service)
    assert credential.leaf.extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    ).value == x509.SubjectAlternativeName(
        [
            x509.UniformResourceIdentifier(f"spiffe://{DOMAIN}/service/{service}"),
            x509.DNSName(f"{service}.{DOMAIN}"),
            x509.DNSName(f"{credential.leaf.subject.rfc4514_string().removeprefix('CN=')}.workload.{DOMAIN}"),
        ]
    )
    async with world.mesh(credential) as raw:
        error = await refused(status(raw))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        watch = raw.discovery.DeltaResources(timeout=TIMEOUT)
        await watch.write(watching("orders"))
        assert (await refused(watch.read())).code() is grpc.StatusCode.PERMISSION_DENIED


def watching(service: str) -> discovery_pb2.DeltaResourcesRequest:
    """The first request of a client of a service."""
    return discovery_pb2.DeltaResourcesRequest(
        node=discovery_pb2.Node(id="x", service=service),
        type=resource_pb2.RESOURCE_TYPE_SERVICE_ENDPOINTS,
    )


# -- requests for signing


def _greedy(key: ec.EllipticCurvePrivateKey) -> bytes:
    return signing_request(
        key,
        x509.BasicConstraints(ca=True, path_length=5),
        x509.KeyUsage(True, True, True, True, True, True, True, False, False),
        x509.ExtendedKeyUsage([*BOTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]),
        x509.SubjectAlternativeName(
            [
                x509.UniformResourceIdentifier(f"spiffe://{DOMAIN}/operator/root"),
                x509.UniformResourceIdentifier(f"spiffe://{DOMAIN}/mesh/control-plane"),
                x509.UniformResourceIdentifier(f"spiffe://{DOMAIN}/service/orders\0"),
                x509.DNSName(f"control-plane.mesh.{DOMAIN}"),
                x509.DNSName(f"orders.{DOMAIN}\0.evil.example"),
                x509.DNSName("*"),
            ]
        ),
        subject=x509.Name(
            [
                x509.NameAttribute(NameOID.COMMON_NAME, f"orders.{DOMAIN}"),
                x509.NameAttribute(NameOID.COMMON_NAME, "0" * 16),
            ]
        ),
    )


def _is_just(answer: certificate_pb2.SignCertificateResponse, principal: Principal) -> None:
    leaf = x509.load_der_x509_certificate(answer.certificate_chain[0])
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    (common_name,) = leaf.subject
    workload = principal.workload_name(str(common_name.value))
    assert [name.value for name in names] == [principal.spiffe_id, principal.dns_name, workload]
    assert len(str(common_name.value)) == 16
    assert "." not in str(common_name.value)
    assert common_name.value != "0" * 16
    assert leaf.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(False, None)
    assert not leaf.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    assert leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value == x509.ExtendedKeyUsage(BOTH)


async def test_a_certificate_with_powers_that_were_asked_for_has_none(world: World) -> None:
    """Also in practice: what it signs is nobody's."""
    key = new_key()
    credential = world.credential(key, await joined(world, asking(await world.token(), request=_greedy(key))))
    forged = world.mint.sign(Principal.operator(DOMAIN, "root"), issuer=credential)
    async with world.mesh(forged) as raw:
        error = await refused(status(raw))
    assert error.code() is grpc.StatusCode.UNAVAILABLE


def bad_requests() -> dict[str, bytes]:
    """Requests for signing that are not a good one."""
    good, other = signing_request(new_key()), new_key()
    public = other.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    at = good.index(b"\x03\x42\x00\x04") + 3

    def by(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
        algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
        made = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, algorithm)
        return made.public_bytes(serialization.Encoding.DER)

    return {
        "nothing": b"",
        "PEM": b"-----BEGIN CERTIFICATE REQUEST-----\n"
        + base64.b64encode(good)
        + b"\n-----END CERTIFICATE REQUEST-----",
        "RSA of 1024 bits": by(rsa.generate_private_key(65537, 1024)),
        "RSA of 2048 bits": by(rsa.generate_private_key(65537, 2048)),
        "a weak curve": by(ec.generate_private_key(ec.SECP192R1())),
        "another curve": by(ec.generate_private_key(ec.SECP384R1())),
        "Ed25519": by(ed25519.Ed25519PrivateKey.generate()),
        "somebody else's public key": good[:at] + public + good[at + len(public) :],
        "a point that is on no curve": good[:at] + b"\x04" + b"\x01" * 64 + good[at + 65 :],
        "a signature of zeros": good[:-8] + bytes(8),
        "cut": good[:-1],
        "more at its end": good + b"\0",
        "a certificate": ca.der(self_signed(Principal.service(DOMAIN, "orders")).leaf),
        "huge": signing_request(new_key(), x509.SubjectAlternativeName([x509.DNSName("a" * 63)] * 100)),
        "a length that overflows": b"\x30\x84\xff\xff\xff\xff" + good[4:],
        "deep nesting": b"\x30\x80" * 2000,
    }


async def test_bad_requests_for_signing_are_refused_and_spend_nothing(world: World) -> None:
    token = await world.token()
    async with world.enrolment() as raw:
        for name, request in bad_requests().items():
            world.log.lines.clear()
            attempt = raw.certificates.SignCertificate(asking(token, request=request), timeout=TIMEOUT)
            error = await refused(attempt, name)
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, name
            assert "certificate_signing_request: " in (error.details() or ""), name
            assert "certificate_signing_request: " in world.log.control_plane, name
        await raw.certificates.SignCertificate(asking(token), timeout=TIMEOUT)


# -- the wrong port


async def test_the_enrolment_port_enrols_and_does_nothing_else(world: World) -> None:
    async with world.enrolment() as raw:
        # It says nothing: a refusal that crosses a message may arrive as INTERNAL (grpc.aio).
        watch = raw.discovery.DeltaResources(timeout=TIMEOUT)
        assert (await refused(watch.read())).code() is grpc.StatusCode.UNIMPLEMENTED
        assert (await refused(status(raw))).code() is grpc.StatusCode.UNIMPLEMENTED
        renewal = SignRequest(certificate_signing_request=signing_request(new_key()), service="orders")
        sign = "mesh.v1.CertificateService/SignCertificate"
        for method, request, code in (
            ("grpc.health.v1.Health/Check", b"", grpc.StatusCode.UNIMPLEMENTED),
            ("mesh.v1.AuthorityService/CreateJoinToken", b"", grpc.StatusCode.UNIMPLEMENTED),
            ("mesh.v1.RegistryService/Drain", b"", grpc.StatusCode.UNIMPLEMENTED),
            (
                "mesh.v1.CertificateService/SignCertificate",
                renewal.SerializeToString(),
                grpc.StatusCode.UNAUTHENTICATED,
            ),
            (sign, b"\xff" * 100, grpc.StatusCode.INVALID_ARGUMENT),
            (sign, bytes(70_000), grpc.StatusCode.RESOURCE_EXHAUSTED),
        ):
            assert (await refused(raw.echo(request, f"/{method}"), method)).code() is code
        bundle = raw.certificates.WatchTrustBundle(timeout=TIMEOUT)
        assert (await refused(bundle.read())).code() is grpc.StatusCode.PERMISSION_DENIED
    assert "there is no attestation" in world.log.control_plane


async def test_a_certificate_does_not_renew_on_the_enrolment_port(world: World) -> None:
    """Nobody is asked for one there, so nobody has shown one."""
    credential = await world.join()
    request = SignRequest(certificate_signing_request=signing_request(new_key()), service="orders")
    async with world.enrolment(credential.for_channel()) as raw:
        error = await refused(raw.certificates.SignCertificate(request, timeout=TIMEOUT))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_token_is_of_no_use_on_the_mesh_port(world: World) -> None:
    """Inventory cannot become orders by a token that it found, nor spend it, nor be taken for orders otherwise."""
    credential, token = await world.join("inventory"), await world.token("orders")
    csr = signing_request(new_key())
    async with world.mesh(credential) as raw:
        error = await refused(raw.certificates.SignCertificate(asking(token, "orders"), timeout=TIMEOUT))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "nothing on the mesh port: the certificate attests" in (error.details() or "")
        request = SignRequest(certificate_signing_request=csr, service="orders")
        error = await refused(raw.certificates.SignCertificate(request, timeout=TIMEOUT))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        greedy = SignRequest(certificate_signing_request=_greedy(new_key()), service="inventory")
        _is_just(
            await raw.certificates.SignCertificate(greedy, timeout=TIMEOUT), Principal.service(DOMAIN, "inventory")
        )
    assert "asked for a certificate of another service" in world.log.control_plane
    await joined(world, asking(token))


# -- floods and callers who take their time


@asynccontextmanager
async def from_another_address(target: str) -> AsyncIterator[str]:
    """A way to the target by which connections come from 127.0.0.2."""
    host, _, port = target.rpartition(":")
    talks: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while part := await reader.read(65536):
            writer.write(part)

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talks.add(task)
        there, back = await asyncio.open_connection(host, int(port), local_addr=("127.0.0.2", 0))
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(pump(reader, back))
                both.create_task(pump(there, writer))
        except* ConnectionError:
            pass
        finally:
            writer.transport.abort()
            back.transport.abort()

    server = await asyncio.start_server(pass_on, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in talks:
            task.cancel()
        await asyncio.gather(*talks, return_exceptions=True)


def _pushback(error: grpc.aio.AioRpcError) -> int:
    return int(str(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]))


async def test_a_flood_from_one_address_is_sent_away_and_shuts_nobody_else_out(log: Log, tmp_path: Path) -> None:
    async with open_world(tmp_path, log, identity={"enrolments_per_second": 0.1}) as world:
        nonsense = asking("mesh1.nonsense.nonsense")
        async with AsyncExitStack() as stack:
            raws = [await stack.enter_async_context(world.enrolment()) for _ in range(6)]
            errors = await asyncio.gather(
                *(
                    refused(raw.certificates.SignCertificate(nonsense, timeout=TIMEOUT))
                    for raw in raws
                    for _ in range(10)
                )
            )
        late = [error for error in errors if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED]
        assert 30 <= len(late) < len(errors)
        assert all(0 < _pushback(error) <= 10_000 for error in late)
        assert log.control_plane.count("no certificate for") == len(errors) - len(late)  # the flood is not in the log
        assert (await refusal(world, asking(await world.token()))).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        async with from_another_address(world.plane.enrolment_address) as address:
            async with world.enrolment(address=address) as raw:
                await raw.certificates.SignCertificate(asking(await world.token()), timeout=TIMEOUT)


async def test_requests_that_are_begun_and_never_sent_shut_nobody_else_out(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("control_plane.identity.certificates.MAX_AT_ONCE", 4)
    monkeypatch.setattr("control_plane.ports._STRANGERS_AT_ONCE", 8)
    async with open_world(tmp_path, log) as world, world.enrolment() as raw, AsyncExitStack() as stack:
        method: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = raw.channel.stream_unary(
            "/mesh.v1.CertificateService/SignCertificate"
        )
        begun = [method(timeout=TIMEOUT) for _ in range(12)]
        for call in begun:
            stack.callback(call.cancel)
        codes = [asyncio.ensure_future(each.code()) for each in begun]
        await until(lambda: sum(each.done() for each in codes) == 8)
        assert [each.result() for each in codes if each.done()] == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 8
        async with from_another_address(world.plane.enrolment_address) as address:
            async with world.enrolment(address=address) as other:
                await other.certificates.SignCertificate(asking(await world.token()), timeout=TIMEOUT)
        for call in begun:
            call.cancel()
        await asyncio.gather(*codes)


async def test_a_request_that_does_not_come_is_not_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control_plane.identity.certificates.SEND_TIMEOUT", 0.01)
    async with world.enrolment() as raw:
        method: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = raw.channel.stream_unary(
            "/mesh.v1.CertificateService/SignCertificate"
        )
        call = method(timeout=TIMEOUT)
        assert (await refused(call)).details() == "the request did not come within 0.01 s"
        monkeypatch.undo()
        call = method(timeout=TIMEOUT)
        await call.done_writing()
        assert (await refused(call)).details() == "there is no request"


async def test_handshakes_that_are_begun_and_never_ended_stop_nobody_else(world: World) -> None:
    """Some say nothing, some half a record, some the beginning of something else."""
    greetings = (b"", b"\x16\x03\x01\x02\x00\x01\x00", b"PRI * HTTP/2.0\r\n", b"\x80")
    credential = await world.join()
    async with AsyncExitStack() as stack:
        for port in (world.plane.port, world.plane.enrolment_port):
            for number in range(200):
                slow = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                slow.sendall(greetings[number % len(greetings)])
        await joined(world, asking(await world.token()))
        async with world.mesh(credential) as raw:
            request = SignRequest(certificate_signing_request=signing_request(new_key()))
            await raw.certificates.SignCertificate(request, timeout=TIMEOUT)


# -- Consul's tokens


async def test_a_consul_token_of_inventory_never_becomes_orders(log: Log, tmp_path: Path) -> None:
    secret, other = str(uuid.uuid4()), str(uuid.uuid4())
    log.keep_out(secret)
    log.keep_out(other)
    accessor = str(uuid.uuid4())
    async with scripted_consul() as consul:
        identity = [{"ServiceName": "inventory"}]
        described = {"AccessorID": accessor, "SecretID": secret, "ServiceIdentities": identity}
        consul.answer("/v1/acl/token/self", described)
        async with open_world(tmp_path, log, registry=f"consul://{consul.address}") as world:
            attempts = {
                "orders": (secret, grpc.StatusCode.PERMISSION_DENIED),
                "inventor": (secret, grpc.StatusCode.PERMISSION_DENIED),
                "inventory": (other, grpc.StatusCode.UNAUTHENTICATED),
                "payments": (f"{secret}\r\nX-Consul-Token: {other}", grpc.StatusCode.UNAUTHENTICATED),
            }
            for service, (token, code) in attempts.items():
                request = SignRequest(
                    certificate_signing_request=signing_request(new_key()), service=service, consul_token=token
                )
                assert (await refusal(world, request)).code() is code
            request = SignRequest(
                certificate_signing_request=_greedy(new_key()), service="inventory", consul_token=secret
            )
            _is_just(await joined(world, request), Principal.service(DOMAIN, "inventory"))
    assert f"the Consul token {accessor} is of another service" in log.control_plane
    assert "Consul described another token" in log.control_plane
    assert "it is no Consul token" in log.control_plane
    assert f"attested_by='consul token {accessor}'" in log.control_plane


async def test_a_flood_of_consul_tokens_that_nobody_knows_shuts_nobody_else_out(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Consul is asked again about tokens that it does not know, for followers learn of fresh ones late."""
    monkeypatch.setattr("control_plane.identity.attestation.RETRY_DELAY", 0.01)
    good = str(uuid.uuid4())
    described = {"AccessorID": str(uuid.uuid4()), "SecretID": good, "ServiceIdentities": [{"ServiceName": "orders"}]}

    async def about_itself(request: web.BaseRequest) -> web.StreamResponse:
        if request.path != "/v1/acl/token/self" or request.headers.get("X-Consul-Token") != good:
            return web.Response(status=403)
        return web.json_response(described)

    def asking_by(token: str) -> SignRequest:
        csr = signing_request(new_key())
        return SignRequest(certificate_signing_request=csr, service="orders", consul_token=token)

    async with test_utils.RawTestServer(about_itself, host="127.0.0.1") as consul:
        registry = f"consul://127.0.0.1:{consul.port}"
        async with open_world(tmp_path, log, registry=registry) as world, AsyncExitStack() as stack:
            raws = [await stack.enter_async_context(world.enrolment()) for _ in range(15)]
            bogus = [str(uuid.uuid4()) for _ in range(150)]
            for token in bogus:
                log.keep_out(token)
            flood = asyncio.gather(
                *(
                    refused(raw.certificates.SignCertificate(asking_by(token), timeout=TIMEOUT))
                    for raw, token in zip(raws * 10, bogus, strict=True)
                )
            )
            async with from_another_address(world.plane.enrolment_address) as address:
                async with world.enrolment(address=address) as other:
                    await other.certificates.SignCertificate(asking_by(good), timeout=TIMEOUT)
            codes = {error.code() for error in await flood}
            assert grpc.StatusCode.UNAUTHENTICATED in codes
            assert codes <= {
                grpc.StatusCode.UNAUTHENTICATED,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                grpc.StatusCode.UNAVAILABLE,  # too many tokens of one address are asked about already
            }
    log.keep_out(good)
    assert "Consul does not know the token" in log.control_plane
