"""Makes and checks certificates. Keys, serial numbers and the time are handed in; nothing is kept.

Certificates are X.509-SVIDs: https://github.com/spiffe/spiffe/blob/main/standards/X509-SVID.md.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from control_plane.identity.errors import IssuerNotValidError
from mesh_client.core.errors import ConfigError
from mesh_client.core.identity import Kind, Principal

ROOT_LIFETIME = 10 * 365 * 86_400.0
"""Seconds."""
ISSUER_LIFETIME = 365 * 86_400.0
"""Seconds; never past its root's end."""
LEAF_SKEW = 60.0
"""Seconds before now at which a leaf begins: clocks of the mesh may be behind by this much."""
AUTHORITY_SKEW = 3600.0
"""The same for roots and issuers."""


@dataclass(frozen=True, slots=True)
class Issuer:
    """What signs leaves.

    Attributes:
        certificate: an intermediate.
        key: its key.
        above: certificates between it and the root, nearest first; mostly none.
        root: where it leads up to.
    """

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    above: tuple[x509.Certificate, ...]
    root: x509.Certificate

    @property
    def chain(self) -> tuple[x509.Certificate, ...]:
        """What a leaf is sent with: everything between it and the root."""
        return (self.certificate, *self.above)

    @property
    def expires(self) -> float:
        """When the first certificate of the chain or the root ends."""
        return min(expires(each) for each in (*self.chain, self.root))


@dataclass(frozen=True, slots=True)
class Leaf:
    """A signed leaf.

    Attributes:
        certificate: the leaf itself.
        issuer: what signed it.
        principal: whom it names.
        workload_id: which workload of theirs.
    """

    certificate: x509.Certificate
    issuer: Issuer = field(repr=False)
    principal: Principal
    workload_id: str

    @property
    def serial(self) -> str:
        """Serial number, lower-case hex."""
        return f"{self.certificate.serial_number:x}"

    @property
    def expires(self) -> float:
        """When it ends."""
        return expires(self.certificate)

    @property
    def root(self) -> str:
        """Fingerprint of the root that it leads up to."""
        return fingerprint(self.issuer.root)

    def chain(self) -> tuple[bytes, ...]:
        """DER, the leaf first, without the root."""
        return tuple(map(der, (self.certificate, *self.issuer.chain)))

    def chain_pem(self, *, with_root: bool = False) -> bytes:
        """The same as PEM, with the root at the end if asked for."""
        return pem((self.certificate, *self.issuer.chain, *([self.issuer.root] if with_root else [])))


def make_root(
    trust_domain: str, label: str, key: ec.EllipticCurvePrivateKey, serial: int, now: float
) -> x509.Certificate:
    """A root for one trust domain. ``label`` sets it apart from others of the domain, and it signs for no other one."""
    name = _name(f"mesh root {label}")
    ends = now + ROOT_LIFETIME
    return (
        _authority(trust_domain, name, name, key.public_key(), serial, now, ends, path_length=1)
        .add_extension(_constraints(trust_domain), critical=True)
        .add_extension(_key_id(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def make_issuer(
    trust_domain: str,
    label: str,
    root: x509.Certificate,
    root_key: ec.EllipticCurvePrivateKey,
    key: ec.EllipticCurvePrivateKey,
    serial: int,
    now: float,
) -> Issuer:
    """An intermediate below an own root.

    Raises:
        IssuerNotValidError: the root has ended, or has not begun.
    """
    ends = min(now + ISSUER_LIFETIME, expires(root))
    _check_time("root", root, now)
    certificate = (
        _authority(
            trust_domain,
            _name(f"mesh issuer {label}"),
            root.subject,
            key.public_key(),
            serial,
            now,
            ends,
            path_length=0,
        )
        .add_extension(_key_id(key.public_key()), critical=False)
        .add_extension(_issuer_id(root_key.public_key()), critical=False)
        .sign(root_key, hashes.SHA256())
    )
    return Issuer(certificate, key, (), root)


def issue(
    issuer: Issuer,
    principal: Principal,
    workload_id: str,
    public_key: ec.EllipticCurvePublicKey,
    *,
    serial: int,
    now: float,
    ends: float,
) -> Leaf:
    """Signs a leaf. Everything in it but the public key is decided here.

    Args:
        issuer: what signs.
        principal: whom the certificate names.
        workload_id: which workload; the certificate's subject.
        public_key: of the workload.
        serial: random.
        now: seconds since the epoch.
        ends: when the certificate ends; sooner when its issuer does.

    Raises:
        IssuerNotValidError: the issuer has ended, or has not begun.
    """
    for what, certificate in (("issuing certificate", issuer.certificate), ("root", issuer.root)):
        _check_time(what, certificate, now)
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(principal.spiffe_id)]
    names += [x509.DNSName(name) for name in (principal.dns_name, principal.workload_name(workload_id)) if name]
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if principal.kind is not Kind.OPERATOR:  # nobody connects to operators
        usages.insert(0, ExtendedKeyUsageOID.SERVER_AUTH)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_name(workload_id))
        .issuer_name(issuer.certificate.subject)
        .public_key(public_key)
        .serial_number(serial)
        .not_valid_before(_when(now - LEAF_SKEW))
        .not_valid_after(_when(min(ends, issuer.expires)))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_LEAF_USAGE, critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(_key_id(public_key), critical=False)
        .add_extension(_issuer_id(issuer.key.public_key()), critical=False)
        .sign(issuer.key, hashes.SHA256())
    )
    return Leaf(certificate, issuer, principal, workload_id)


