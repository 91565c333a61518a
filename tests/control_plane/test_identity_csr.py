"""Requests for signing: whoever sends one has the key, and gets nothing else by it."""

from __future__ import annotations

import contextlib

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from control_plane.identity.csr import MAX_BYTES, check_request
from mesh_client.core.errors import InvalidValueError

KEY = ec.generate_private_key(ec.SECP256R1())


def request(
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey = KEY,
    digest: hashes.SHA256 | hashes.SHA384 | hashes.SHA224 | None = None,
    names: int = 0,
) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if names:
        builder = builder.add_extension(
            x509.SubjectAlternativeName([x509.DNSName(f"n{number}.example") for number in range(names)]), critical=False
        )
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else digest or hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.DER)


GOOD = request()


def test_a_good_request_gives_its_public_key() -> None:
    assert check_request(GOOD) == KEY.public_key()
    assert check_request(request(digest=hashes.SHA384())) == KEY.public_key()


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP256K1()),
        rsa.generate_private_key(65537, 2048),
        ed25519.Ed25519PrivateKey.generate(),
    ],
    ids=["P-384", "secp256k1", "RSA", "Ed25519"],
)
def test_other_keys_are_refused(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> None:
    with pytest.raises(InvalidValueError, match="an EC key on P-256"):
        check_request(request(key))


def test_a_signature_by_another_key_is_refused() -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    public = KEY.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    theirs = other.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    with pytest.raises(InvalidValueError, match="signature"):
        check_request(GOOD.replace(public, theirs))


def test_weak_digests_are_refused() -> None:
    with pytest.raises(InvalidValueError, match="signature"):
        check_request(request(digest=hashes.SHA224()))


def test_the_size_is_bounded() -> None:
    assert check_request(request(names=200)) == KEY.public_key()
    large = request(names=400)
    assert len(large) > MAX_BYTES
    with pytest.raises(InvalidValueError, match=f"{len(large)} bytes"):
        check_request(large)
    with pytest.raises(InvalidValueError):
        check_request(b"")


@given(st.binary(max_size=400))
def test_anything_else_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidValueError):
        check_request(content)


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_no_change_of_a_byte_makes_it_another_key_s(position: int, difference: int) -> None:
    changed = bytearray(GOOD)
    changed[position] ^= difference
    with contextlib.suppress(InvalidValueError):
        # How many bits of the signature's last byte count may be told in several ways.
        assert check_request(bytes(changed)) == KEY.public_key()


@given(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=8))
def test_nothing_can_be_cut_or_put_in(position: int, more: bytes) -> None:
    for changed in (GOOD[:position], GOOD[:position] + more + GOOD[position:], GOOD + more):
        with pytest.raises(InvalidValueError):
            check_request(changed)


def test_a_version_that_there_is_not_is_refused() -> None:
    # cryptography's InvalidVersion is no ValueError.
    position = GOOD.index(bytes([2, 1, 0])) + 2
    with pytest.raises(InvalidValueError, match="PKCS #10 as DER"):
        check_request(GOOD[:position] + b"\1" + GOOD[position + 1 :])


def test_what_the_request_asks_for_is_not_looked_at() -> None:
    builder = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "control-plane")]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier("spiffe://mesh.internal/operator/root")]),
            critical=True,
        )
    )
    content = builder.sign(KEY, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    assert check_request(content) == KEY.public_key()
