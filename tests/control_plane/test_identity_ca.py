"""What is in certificates, and what is taken for a certificate authority."""

from __future__ import annotations

import datetime as dt
import time
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from control_plane.identity import ca
from control_plane.identity.bundle import TrustBundle
from control_plane.identity.errors import IssuerNotValidError
from mesh_client.core.errors import ConfigError
from mesh_client.core.identity import Principal

NOW = float(int(time.time()))
DOMAIN = "mesh.internal"
ROOT_KEY, ISSUER_KEY, LEAF_KEY = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
ROOT = ca.make_root(DOMAIN, "one", ROOT_KEY, 1, NOW)
ISSUER = ca.make_issuer(DOMAIN, "one", ROOT, ROOT_KEY, ISSUER_KEY, 2, NOW)
ORDERS = Principal.service(DOMAIN, "orders")


def leaf(principal: Principal = ORDERS, *, now: float = NOW, ends: float = NOW + 3600) -> ca.Leaf:
    return ca.issue(ISSUER, principal, "0123456789abcdef", LEAF_KEY.public_key(), serial=255, now=now, ends=ends)


def extension(certificate: x509.Certificate, kind: type[x509.ExtensionType]) -> Any:
    return certificate.extensions.get_extension_for_class(kind).value


def own_root(name: str = "given", key: ec.EllipticCurvePrivateKey = ROOT_KEY, *, sign: bool = True) -> x509.Certificate:
    """A certificate that signs itself."""
    return below(name, name, key, key.public_key(), sign=sign)


def below(
    name: str, issuer: str, key: ec.EllipticCurvePrivateKey, public: Any, *, sign: bool = True, bare: bool = False
) -> x509.Certificate:
    subject, by = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in (name, issuer))
    start = dt.datetime.fromtimestamp(NOW - 60, dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + dt.timedelta(days=1))
    )
    if not bare:
        usage = [False] * 5 + [sign, sign, False, False]
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        builder = builder.add_extension(x509.KeyUsage(*usage), critical=True)
    return builder.sign(key, hashes.SHA256())


def test_a_leaf_says_who_it_is_for_and_no_more() -> None:
    made = leaf()
    certificate = made.certificate
    names = extension(certificate, x509.SubjectAlternativeName)
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://mesh.internal/service/orders"]
    assert names.get_values_for_type(x509.DNSName) == [
        "orders.mesh.internal",
        f"{made.workload_id}.workload.mesh.internal",
    ]
    assert len(list(names)) == 3
    assert certificate.subject.rfc4514_string() == "CN=0123456789abcdef"
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert not constraints.value.ca
    usage = extension(certificate, x509.KeyUsage)
    assert usage.digital_signature
    assert not usage.key_cert_sign
    assert list(extension(certificate, x509.ExtendedKeyUsage)) == [
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.CLIENT_AUTH,
    ]
    assert ca.begins(certificate) == NOW - 60
    assert (made.expires, made.serial, made.root) == (NOW + 3600, "ff", ca.fingerprint(ROOT))
    assert len(certificate.extensions) == 6
    certificate.verify_directly_issued_by(ISSUER.certificate)


def test_an_operator_is_no_server() -> None:
    certificate = leaf(Principal.operator(DOMAIN, "alice")).certificate
    names = extension(certificate, x509.SubjectAlternativeName)
    assert [each.value for each in names] == ["spiffe://mesh.internal/operator/alice"]
    assert list(extension(certificate, x509.ExtendedKeyUsage)) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_a_leaf_ends_with_its_issuer_at_the_latest() -> None:
    assert leaf(ends=NOW + 10 * ca.ISSUER_LIFETIME).expires == ISSUER.expires == NOW + ca.ISSUER_LIFETIME


def test_nothing_is_signed_before_or_after_the_issuer_s_time() -> None:
    for now in (NOW - 2 * ca.AUTHORITY_SKEW, NOW + ca.ISSUER_LIFETIME):
        with pytest.raises(IssuerNotValidError, match="issuing certificate"):
            leaf(now=now)
    with pytest.raises(IssuerNotValidError, match="root"):
        ca.make_issuer(DOMAIN, "late", ROOT, ROOT_KEY, ISSUER_KEY, 2, NOW + ca.ROOT_LIFETIME)


def test_an_issuer_never_outlives_its_root() -> None:
    late = ca.make_issuer(DOMAIN, "late", ROOT, ROOT_KEY, ISSUER_KEY, 2, NOW + ca.ROOT_LIFETIME - 60)
    assert ca.expires(late.certificate) == ca.expires(ROOT)


def test_roots_and_issuers_sign_for_one_trust_domain_and_one_level() -> None:
    constraints = extension(ROOT, x509.NameConstraints)
    assert [each.value for each in constraints.permitted_subtrees] == [DOMAIN, DOMAIN]
    assert extension(ROOT, x509.BasicConstraints).path_length == 1
    assert extension(ISSUER.certificate, x509.BasicConstraints).path_length == 0


