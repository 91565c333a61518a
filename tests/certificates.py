"""A certificate authority for tests: certificates as the mesh has them, and as it must never accept them."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mesh_client.core.identity import DEFAULT_TRUST_DOMAIN, Principal

_USAGES = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


@dataclass(frozen=True, slots=True)
class Certificate:
    """A key with its certificate, PEM."""

    key: bytes
    chain: bytes
    workload_id: str

    def server_credentials(self, roots: bytes) -> grpc.ServerCredentials:
        """For a server that requires certificates of its callers."""
        return grpc.ssl_server_credentials([(self.key, self.chain)], roots, require_client_auth=True)

    def channel_credentials(self, roots: bytes) -> grpc.ChannelCredentials:
        """For a client that shows this certificate."""
        return grpc.ssl_channel_credentials(roots, self.key, self.chain)


class TestAuthority:
    """A root that signs whatever a test wants."""

    __test__ = False

    def __init__(self, trust_domain: str = DEFAULT_TRUST_DOMAIN) -> None:
        self.trust_domain = trust_domain
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"test root {uuid.uuid4().hex[:8]}")])
        now = dt.datetime.now(dt.UTC)
        self._certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=5))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.roots = self._certificate.public_bytes(serialization.Encoding.PEM)

    def issue(
        self,
        principal: Principal,
        *,
        workload_id: str | None = None,
        uris: Sequence[str] | None = None,
        dns_names: Sequence[str] | None = None,
        common_names: Sequence[str] | None = None,
        starts: float = -60.0,
        ends: float = 3600.0,
        public_key: ec.EllipticCurvePublicKey | None = None,
    ) -> Certificate:
        """A certificate.

        Args:
            principal: whose.
            workload_id: which workload's; None for a new one.
            uris: URI names in place of the SPIFFE ID.
            dns_names: in place of the principal's.
            common_names: in place of the workload's id.
            starts: seconds from now.
            ends: seconds from now.
            public_key: somebody else's, whose certificate then comes without a key; None for a new one.
        """
        workload_id = workload_id or uuid.uuid4().hex[:16]
        key = ec.generate_private_key(ec.SECP256R1())
        now = dt.datetime.now(dt.UTC)
        names: list[x509.GeneralName] = [
            x509.UniformResourceIdentifier(uri) for uri in ([principal.spiffe_id] if uris is None else uris)
        ]
        if dns_names is None:
            dns_names = [principal.dns_name, principal.workload_name(workload_id)]
        names += [x509.DNSName(name) for name in dns_names if name]
        subject = [
            x509.NameAttribute(NameOID.COMMON_NAME, name)
            for name in ([workload_id] if common_names is None else common_names)
        ]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name(subject))
            .issuer_name(self._certificate.subject)
            .public_key(public_key or key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + dt.timedelta(seconds=starts))
            .not_valid_after(now + dt.timedelta(seconds=ends))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(_USAGES), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=not subject)
            .sign(self._key, hashes.SHA256())
        )
        private_key = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return Certificate(
            b"" if public_key else private_key,
            certificate.public_bytes(serialization.Encoding.PEM),
            workload_id,
        )

    def service(self, name: str, *, workload_id: str | None = None) -> Certificate:
        """A workload's certificate."""
        return self.issue(Principal.service(self.trust_domain, name), workload_id=workload_id)

    def operator(self, name: str = "alice") -> Certificate:
        """An operator's certificate."""
        return self.issue(Principal.operator(self.trust_domain, name))

    def control_plane(self) -> Certificate:
        """A control plane's certificate."""
        return self.issue(Principal.control_plane(self.trust_domain))
