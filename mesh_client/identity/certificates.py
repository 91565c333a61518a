"""Keys, requests for signing, certificates and trust bundles, as one workload holds them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from mesh.v1 import certificate_pb2

from mesh_client.core.caller import Caller, caller_from
from mesh_client.core.errors import IdentityError, InvalidValueError
from mesh_client.core.identity import Principal, check_trust_domain
from mesh_client.core.renewal import Validity

MAX_CHAIN = 8
"""Certificates between a leaf and its root that are looked at."""

_MALFORMED = (
    ValueError,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


def new_key() -> ec.EllipticCurvePrivateKey:
    """A private key, EC P-256. It never leaves the workload."""
    return ec.generate_private_key(ec.SECP256R1())


def signing_request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS #10, DER: the public key, and proof of its private key. It asks for nothing: whoever signs knows."""
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def key_to_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS #8, PEM. Secret."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def to_pem(certificates: Iterable[bytes]) -> bytes:
    """PEM of certificates in DER, one after the other."""
    return b"".join(
        x509.load_der_x509_certificate(certificate).public_bytes(serialization.Encoding.PEM)
        for certificate in certificates
    )


def from_pem(text: bytes) -> tuple[bytes, ...]:
    """Certificates in DER, of PEM.

    Raises:
        ValueError: there is none, or one is malformed.
    """
    return tuple(
        certificate.public_bytes(serialization.Encoding.DER) for certificate in x509.load_pem_x509_certificates(text)
    )


def fingerprint(certificate: bytes) -> str:
    """SHA-256 of a certificate in DER, lower-case hex."""
    return hashlib.sha256(certificate).hexdigest()


@dataclass(frozen=True, slots=True)
class TrustBundle:
    """Whom to trust: `mesh.v1.TrustBundle`.

    Attributes:
        trust_domain: such as ``mesh.internal``.
        version: names it.
        roots: DER; at least one.
        signing_root: fingerprint of the root that new certificates lead up to.
        revoked: ids of revoked workloads.
    """

    trust_domain: str
    version: str
    roots: tuple[bytes, ...]
    signing_root: str
    revoked: frozenset[str] = frozenset()

    @classmethod
    def from_proto(cls, message: certificate_pb2.TrustBundle) -> TrustBundle:
        """The bundle that a control plane sent.

        Raises:
            IdentityError: it is none.
        """
        try:
            check_trust_domain(message.trust_domain)
            for root in message.roots:
                x509.load_der_x509_certificate(root)
        except (InvalidValueError, ValueError) as error:
            raise IdentityError(f"the trust bundle is malformed: {error}") from None
        if not message.roots:
            raise IdentityError("the trust bundle holds no root")
        return cls(
            message.trust_domain,
            message.version,
            tuple(message.roots),
            message.signing_root,
            frozenset(message.revoked_workloads),
        )

    def to_proto(self) -> certificate_pb2.TrustBundle:
        """As `from_proto` takes it."""
        return certificate_pb2.TrustBundle(
            trust_domain=self.trust_domain,
            version=self.version,
            roots=self.roots,
            signing_root=self.signing_root,
            revoked_workloads=sorted(self.revoked),
        )


@dataclass(frozen=True)
class Credential:
    """A private key with the certificate for it. Made by `accept`, which checks that they belong together.

    Attributes:
        key: PEM. Secret.
        chain: DER, the leaf first, without the root.
        principal: whom it names.
        workload_id: which workload of theirs.
        serial: serial number, lower-case hex.
        validity: from when until when.
    """

    key: bytes = field(repr=False)
    chain: tuple[bytes, ...] = field(repr=False)
    principal: Principal
    workload_id: str
    serial: str
    validity: Validity

    @cached_property
    def chain_pem(self) -> bytes:
        """PEM of the chain."""
        return to_pem(self.chain)

    def root_in(self, bundle: TrustBundle) -> str:
        """Fingerprint of the bundle's root that it leads up to; empty when it leads up to none of them."""
        last = x509.load_der_x509_certificate(self.chain[-1])
        for root in bundle.roots:
            if _issued(last, x509.load_der_x509_certificate(root)):
                return fingerprint(root)
        return ""


def accept(key: bytes, chain: Sequence[bytes], bundle: TrustBundle, principal: Principal) -> Credential:
    """The credential that a key and a certificate chain are, if they are what this workload needs.

    Times are not looked at: a host's clock may be wrong, and what then follows is said elsewhere.

    Args:
        key: PEM. Secret.
        chain: DER, the leaf first.
        bundle: the chain must lead up to one of its roots.
        principal: whom it must name.

    Raises:
        IdentityError: they are not; the message says why.
    """
    if not 1 <= len(chain) <= MAX_CHAIN:
        raise IdentityError(f"the certificate chain has {len(chain)} certificates; expected 1 to {MAX_CHAIN}")
    try:
        private_key = serialization.load_pem_private_key(key, None)
        certificates = [x509.load_der_x509_certificate(certificate) for certificate in chain]
        leaf = certificates[0]
        caller = _named(leaf)
        validity = Validity(leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp())
        key_matches = private_key.public_key() == leaf.public_key()
    except (*_MALFORMED, TypeError, UnsupportedAlgorithm) as error:
        raise IdentityError(f"the key or the certificate is malformed ({type(error).__name__})") from None
    if not key_matches:
        raise IdentityError("the certificate is for another key")
    if caller is None or caller.principal != principal:
        raise IdentityError(f"the certificate is for {caller or 'nobody of a mesh'}, not for {principal}")
    if not all(_issued(issued, issuer) for issued, issuer in itertools.pairwise(certificates)):
        raise IdentityError("the certificates of the chain did not issue each other")
    credential = Credential(key, tuple(chain), principal, caller.workload_id, f"{leaf.serial_number:x}", validity)
    if bundle.trust_domain != principal.trust_domain or not credential.root_in(bundle):
        raise IdentityError("the certificate leads up to none of the roots that are trusted")
    return credential


def caller_of(certificate: bytes) -> Caller | None:
    """Whom a certificate names, PEM; None for nobody of a mesh. Whether it may be believed was decided before."""
    try:
        return _named(x509.load_pem_x509_certificate(certificate))
    except _MALFORMED:
        return None


def _named(certificate: x509.Certificate) -> Caller | None:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    subject = [attribute.value for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    return caller_from(
        [uri.encode() for uri in names.get_values_for_type(x509.UniformResourceIdentifier)],
        [name if isinstance(name, bytes) else name.encode() for name in subject],
    )


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
