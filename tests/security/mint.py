"""A certificate authority whose issuing key the tests hold: what the control plane signs with, they can sign with too.

So a test can have certificates that chain up to the mesh's own root and that the control plane would never make.
"""

from __future__ import annotations

import datetime as dt
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from control_plane.identity import ca
from control_plane.identity.options import IdentityOptions
from mesh_client.core.identity import DEFAULT_TRUST_DOMAIN, Kind, Principal

BOTH = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


def new_key() -> ec.EllipticCurvePrivateKey:
    """A key as workloads make it."""
    return ec.generate_private_key(ec.SECP256R1())


def signing_request(
    key: ec.EllipticCurvePrivateKey, *extensions: x509.ExtensionType, subject: x509.Name | None = None
) -> bytes:
    """PKCS #10, DER, with whatever somebody may ask for."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject or x509.Name([]))
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


@dataclass(frozen=True, slots=True)
class Credential:
    """A key with certificates, PEM."""

    key: bytes
    chain: bytes
    roots: bytes

    @property
    def leaf(self) -> x509.Certificate:
        """The first certificate."""
        return x509.load_pem_x509_certificate(self.chain)

    @property
    def workload_id(self) -> str:
        """The common name."""
        return self.leaf.subject.rfc4514_string().removeprefix("CN=")

    @property
    def private_key(self) -> ec.EllipticCurvePrivateKey:
        """The key as an object."""
        key = serialization.load_pem_private_key(self.key, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key

    def for_channel(self) -> grpc.ChannelCredentials:
        """For a client that shows it."""
        return grpc.ssl_channel_credentials(self.roots, self.key, self.chain)

    def for_server(self, *, asks: bool = True) -> grpc.ServerCredentials:
        """For a server that shows it, and asks its callers for theirs or does not."""
        roots = self.roots if asks else None
        return grpc.ssl_server_credentials([(self.key, self.chain)], roots, require_client_auth=asks)


class Mint:
    """Root, issuing intermediate and their files."""

    def __init__(self, directory: Path, trust_domain: str = DEFAULT_TRUST_DOMAIN) -> None:
        self.trust_domain = trust_domain
        now = time.time()
        root_key, issuer_key = new_key(), new_key()
        root = ca.make_root(trust_domain, uuid.uuid4().hex[:8], root_key, x509.random_serial_number(), now)
        self.root = root
        self.issuer = ca.make_issuer(
            trust_domain, uuid.uuid4().hex[:8], root, root_key, issuer_key, x509.random_serial_number(), now
        )
        self.roots = ca.pem([root])
        directory.mkdir(mode=0o700)
        self._certificate, self._key, self._roots = (directory / name for name in ("ca.pem", "ca.key", "roots.pem"))
        self._certificate.write_bytes(ca.pem(self.issuer.chain))
        self._key.touch(mode=0o600)
        self._key.write_bytes(ca.key_pem(issuer_key))
        self._roots.write_bytes(self.roots)

    def options(self) -> IdentityOptions:
        """Of a control plane that signs by it."""
        return IdentityOptions(
            trust_domain=self.trust_domain, ca_certificate=self._certificate, ca_key=self._key, ca_roots=self._roots
        )

    def service(self, name: str) -> Credential:
        """A workload's, as the control plane would make it."""
        return self.sign(Principal.service(self.trust_domain, name))

    def operator(self, name: str = "mallory") -> Credential:
        """An operator's, which is no server's."""
        return self.sign(Principal.operator(self.trust_domain, name), usages=[ExtendedKeyUsageOID.CLIENT_AUTH])

    def sign(
        self,
        principal: Principal,
        *,
        uris: Sequence[str] | None = None,
        dns: Sequence[str] | None = None,
        common_names: Sequence[str] | None = None,
        usages: Sequence[ObjectIdentifier] = BOTH,
        starts: float = -60.0,
        ends: float = 3600.0,
        issuer: Credential | None = None,
        authority: bool = False,
    ) -> Credential:
        """A certificate.

        Args:
            principal: whose.
            uris: URI names in place of the SPIFFE ID.
            dns: DNS names in place of the principal's.
            common_names: of the subject, in place of a workload id.
            usages: extended key usages.
            starts: seconds from now.
            ends: seconds from now.
            issuer: somebody else who signs: a workload, say.
            authority: whether it says that it may sign others.
        """
        key, now = new_key(), dt.datetime.now(dt.UTC)
        names: list[x509.GeneralName] = [
            x509.UniformResourceIdentifier(each) for each in ([principal.spiffe_id] if uris is None else uris)
        ]
        subject = [uuid.uuid4().hex[:16]] if common_names is None else common_names
        if dns is None:
            dns = [each for each in (principal.dns_name, *map(principal.workload_name, subject[:1])) if each]
        names += [x509.DNSName(each) for each in dns]
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each) for each in subject]))
            .issuer_name(self.issuer.certificate.subject if issuer is None else issuer.leaf.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + dt.timedelta(seconds=starts))
            .not_valid_after(now + dt.timedelta(seconds=ends))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=not subject)
        if issuer is None:
            certificate, above = builder.sign(self.issuer.key, hashes.SHA256()), ca.pem(self.issuer.chain)
        else:
            certificate, above = builder.sign(issuer.private_key, hashes.SHA256()), issuer.chain
        return Credential(ca.key_pem(key), ca.pem([certificate]) + above, self.roots)


def self_signed(principal: Principal) -> Credential:
    """A certificate that nobody but itself vouches for, trusted by whoever holds it."""
    key, now = new_key(), dt.datetime.now(dt.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, uuid.uuid4().hex[:16])])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.UniformResourceIdentifier(principal.spiffe_id), x509.DNSName(principal.dns_name)]
                if principal.kind is not Kind.OPERATOR
                else [x509.UniformResourceIdentifier(principal.spiffe_id)]
            ),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    pem = ca.pem([certificate])
    return Credential(ca.key_pem(key), pem, pem)
