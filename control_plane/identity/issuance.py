"""Who gets a certificate: by a join token, by what another authority attested, or by the certificate they have."""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from control_plane.identity import ca, tokens
from control_plane.identity.audit import record
from control_plane.identity.bundle import TrustBundle
from control_plane.identity.csr import check_request
from control_plane.identity.errors import NotRenewableError, WrongServiceError
from control_plane.identity.records import TokenRecord, WorkloadRecord
from control_plane.identity.store import IdentityStore
from mesh_client.core.caller import Caller
from mesh_client.core.errors import InvalidValueError
from mesh_client.core.identity import Kind, Principal
from mesh_client.core.model import check_service_name

DEFAULT_TTL = 3600.0
MIN_TTL, MAX_TTL = 60.0, 30 * 86_400.0
"""Seconds that a join token is good for."""
MAX_USES = 100_000


@dataclass(frozen=True, slots=True)
class CreatedToken:
    """A new join token.

    Attributes:
        text: the token itself. Secret.
        details: the rest of it.
    """

    text: str = field(repr=False)
    details: TokenRecord


@dataclass(frozen=True, slots=True)
class InForce:
    """What holds when a certificate is signed."""

    issuer: ca.Issuer = field(repr=False)
    roots: tuple[x509.Certificate, ...]
    bundle: TrustBundle