def check_issuer(
    chain: Sequence[x509.Certificate], key: ec.EllipticCurvePrivateKey, roots: Iterable[x509.Certificate]
) -> Issuer:
    """The issuer that was given as files.

    Args:
        chain: the issuing certificate first, then those between it and a root; roots among them are left out.
        key: of the issuing certificate.
        roots: that may be at the end.

    Raises:
        ConfigError: they do not belong together, or are no certificate authorities.
    """
    first, *others = chain
    trusted = tuple(roots)
    above: list[x509.Certificate] = []
    current = first
    if _is_root(first):
        raise ConfigError("the CA certificate is a root: give an intermediate of it, so that the root's key stays away")
    if first.public_key() != key.public_key():
        raise ConfigError("the CA key is not the key of the CA certificate")
    while True:
        if not _may_sign(current):
            raise ConfigError(f"the CA chain has a certificate that must not sign others: {_subject(current)}")
        root = next((each for each in trusted if _signed_by(current, each)), None)
        if root is not None:
            return Issuer(first, key, tuple(above), root)
        parent = next((each for each in others if each not in above and _signed_by(current, each)), None)
        if parent is None:
            raise ConfigError(f"the CA certificate leads up to none of the roots: who signed {_subject(current)}?")
        above.append(parent)
        current = parent


def root_of(chain: Sequence[x509.Certificate], roots: Iterable[x509.Certificate]) -> str:
    """Fingerprint of the root that a leaf leads up to by the certificates it was sent with; empty when none is.

    Only who signed whom is looked at, from the leaf on: the handshake has verified the rest.
    """
    trusted = tuple(roots)
    current, others = chain[0], list(chain[1:])
    while True:
        root = next((each for each in trusted if _signed_by(current, each)), None)
        if root is not None:
            return fingerprint(root)
        parent = next((each for each in others if _signed_by(current, each)), None)
        if parent is None:
            return ""
        others.remove(parent)
        current = parent


def check_roots(roots: Sequence[x509.Certificate], now: float) -> tuple[x509.Certificate, ...]:
    """The roots, each once.

    Raises:
        ConfigError: there are none, or one is no root or has ended.
    """
    if not roots:
        raise ConfigError("there is no root among the CA roots")
    for root in roots:
        if not _is_root(root) or not _may_sign(root):
            raise ConfigError(f"the CA roots hold a certificate that is no root: {_subject(root)}")
        if expires(root) <= now:
            raise ConfigError(f"the CA roots hold one that has ended: {_subject(root)}")
    return tuple(dict.fromkeys(roots))


def load_certificates(content: bytes, what: str) -> list[x509.Certificate]:
    """The certificates of a PEM file, at least one.

    Raises:
        ConfigError: there are none, or one is broken.
    """
    try:
        return x509.load_pem_x509_certificates(content)
    except (ValueError, x509.InvalidVersion):
        raise ConfigError(f"{what} holds no certificates that can be read; expected PEM") from None


def load_key(content: bytes, what: str) -> ec.EllipticCurvePrivateKey:
    """An EC key on P-256 or P-384 of an unencrypted PEM file.

    Raises:
        ConfigError: it is something else.
    """
    try:
        key = serialization.load_pem_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(f"{what} holds no key that can be read; expected an unencrypted EC key as PEM") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1):
        raise ConfigError(f"{what} holds a key of another kind; expected an EC key on P-256 or P-384")
    return key


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS #8, unencrypted. Secret."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def pem(certificates: Iterable[x509.Certificate]) -> bytes:
    """Certificates one after another."""
    return b"".join(each.public_bytes(serialization.Encoding.PEM) for each in certificates)


def der(certificate: x509.Certificate) -> bytes:
    """A certificate as DER."""
    return certificate.public_bytes(serialization.Encoding.DER)


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the DER, lower-case hex."""
    return hashlib.sha256(der(certificate)).hexdigest()


def expires(certificate: x509.Certificate) -> float:
    """When it ends, in seconds since the epoch."""
    return certificate.not_valid_after_utc.timestamp()


def begins(certificate: x509.Certificate) -> float:
    """When it begins, in seconds since the epoch."""
    return certificate.not_valid_before_utc.timestamp()


_LEAF_USAGE = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)
_AUTHORITY_USAGE = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


def _authority(
    trust_domain: str,
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    serial: int,
    now: float,
    ends: float,
    *,
    path_length: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(serial)
        .not_valid_before(_when(now - AUTHORITY_SKEW))
        .not_valid_after(_when(ends))
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_AUTHORITY_USAGE, critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")]), critical=False
        )
    )


def _constraints(trust_domain: str) -> x509.NameConstraints:
    return x509.NameConstraints(
        permitted_subtrees=[x509.DNSName(trust_domain), x509.UniformResourceIdentifier(trust_domain)],
        excluded_subtrees=None,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_id(public_key: ec.EllipticCurvePublicKey) -> x509.SubjectKeyIdentifier:
    return x509.SubjectKeyIdentifier.from_public_key(public_key)


def _issuer_id(public_key: ec.EllipticCurvePublicKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(public_key)


def _when(seconds: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(int(seconds), dt.UTC)


def _check_time(what: str, certificate: x509.Certificate, now: float) -> None:
    if not begins(certificate) <= now < expires(certificate):
        raise IssuerNotValidError(
            f"the {what} is good from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} to "
            f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, and that is not now"
        )


def _signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _is_root(certificate: x509.Certificate) -> bool:
    return certificate.subject == certificate.issuer and _signed_by(certificate, certificate)


def _may_sign(certificate: x509.Certificate) -> bool:
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except (ValueError, x509.ExtensionNotFound):
        return False
    return constraints.ca and usage.key_cert_sign


def _subject(certificate: x509.Certificate) -> str:
    return certificate.subject.rfc4514_string() or f"serial {certificate.serial_number:x}"
