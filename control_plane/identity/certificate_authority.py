"""The certificate authority of one control plane: whom to trust, who signs, who is revoked, and its own certificate."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import grpc
import grpc.aio
from cryptography import x509

from control_plane.files import (
    data_directory,
    lock_directory,
    remove_unfinished,
    secret_directory,
)
from control_plane.identity import ca
from control_plane.identity.audit import record_stored
from control_plane.identity.authority_state import Authority, AuthorityState
from control_plane.identity.bundle import TrustBundle
from control_plane.identity.errors import IssuerNotValidError
from control_plane.identity.given_authority import GivenAuthority
from control_plane.identity.issuance import CreatedToken, InForce, Issuance
from control_plane.identity.operators import DEFAULT_LIFETIME, OperatorFiles, write_operator
from control_plane.identity.options import IdentityOptions
from control_plane.identity.own_authority import OwnAuthority
from control_plane.identity.own_identity import OwnIdentity
from control_plane.identity.records import TokenRecord, WorkloadRecord
from control_plane.identity.rotation import Dependent
from control_plane.identity.store import IdentityStore
from control_plane.identity.token_key import load_token_key
from control_plane.identity.trust import Trust
from mesh_client.core.caller import Caller
from mesh_client.core.errors import ConfigError, MeshError
from mesh_client.core.identity import Kind, Principal
from mesh_client.tasks import end_tasks

LOCK_NAME = "identity.lock"
"""In the data directory: one control plane at a time."""

FORGET_EVERY = 3600.0
"""Seconds between the times at which what ended long ago is forgotten."""
MAX_NOTED = 100_000
"""Workloads whose certificate is known to be stored; after that many it is stored again."""
WARN, WARN_LOUDLY = 60 * 86_400.0, 7 * 86_400.0
"""Seconds before the end of the issuer from when on there are warnings, and errors."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AuthorityStatus:
    """What operators are shown.

    Attributes:
        state: roots, issuer, and where a rotation stands.
        kind: where certificates come from.
        bundle: what workloads are told.
        workloads: those whose certificates have not ended.
        dependents: those of them that a rotation must not cut off.
    """

    state: AuthorityState
    kind: str
    bundle: TrustBundle
    workloads: tuple[WorkloadRecord, ...]
    dependents: tuple[Dependent, ...]