class Issuance:
    """Signs, and remembers what it signed before it hands it out.

    Args:
        store: of join tokens and workloads.
        key: signs join tokens.
        in_force: what holds now.
        trust_domain: of the mesh.
        lifetime: of certificates, seconds.
        clock: seconds since the epoch.

    Attributes:
        issued: certificates since the start: first ones ("issued"), and "renewed" ones.
        on_issued: called with each of them, and which of the two it is.
    """

    def __init__(
        self,
        store: IdentityStore,
        key: Ed25519PrivateKey,
        in_force: Callable[[], InForce],
        trust_domain: str,
        lifetime: float,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._key = key
        self._public_key = key.public_key()
        self._in_force = in_force
        self._trust_domain = trust_domain
        self._lifetime = lifetime
        self._clock = clock
        self.issued: Counter[str] = Counter()
        self.on_issued: Callable[[str, ca.Leaf], None] = _nobody

    async def create_token(self, service: str, ttl: float, uses: int, created_by: str) -> CreatedToken:
        """Makes a join token.

        Args:
            service: that it attests.
            ttl: seconds that it is good for, `MIN_TTL` to `MAX_TTL`.
            uses: how many workloads may join with it, 1 to `MAX_USES`.
            created_by: SPIFFE ID of whoever asked.

        Raises:
            InvalidValueError: a value is not allowed.
            TooManyTokensError: there are too many.
            StoreUnavailableError: it cannot be stored.
        """
        check_service_name(service)
        if not MIN_TTL <= ttl <= MAX_TTL:
            raise InvalidValueError("ttl", f"{ttl:g} s", "1 min to 30 days")
        if not 1 <= uses <= MAX_USES:
            raise InvalidValueError("uses", uses, f"1 to {MAX_USES}")
        now, bundle = self._clock(), self._in_force().bundle
        token = tokens.JoinToken(
            secrets.token_hex(8),
            service,
            tokens.ends_at(now, ttl),
            # The root that the enrolment port shows comes first: others may not fit in.
            tuple(dict.fromkeys((bundle.signing_root, *bundle.fingerprints)))[: tokens.MAX_ROOTS],
            self._trust_domain,
        )
        details = TokenRecord(token.id, service, token.expires, uses, uses, created_by)
        await self._store.add_token(details, now)
        return CreatedToken(tokens.sign_token(token, self._key), details)

    async def by_token(self, text: str, service: str, request: bytes, peer: str) -> ca.Leaf:
        """A first certificate for whoever has a join token.

        Args:
            text: the token.
            service: that the caller means to be.
            request: PKCS #10, DER.
            peer: address of the caller, for the audit record.

        Raises:
            InvalidTokenError: the token does not hold.
            WrongServiceError: it holds, for another service.
            RevokedError: the workload joined before, or its key is another one's, and has been revoked.
            InvalidValueError: the request is not allowed.
            IssuerNotValidError: nothing can be signed now.
            StoreUnavailableError: it cannot be stored.
        """
        now = self._clock()
        token = tokens.verify_token(text, self._public_key, self._trust_domain, now)
        if token.service != service:
            raise WrongServiceError(f"join token {token.id} is for {token.service}")
        key = check_request(request)
        # Whoever asks again with the same key, because the answer was lost, is the same workload and spends nothing.
        workload_id = _joined_id(token.id, key)
        leaf = self._sign(Principal.service(self._trust_domain, token.service), workload_id, key)
        attested_by = f"join token {token.id}"
        await self._store.join(self._joined(leaf, key, attested_by), token.id, token.service, now)
        return await self._finish("issued", leaf, key, attested_by, peer)

    async def attested(self, service: str, request: bytes, attested_by: str, peer: str) -> ca.Leaf:
        """A first certificate for a workload whose service was attested otherwise.

        Args:
            service: that was attested.
            request: PKCS #10, DER.
            attested_by: in words that name whatever attested it, the same each time: what attested a workload that has
                been revoked since attests no other.
            peer: address of the caller, for the audit record.

        Raises:
            RevokedError: a workload that was attested by the same, or has the same key, has been revoked.
            InvalidValueError: the request or the service is not allowed.
            IssuerNotValidError: nothing can be signed now.
            StoreUnavailableError: it cannot be stored.
        """
        key = check_request(request)
        leaf = self._sign(Principal.service(self._trust_domain, service), secrets.token_hex(8), key)
        await self._store.add_workload(self._joined(leaf, key, attested_by))
        return await self._finish("issued", leaf, key, attested_by, peer)

    async def renew(self, caller: Caller, chain: Sequence[x509.Certificate], request: bytes, peer: str) -> ca.Leaf:
        """The next certificate of a caller that has one: for the same principal and the same workload.

        An operator's ends when the present one does: operators get their time from whoever has the CA's files.

        Args:
            caller: whom the certificate of the connection names.
            chain: what the connection showed, that certificate first.
            request: PKCS #10, DER.
            peer: address of the caller, for the audit record.

        Raises:
            NotRenewableError: the present certificate has ended since, its root is not trusted any more, or it is a
                control plane's.
            RevokedError: the workload has been revoked.
            InvalidValueError: the request is not allowed.
            IssuerNotValidError: nothing can be signed now.
            StoreUnavailableError: it cannot be stored.
        """
        now = self._clock()
        current = chain[0]
        if caller.principal.kind is Kind.CONTROL_PLANE:
            raise NotRenewableError("control planes sign their own certificates")
        if not now < ca.expires(current):
            raise NotRenewableError("the connection's certificate has ended: enrol again")
        # A connection outlives the root that it was made with, and what that root vouches for since may be forged.
        if not ca.root_of(chain, self._in_force().roots):
            raise NotRenewableError("the connection's certificate is below no root that is trusted now: enrol again")
        ends = ca.expires(current) if caller.principal.kind is Kind.OPERATOR else None
        key = check_request(request)
        leaf = self._sign(caller.principal, caller.workload_id, key, ends)
        # For one that this control plane does not know: another one below the same root attested it.
        await self._store.renew(_record(leaf, key, "certificate"))
        return await self._finish("renewed", leaf, key, f"certificate {current.serial_number:x}", peer)

    def _sign(
        self, principal: Principal, workload_id: str, key: ec.EllipticCurvePublicKey, ends: float | None = None
    ) -> ca.Leaf:
        now = self._clock()
        return ca.issue(
            self._in_force().issuer,
            principal,
            workload_id,
            key,
            serial=x509.random_serial_number(),
            now=now,
            ends=now + self._lifetime if ends is None else ends,
        )

    def _joined(self, leaf: ca.Leaf, key: ec.EllipticCurvePublicKey, attested_by: str) -> WorkloadRecord:
        """The record of a first certificate. The bundle comes with it, so whoever has the one has the other."""
        trusted = frozenset(self._in_force().bundle.fingerprints)
        return dataclasses.replace(_record(leaf, key, attested_by), trusted=trusted)

    async def _finish(
        self, what: str, leaf: ca.Leaf, key: ec.EllipticCurvePublicKey, attested_by: str, peer: str
    ) -> ca.Leaf:
        # The root may have been retired while the certificate was being stored.
        while leaf.root not in map(ca.fingerprint, self._in_force().roots):
            leaf = self._sign(leaf.principal, leaf.workload_id, key, leaf.expires)
            await self._store.renew(_record(leaf, key, attested_by))
        record(what, leaf, attested_by, peer)
        self.issued[what] += 1
        self.on_issued(what, leaf)
        return leaf


def _nobody(what: str, leaf: ca.Leaf) -> None:
    """Nobody wants to know."""


def _joined_id(token_id: str, key: ec.EllipticCurvePublicKey) -> str:
    """Id of the workload that joins by a token with a key: nobody else has the key."""
    return hashlib.sha256(f"{token_id} ".encode() + _point(key)).hexdigest()[:16]


def _point(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)


def _record(leaf: ca.Leaf, key: ec.EllipticCurvePublicKey, attested_by: str) -> WorkloadRecord:
    return WorkloadRecord(
        leaf.workload_id,
        leaf.principal.spiffe_id,
        leaf.serial,
        leaf.expires,
        leaf.root,
        attested_by,
        key=hashlib.sha256(_point(key)).hexdigest(),
    )