def test_a_chain_leaves_the_root_out_unless_asked_for() -> None:
    made = leaf()
    assert made.chain() == (ca.der(made.certificate), ca.der(ISSUER.certificate))
    assert made.chain_pem() == ca.pem([made.certificate, ISSUER.certificate])
    assert made.chain_pem(with_root=True) == ca.pem([made.certificate, ISSUER.certificate, ROOT])


def test_an_issuer_that_was_given_is_taken_with_everything_up_to_its_root() -> None:
    top = own_root("top")
    middle_key, low_key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    middle = below("middle", "top", ROOT_KEY, middle_key.public_key())
    low = below("low", "middle", middle_key, low_key.public_key())
    issuer = ca.check_issuer([low, top, middle], low_key, [ROOT, top])
    assert issuer.chain == (low, middle)
    assert issuer.root == top
    assert ca.root_of([low, middle], [ROOT, top]) == ca.fingerprint(top)
    assert ca.root_of([low], [top]) == ""
    # Only who signed the leaf counts, not who else was shown.
    assert ca.root_of([leaf().certificate, middle, low], [top]) == ""
    with pytest.raises(ConfigError, match="leads up to none of the roots: who signed CN=low"):
        ca.check_issuer([low], low_key, [top])


def test_a_chain_that_goes_round_comes_to_an_end() -> None:
    one_key, two_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    one, two = below("one", "two", two_key, one_key.public_key()), below("two", "one", one_key, two_key.public_key())
    with pytest.raises(ConfigError, match="none of the roots"):
        ca.check_issuer([one, two, one], one_key, [ROOT])


def test_what_is_no_intermediate_is_refused() -> None:
    with pytest.raises(ConfigError, match="is a root"):
        ca.check_issuer([ROOT], ROOT_KEY, [ROOT])
    with pytest.raises(ConfigError, match="is not the key"):
        ca.check_issuer([ISSUER.certificate], LEAF_KEY, [ROOT])
    with pytest.raises(ConfigError, match="must not sign others"):
        ca.check_issuer([leaf().certificate], LEAF_KEY, [ISSUER.certificate])
    bare = below("bare", "given", ROOT_KEY, LEAF_KEY.public_key(), bare=True)
    with pytest.raises(ConfigError, match="must not sign others: CN=bare"):
        ca.check_issuer([bare], LEAF_KEY, [own_root()])


def test_roots_have_to_be_roots_of_now() -> None:
    assert ca.check_roots([ROOT, ROOT], NOW) == (ROOT,)
    with pytest.raises(ConfigError, match="no root among"):
        ca.check_roots([], NOW)
    for bad in (ISSUER.certificate, own_root(sign=False)):
        with pytest.raises(ConfigError, match="is no root"):
            ca.check_roots([bad], NOW)
    with pytest.raises(ConfigError, match="has ended"):
        ca.check_roots([ROOT], NOW + ca.ROOT_LIFETIME)


def test_a_certificate_without_a_subject_is_named_by_its_serial() -> None:
    start = dt.datetime.fromtimestamp(NOW, dt.UTC)
    nameless = (
        x509.CertificateBuilder(x509.Name([]), x509.Name([]), ROOT_KEY.public_key(), 171)
        .not_valid_before(start)
        .not_valid_after(start)
        .sign(ROOT_KEY, hashes.SHA256())
    )
    with pytest.raises(ConfigError, match="serial ab"):
        ca.check_roots([nameless], NOW)


def test_certificates_and_keys_are_read_or_refused_in_words() -> None:
    assert ca.load_certificates(ca.pem([ROOT, ISSUER.certificate]), "roots.pem") == [ROOT, ISSUER.certificate]
    loaded = ca.load_key(ca.key_pem(ROOT_KEY), "ca.key")
    assert loaded.public_key() == ROOT_KEY.public_key()
    for content in (b"", b"nonsense", ca.pem([ROOT])[:-60], ca.key_pem(ROOT_KEY)):
        with pytest.raises(ConfigError, match="roots.pem"):
            ca.load_certificates(content, "roots.pem")
    other = rsa.generate_private_key(65537, 2048)
    rsa_pem = other.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    locked = ROOT_KEY.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )
    for content in (b"", b"nonsense", rsa_pem, locked, ca.key_pem(ec.generate_private_key(ec.SECP256K1()))):
        with pytest.raises(ConfigError, match="ca.key") as caught:
            ca.load_key(content, "ca.key")
        assert "PRIVATE" not in str(caught.value)


def test_keys_are_not_shown() -> None:
    assert "key=" not in repr(ISSUER)


def test_a_bundle_s_version_is_a_hash_of_everything_in_it() -> None:
    made = [
        TrustBundle.of(DOMAIN, [b"1", b"2"], "a"),
        TrustBundle.of(DOMAIN, [b"1"], "a"),
        TrustBundle.of(DOMAIN, [b"1", b"2"], "b"),
        TrustBundle.of("other", [b"1", b"2"], "a"),
        TrustBundle.of(DOMAIN, [b"1", b"2"], "a", ["w"]),
    ]
    assert len({each.version for each in made}) == len(made)
    assert TrustBundle.of(DOMAIN, [b"1"], "a", ["w", "v"]) == TrustBundle.of(DOMAIN, [b"1"], "a", ["v", "w"])
    assert made[1].fingerprints == ("6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b",)