class CertificateAuthority:
    """Signs, remembers, revokes and rotates. Times are wall-clock times, for certificates end by the wall clock.

    Args:
        options: what the operator chose.
        clock: seconds since the epoch.
    """

    def __init__(self, options: IdentityOptions, clock: Callable[[], float] = time.time) -> None:
        self.options = options
        self.trust_domain = options.trust_domain
        self._clock = clock
        self._directory = None if options.data_dir is None else options.data_dir / "ca"
        self._lock: IO[bytes] | None = None
        self._authority = self._choose(options)
        self._store = IdentityStore(options.data_dir)
        self._own = OwnIdentity(options.trust_domain, options.leaf_lifetime)
        self._issuance: Issuance | None = None
        self._trust = Trust(options.trust_domain, self._directory, self._store)
        self._changing = asyncio.Lock()
        self._noted: dict[str, str] = {}
        self._forgot_at = 0.0
        self._warned_at = 0.0
        self._maintenance: asyncio.Task[None] | None = None

    # -- life

    async def open(self) -> None:
        """Reads or makes everything, and keeps it fresh from then on.

        Raises:
            ConfigError: files are unsafe, broken, in use by another control plane, or missing.
        """
        try:
            if self.options.data_dir is not None and self._directory is not None:
                data_directory(self.options.data_dir)
                self._lock = lock_directory(self.options.data_dir, LOCK_NAME)
                secret_directory(self._directory)
                remove_unfinished(self._directory)
            now = self._clock()
            self._authority.open(now, self._trust.remembered())
            key = load_token_key(self._directory)
            await self._store.open()
            self._issuance = Issuance(
                self._store, key, self._in_force, self.trust_domain, self.options.leaf_lifetime, self._clock
            )
            await self._refresh(now)
            await self._record_others()
        except OSError as error:
            await self.close()
            raise ConfigError(f"{self._directory} cannot be used: {error}") from error
        except IssuerNotValidError as error:
            await self.close()
            raise ConfigError(f"{error}: is the clock right?") from None
        except BaseException:
            await self.close()
            raise
        self._maintenance = asyncio.create_task(self._maintain(), name="certificate authority")

    async def close(self) -> None:
        """Ends its work and lets other control planes have the data directory. Servers have been stopped before."""
        maintenance, self._maintenance = self._maintenance, None
        await end_tasks(maintenance)
        await self._store.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    async def maintain(self) -> None:
        """What is done every few seconds: renews issuer and own certificate, records operators, drops what has ended.

        Raises:
            MeshError: something could not be done; everything else goes on as it is.
            OSError: a file could not be written.
        """
        async with self._changing:
            now = self._clock()
            try:
                self._authority.tick(now)
                if self._authority.pending:
                    self._authority.follow(self._dependents(await self._store.workloads(now), now))
            finally:
                await self._refresh(now)
            await self._record_others()
            if abs(now - self._forgot_at) >= FORGET_EVERY:
                self._forgot_at = now
                await self._store.forget(now)
                self._noted.clear()
            self._warn_of_end(now)

    # -- trust

    @property
    def bundle(self) -> TrustBundle:
        """Whom to trust, now."""
        return self._trust.bundle

    @property
    def signs_until(self) -> float:
        """When what signs certificates ends, seconds since the epoch."""
        return ca.expires(self._authority.state.issuer.certificate)

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Has ``callback`` called after each change of the bundle; the returned function ends that."""
        return self._trust.on_change(callback)

    def is_revoked(self, workload_id: str) -> bool:
        """Whether the workload has been revoked, and a certificate of it has not ended."""
        return workload_id in self.bundle.revoked

    @property
    def roots_pem(self) -> bytes:
        """The trusted roots, for clients to pin."""
        return ca.pem(self._authority.state.trusted)

    # -- servers

    @property
    def own_certificate_expires(self) -> float | None:
        """When the control plane's own certificate ends, seconds since the epoch; None before the first one."""
        leaf = self._own.leaf
        return None if leaf is None else leaf.expires

    @property
    def own_workload_id(self) -> str:
        """Which workload the control plane itself is."""
        return "" if self._own.leaf is None else self._own.leaf.workload_id

    def enrolment_credentials(self) -> grpc.ServerCredentials:
        """For the enrolment port: the server alone shows a certificate."""
        return self._own.enrolment_credentials()

    def mesh_credentials(self) -> grpc.ServerCredentials:
        """For the mesh port: both sides show one."""
        return self._own.mesh_credentials()

    # -- certificates and join tokens

    @property
    def issuance(self) -> Issuance:
        """What signs certificates of others."""
        if self._issuance is None:
            raise RuntimeError("the certificate authority is not open")
        return self._issuance

    async def create_token(self, service: str, ttl: float, uses: int, created_by: str) -> CreatedToken:
        """Makes a join token; see `Issuance.create_token`."""
        return await self.issuance.create_token(service, ttl, uses, created_by)

    async def tokens(self) -> list[TokenRecord]:
        """Join tokens that have neither ended nor been revoked.

        Raises:
            StoreUnavailableError: the store failed.
        """
        return await self._store.tokens(self._clock())

    async def revoke_token(self, token_id: str) -> bool:
        """Makes a join token worthless; False for an unknown one.

        Raises:
            StoreUnavailableError: the store failed.
        """
        return await self._store.revoke_token(token_id)

    async def note(self, caller: Caller, chain: list[x509.Certificate]) -> None:
        """Remembers which certificate somebody uses; it may be from elsewhere: another control plane, or files.

        Args:
            caller: whom the certificate names.
            chain: the leaf first.

        Raises:
            StoreUnavailableError: the store failed.
        """
        leaf = chain[0]
        serial = f"{leaf.serial_number:x}"
        if self._noted.get(caller.workload_id) == serial:
            return
        root = ca.root_of(chain, self._authority.state.trusted)
        attested_by = "operator" if caller.is_operator else "certificate"
        await self._store.note(
            WorkloadRecord(
                caller.workload_id, caller.spiffe_id, serial, ca.expires(leaf), root, attested_by, seen_root=root
            )
        )
        if len(self._noted) >= MAX_NOTED:
            self._noted.clear()
        self._noted[caller.workload_id] = serial

    async def confirm(self, workload_id: str, bundle: TrustBundle) -> None:
        """Remembers that a workload has the bundle in force.

        Raises:
            StoreUnavailableError: the store failed.
        """
        await self._store.confirm(workload_id, bundle.version, bundle.fingerprints)

    # -- operators

    async def create_operator(self, name: str, directory: Path, *, lifetime: float = DEFAULT_LIFETIME) -> OperatorFiles:
        """Makes an operator's credentials, see `operators.create_operator`; for a CA that is in memory too.

        Raises:
            ConfigError: files cannot be written, or the lifetime is not allowed.
            InvalidValueError: the name is not allowed.
            IssuerNotValidError: nothing can be signed now.
            StoreUnavailableError: the store failed.
        """
        files, workload = write_operator(
            self._authority.state, self.trust_domain, name, directory, now=self._clock(), lifetime=lifetime
        )
        await self._store.note(workload)
        return files

    async def status(self) -> AuthorityStatus:
        """What operators are shown.

        Raises:
            StoreUnavailableError: the store failed.
        """
        now = self._clock()
        workloads = await self._store.workloads(now)
        return AuthorityStatus(
            self._authority.state,
            self._authority.kind,
            self.bundle,
            tuple(workloads),
            tuple(self._dependents(workloads, now)),
        )

    async def add_root(self) -> None:
        """Makes a next root and has everybody trust it.

        Raises:
            RotationRefusedError: a rotation is under way.
            OSError: it cannot be stored.
        """
        async with self._changing:
            now = self._clock()
            self._authority.add(now)
            await self._refresh(now)

    async def overlap(self, *, force: bool = False) -> None:
        """Signs by the next root.

        Raises:
            RotationRefusedError: there is none, or workloads would be cut off.
            StoreUnavailableError: the store failed.
            OSError: it cannot be stored.
        """
        async with self._changing:
            now = self._clock()
            self._authority.overlap(now, self._dependents(await self._store.workloads(now), now), force=force)
            await self._refresh(now)

    async def retire(self, *, force: bool = False) -> None:
        """Trusts the signing root alone.

        Raises:
            RotationRefusedError: there is no other one, or workloads would be cut off.
            StoreUnavailableError: the store failed.
            OSError: it cannot be stored.
        """
        async with self._changing:
            now = self._clock()
            self._authority.retire(self._dependents(await self._store.workloads(now), now), force=force)
            await self._refresh(now)

    async def revoke(self, *, workload_id: str = "", service: str = "") -> list[str]:
        """Revokes one workload, or all of a service that exist now; their ids.

        Raises:
            InvalidValueError: the service's name is none.
            StoreUnavailableError: the store failed.
        """
        async with self._changing:
            now = self._clock()
            if service:
                spiffe_id = Principal.service(self.trust_domain, service).spiffe_id
                found = await self._store.revoke("spiffe_id", spiffe_id, now)
            else:
                found = await self._store.revoke("id", workload_id, now)
            await self._trust.publish(self._authority.state, now)
        return found

    # -- within

    async def _record_others(self) -> None:
        """What `mesh operator create` signed, which only its own standard error tells of."""
        found = await self._store.unrecorded()
        for workload in found:
            record_stored(workload)
        if found:
            await self._store.recorded(workload.id for workload in found)

    def _warn_of_end(self, now: float) -> None:
        """Says once a day that the issuer comes to its end, which is too late for one that is replaced by itself."""
        left = self._authority.state.issuer.expires - now
        if left < WARN and abs(now - self._warned_at) >= 86_400.0:
            self._warned_at = now
            _log.log(
                logging.ERROR if left < WARN_LOUDLY else logging.WARNING,
                "certificates can be signed for another %.1f days only: %s",
                max(0.0, left) / 86_400.0,
                self._authority.remedy,
            )

    def _in_force(self) -> InForce:
        state = self._authority.state
        return InForce(state.issuer, state.trusted, self.bundle)

    def _dependents(self, workloads: list[WorkloadRecord], now: float) -> list[Dependent]:
        """Operators are left out: who has the CA's files makes their credentials anew, and nothing stands still."""
        return [
            Dependent(each.id, each.spiffe_id, frozenset({each.root, each.seen_root} - {""}), each.trusted)
            for each in workloads
            if not each.revoked and each.expires > now and Principal.parse(each.spiffe_id).kind is not Kind.OPERATOR
        ]

    async def _refresh(self, now: float) -> None:
        """Has own certificate, bundle and files follow what is in force. One that fails does not stop the others.

        Raises:
            MeshError: something could not be done.
            OSError: a file could not be written.
        """
        problems: list[MeshError | OSError] = []
        state = self._authority.state
        try:
            self._own.refresh(state.issuer, state.trusted, now)
        except MeshError as error:
            problems.append(error)
        try:
            await self._trust.publish(state, now)
        except MeshError as error:
            problems.append(error)
        try:
            self._trust.write(state)
        except (MeshError, OSError) as error:
            problems.append(error)
        if problems:
            raise problems[0]

    def _choose(self, options: IdentityOptions) -> Authority:
        if options.ca_certificate is None or options.ca_key is None or options.ca_roots is None:
            return OwnAuthority(self._directory, options.trust_domain)
        return GivenAuthority(options.ca_certificate, options.ca_key, options.ca_roots)

    async def _maintain(self) -> None:
        interval = min(30.0, max(0.1, self.options.leaf_lifetime / 20))
        while True:
            await asyncio.sleep(interval)
            try:
                await self.maintain()
            except (MeshError, OSError) as error:
                _log.error("the certificate authority cannot do its work: %s", error)
            except Exception:
                # Whatever it is: certificates have to be renewed.
                _log.exception("the certificate authority cannot do its work")
