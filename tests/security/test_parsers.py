"""What strangers send is taken apart by parsers that refuse, and do nothing else."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Awaitable
from pathlib import Path
from random import Random

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st
from mesh.v1 import certificate_pb2

from control_plane import access
from control_plane.identity.csr import check_request
from control_plane.identity.errors import InvalidTokenError
from control_plane.identity.tokens import JoinToken, sign_token, verify_token
from mesh_client.core.errors import ConfigError, InvalidValueError
from mesh_client.core.join_token import read_claims
from mesh_client.identity.certificates import caller_of
from tests.security.mint import new_key, signing_request
from tests.security.world import DOMAIN, Log, SignRequest, open_world

KEY = new_key()
ASCII = st.characters(min_codepoint=0, max_codepoint=0x7F)
SPIFFE_IDS = st.builds(
    "".join,
    st.tuples(
        st.sampled_from(["spiffe://", "SPIFFE://", "spiffe:/", "https://", ""]),
        st.sampled_from([DOMAIN, f"{DOMAIN}.", DOMAIN.upper(), f"{DOMAIN}:443", f"x@{DOMAIN}", ""]),
        st.sampled_from(["/service/", "/operator/", "/mesh/", "/service//", "/service/../operator/", "/"]),
        st.sampled_from(["orders", "control-plane", "alice", "%6frders", "orders/", ""]) | st.text(ASCII, max_size=5),
        st.sampled_from(["", "\0", "\n", " ", "?", "#", "\0.example"]),
    ),
)
COMMON_NAMES = st.sampled_from(["0123456789abcdef", "0123456789ABCDEF", "0123456789abcdef\0", "orders"]) | st.text(
    min_size=1, max_size=20
)


def certificate(uris: list[str], common_names: list[str]) -> bytes:
    """PEM."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each) for each in common_names])
    now = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(KEY.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + dt.timedelta(days=1))
    if uris:
        names = [x509.UniformResourceIdentifier(each) for each in uris]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(KEY, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@given(st.lists(SPIFFE_IDS, max_size=2), st.lists(COMMON_NAMES, max_size=2))
def test_a_certificate_names_exactly_what_it_says_or_nobody(uris: list[str], common_names: list[str]) -> None:
    pem = certificate(uris, common_names)
    found = caller_of(pem)
    assert access._named(pem) == found  # both sides read it the same way
    if found is not None:
        assert uris == [found.spiffe_id]
        assert common_names == [found.workload_id]
        assert len(found.workload_id) == 16


@given(st.binary(max_size=300))
def test_what_is_no_certificate_names_nobody(content: bytes) -> None:
    for text in (content, b"-----BEGIN CERTIFICATE-----\n" + content + b"\n-----END CERTIFICATE-----\n"):
        assert caller_of(text) is None
        assert access._named(text) is None


# -- tokens, by both of those who read them

TOKEN_KEY = Ed25519PrivateKey.generate()
TOKEN = JoinToken("0123456789abcdef", "orders", 4_000_000_000, ("ab" * 32,), DOMAIN)
TEXT = sign_token(TOKEN, TOKEN_KEY)


CHANGES = st.tuples(st.integers(0, len(TEXT) - 1), st.sampled_from("mesh1.AaZz09-_=+/ \n\0"))


@given(st.lists(CHANGES, min_size=1, max_size=4))
def test_a_token_that_was_changed_is_no_token_to_the_control_plane_and_no_surprise_to_the_client(
    changes: list[tuple[int, str]],
) -> None:
    text = TEXT
    for position, character in changes:
        text = text[:position] + character + text[position + 1 :]
    if text == TEXT:
        return
    with pytest.raises(InvalidTokenError) as caught:
        verify_token(text, TOKEN_KEY.public_key(), DOMAIN, 0.0)
    said = [str(caught.value)]
    try:
        read_claims(text, "MESH_TOKEN")  # has no key to check it with, and may take it for one
    except ConfigError as error:
        said.append(str(error))
    assert not any(part in each for part in text.split(".") if len(part) > 15 for each in said)


def test_both_read_the_same_token_alike() -> None:
    claims = read_claims(TEXT, "MESH_TOKEN")
    assert (claims.id, claims.service, claims.expires) == (TOKEN.id, TOKEN.service, TOKEN.expires)
    assert (claims.roots, claims.trust_domain) == (frozenset(TOKEN.roots), TOKEN.trust_domain)


# -- requests for signing, by their structure

REQUEST = signing_request(
    KEY, x509.SubjectAlternativeName([x509.DNSName("a")]), x509.BasicConstraints(ca=True, path_length=None)
)


def nodes(der: bytes, begin: int = 0, end: int | None = None) -> list[tuple[int, int, int]]:
    """Begin, begin of the content, and end of every element of DER, the outer ones first."""
    found: list[tuple[int, int, int]] = []
    end = len(der) if end is None else end
    while begin < end:
        length, content = der[begin + 1], begin + 2
        if length & 0x80:
            content += length & 0x7F
            length = int.from_bytes(der[begin + 2 : content])
        found.append((begin, content, content + length))
        if der[begin] & 0x20:
            found += nodes(der, content, content + length)
        begin = content + length
    return found


NODES = nodes(REQUEST)


@given(
    st.sampled_from(NODES),
    st.sampled_from(["drop", "twice", "empty", "tag", "length", "other"]),
    st.integers(0, 255),
    st.sampled_from(NODES),
)
def test_a_request_whose_structure_was_changed_is_refused_or_still_signed_by_its_key(
    node: tuple[int, int, int], change: str, value: int, other: tuple[int, int, int]
) -> None:
    begin, content, end = node
    changed = {
        "drop": REQUEST[:begin] + REQUEST[end:],
        "twice": REQUEST[:end] + REQUEST[begin:],
        "empty": REQUEST[:content] + REQUEST[end:],
        "tag": REQUEST[:begin] + bytes([value]) + REQUEST[begin + 1 :],
        "length": REQUEST[: begin + 1] + bytes([value]) + REQUEST[begin + 2 :],
        "other": REQUEST[:begin] + REQUEST[other[0] : other[2]] + REQUEST[end:],
    }[change]
    try:
        key = check_request(changed)
    except InvalidValueError:
        return
    assert key == KEY.public_key()


# -- whatever comes to the enrolment port


async def test_nothing_that_is_sent_to_the_enrolment_port_is_more_than_refused(log: Log, tmp_path: Path) -> None:
    """Neither answered with an error of ours, which is INTERNAL or UNKNOWN, nor logged as one."""
    rng = Random(7)
    async with open_world(tmp_path, log, identity={"enrolments_per_second": 100_000.0}) as world:
        token = await world.token()
        good = SignRequest(certificate_signing_request=REQUEST, service="inventory", join_token=token)
        async with world.enrolment() as raw:
            for _ in range(30):
                codes = await asyncio.gather(*(_code(raw.echo(_mangled(good, rng), _SIGN)) for _ in range(10)))
                assert set(codes) <= {
                    grpc.StatusCode.INVALID_ARGUMENT,
                    grpc.StatusCode.UNAUTHENTICATED,
                    grpc.StatusCode.PERMISSION_DENIED,
                }
        assert (await world.authority.tokens())[0].uses_left == 1
    assert "Traceback" not in "\n".join(log.lines)


_SIGN = "/mesh.v1.CertificateService/SignCertificate"


def _mangled(request: certificate_pb2.SignCertificateRequest, rng: Random) -> bytes:
    content = bytearray(request.SerializeToString())
    for _ in range(rng.randint(1, 5)):
        position = rng.randrange(len(content))
        match rng.randrange(3):
            case 0:
                content[position] = rng.randrange(256)
            case 1:
                del content[position : position + rng.randint(1, 20)]
            case _:
                content[position:position] = rng.randbytes(rng.randint(1, 20))
    return bytes(content)


async def _code(attempt: Awaitable[object]) -> grpc.StatusCode:
    try:
        await attempt
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK
