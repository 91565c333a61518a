"""The control plane's own certificate, and the server credentials that show it and check those of callers."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from control_plane.identity import ca
from control_plane.identity.audit import LOCAL, record
from mesh_client.core.identity import Principal

TICKET_LIFETIME = 60.0
"""Seconds after which a port's TLS context is made anew, at most. Whoever resumes a session shows no certificate again,
and gRPC's tickets are good for two days: this bounds for how long a certificate that has ended since is of use, because
tickets end with their context."""

RENEWAL = 0.5
"""The certificate is renewed when this share of its life is over."""


@dataclass(frozen=True, slots=True)
class _Shown:
    """What handshakes use from now on."""

    generation: int
    mesh: grpc.ServerCertificateConfiguration
    enrolment: grpc.ServerCertificateConfiguration


class OwnIdentity:
    """Keeps the credentials of servers that run; they follow without a restart.

    Args:
        trust_domain: of the mesh.
        lifetime: of the certificate, seconds.
    """

    def __init__(self, trust_domain: str, lifetime: float) -> None:
        self._principal = Principal.control_plane(trust_domain)
        self._workload_id = secrets.token_hex(8)
        self._lifetime = lifetime
        self._roots: tuple[x509.Certificate, ...] = ()
        self._leaf: ca.Leaf | None = None
        self._key_pem = b""
        # Replaced whole: handshakes read it in gRPC's threads.
        self._shown: _Shown | None = None

    @property
    def leaf(self) -> ca.Leaf | None:
        """The certificate; None before the first one."""
        return self._leaf

    def refresh(self, issuer: ca.Issuer, roots: tuple[x509.Certificate, ...], now: float) -> bool:
        """Renews the certificate when it is time, and follows issuer and roots; whether anything changed.

        Raises:
            IssuerNotValidError: nothing can be signed now; what was shown before stays.
        """
        leaf, key_pem = self._leaf, self._key_pem
        renew = leaf is None or self._is_due(leaf, issuer, now)
        if not renew and roots == self._roots:
            return False
        if leaf is None or renew:
            what = "issued" if leaf is None else "renewed"
            key = ec.generate_private_key(ec.SECP256R1())
            leaf = ca.issue(
                issuer,
                self._principal,
                self._workload_id,
                key.public_key(),
                serial=x509.random_serial_number(),
                now=now,
                ends=now + self._lifetime,
            )
            key_pem = ca.key_pem(key)
            record(what, leaf, "control plane", LOCAL)
        self._leaf, self._key_pem, self._roots = leaf, key_pem, roots
        self._shown = _Shown(
            0 if self._shown is None else self._shown.generation + 1,
            grpc.ssl_server_certificate_configuration([(key_pem, leaf.chain_pem())], ca.pem(roots)),
            grpc.ssl_server_certificate_configuration([(key_pem, leaf.chain_pem(with_root=True))]),
        )
        return True

    def mesh_credentials(self) -> grpc.ServerCredentials:
        """For the mesh port: callers have to show a certificate below a trusted root."""
        return grpc.dynamic_ssl_server_credentials(
            self._current().mesh, self._fetcher(lambda shown: shown.mesh), require_client_authentication=True
        )

    def enrolment_credentials(self) -> grpc.ServerCredentials:
        """For the enrolment port: callers show nothing. The chain has the root, for those that know its hash only."""
        return grpc.dynamic_ssl_server_credentials(
            self._current().enrolment, self._fetcher(lambda shown: shown.enrolment), require_client_authentication=False
        )

    def _is_due(self, leaf: ca.Leaf, issuer: ca.Issuer, now: float) -> bool:
        # Counted from its issuance, not from when it is valid, which is before that.
        begins = ca.begins(leaf.certificate) + ca.LEAF_SKEW
        over = now >= begins + (leaf.expires - begins) * RENEWAL
        # A clock that was set back makes a certificate that is not valid yet.
        return over or now < ca.begins(leaf.certificate) or leaf.issuer.certificate != issuer.certificate

    def _current(self) -> _Shown:
        if self._shown is None:
            raise RuntimeError("the certificate authority is not open")
        return self._shown

    def _fetcher(
        self, choose: Callable[[_Shown], grpc.ServerCertificateConfiguration]
    ) -> Callable[[], grpc.ServerCertificateConfiguration]:
        """Asked by gRPC at each handshake, one after another; None has it go on with what it has."""
        generation, since = self._current().generation, time.monotonic()
        tickets = min(TICKET_LIFETIME, self._lifetime / 10)

        # The type stubs know nothing of None.
        def fetch() -> Any:
            nonlocal generation, since
            shown = self._current()
            if shown.generation == generation and time.monotonic() - since < tickets:
                return None
            generation, since = shown.generation, time.monotonic()
            return choose(shown)

        return fetch
