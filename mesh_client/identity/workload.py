"""A workload's identity: gets its certificate, keeps it fresh, follows the trust bundle, and says when it cannot."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from random import Random

import grpc
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.timestamp_pb2 import Timestamp
from mesh.v1 import certificate_pb2

from mesh_client.core.errors import IdentityError
from mesh_client.core.identity import DEFAULT_TRUST_DOMAIN, Principal
from mesh_client.core.renewal import Level, Renewal, RetryDelay, in_words, level, retry_delay, warning
from mesh_client.identity import IdentityState, PemCredentials, certificates
from mesh_client.identity.authority_client import AuthorityClient, EveryoneFailedError
from mesh_client.identity.bundle_watch import BundleWatch
from mesh_client.identity.certificates import Credential, TrustBundle
from mesh_client.identity.confirmation import Applied, Confirmation
from mesh_client.identity.enrolment import RefusedError, clock_warning
from mesh_client.identity.settings import IdentitySettings
from mesh_client.identity.store import IdentityStore
from mesh_client.tasks import end_tasks, in_thread
from mesh_client.transport import MutualTls

log = logging.getLogger(__name__)

READY_TIMEOUT = 30.0
"""Seconds that `WorkloadIdentity.ready` waits for a certificate."""
LOOK = 30.0
"""Seconds between looks at the clock, which may jump, and at what there is to warn of."""


class WorkloadIdentity:
    """The identity of one process for one service. One task keeps its certificate, another follows the trust bundle.

    Args:
        settings: how it proves who it is.
        rng: draws jitter and waits; by default seeded by the system.
        clock: time of day, seconds since the epoch; for tests.
        retry: how long to wait after failures; for tests.
    """

    def __init__(
        self,
        settings: IdentitySettings,
        *,
        rng: Random | None = None,
        clock: Callable[[], float] = time.time,
        retry: RetryDelay = retry_delay,
    ) -> None:
        self._settings = settings
        self._rng = rng or Random()
        self._clock = clock
        self._retry = retry
        self._authority = AuthorityClient(settings, self._rng)
        self._transport = MutualTls(self)
        self._watch = BundleWatch(
            settings.control_planes, self._transport, self._in_force, self._apply, self._followed, self._rng
        )
        self._confirmation = Confirmation(self._watch.restate)
        self._store = (
            IdentityStore(settings.identity_dir, settings.service, settings.trust_domain)
            if settings.identity_dir is not None
            else None
        )
        self._principal = Principal.service(settings.trust_domain or DEFAULT_TRUST_DOMAIN, settings.service)
        self._key: ec.EllipticCurvePrivateKey | None = None
        self._credential: Credential | None = None
        self._bundle: TrustBundle | None = None
        self._root = ""
        """Fingerprint of the trusted root that the certificate leads up to; empty when there is none any more."""
        self._renewal: Renewal | None = None
        self._generation = 0
        self._channel_credentials: grpc.ChannelCredentials | None = None
        self._configuration: grpc.ServerCertificateConfiguration | None = None
        self._failures = 0
        self._refused = False
        self._renewal_error = ""
        self._watch_error = ""
        self._level = Level.FINE
        self._callbacks: list[Callable[[], None]] = []
        self._changes: set[asyncio.Future[None]] = set()
        self._wake = asyncio.Event()
        self._starting = asyncio.Lock()
        self._changing = asyncio.Lock()
        """Held while a certificate or a trust bundle is saved and put in force."""
        self._saving: asyncio.Future[None] | None = None
        self._users = 0
        self._tasks: list[asyncio.Task[None]] = []

    # -- what others see

    @property
    def principal(self) -> Principal:
        """Who it is, or means to be while there is no certificate."""
        return self._principal

    @property
    def generation(self) -> int:
        """0 before the first certificate; grows with each new certificate or set of roots."""
        return self._generation

    @property
    def problem(self) -> str:
        """Why there is no certificate; empty when there is one, even if it has expired."""
        if self._credential is not None:
            return ""
        return f"{self._principal} has no certificate yet: {self._renewal_error or 'the control plane has been asked'}"

    @property
    def failing(self) -> bool:
        """Whether there is no certificate, and every control plane has been asked once."""
        return self._credential is None and self._failures > 0

    @property
    def revoked(self) -> frozenset[str]:
        """Ids of revoked workloads."""
        return frozenset() if self._bundle is None else self._bundle.revoked

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls back when anything of the above has changed. Returns what ends that."""
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    def confirm_after(self, applied: Applied) -> Callable[[], None]:
        """Trust bundles are acknowledged once this has returned as well. Returns what ends that."""
        return self._confirmation.after(applied)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For channels from now on.

        Raises:
            IdentityError: there is no certificate.
        """
        if self._channel_credentials is None:
            raise IdentityError(self.problem)
        return self._channel_credentials

    def server_configuration(self) -> grpc.ServerCertificateConfiguration:
        """For handshakes from now on. May be called from any thread.

        Raises:
            IdentityError: there is no certificate.
        """
        configuration = self._configuration
        if configuration is None:
            raise IdentityError(self.problem)
        return configuration

    def pem(self) -> PemCredentials:
        """For programs that speak in this workload's name.

        Raises:
            IdentityError: there is no certificate.
        """
        credential, bundle = self._credential, self._bundle
        if credential is None or bundle is None:
            raise IdentityError(self.problem)
        return PemCredentials(credential.chain_pem, credential.key, certificates.to_pem(bundle.roots))

    def state(self, now: float) -> IdentityState:
        """In plain data."""
        credential, bundle = self._credential, self._bundle
        error = self._renewal_error or self._watch_error
        if credential is None or bundle is None:
            return IdentityState(self._principal.spiffe_id, last_error=error, warning=self.problem)
        return IdentityState(
            self._principal.spiffe_id,
            credential.workload_id,
            credential.serial,
            credential.validity.not_after,
            self._root,
            bundle.version,
            error,
            self._warning(credential, self._level_of(credential, now), now),
        )

    def describe(self, now: float) -> str:
        """In a few words, for explanations of failed calls."""
        credential = self._credential
        if credential is None:
            return self.problem
        warned = self._warning(credential, self._level_of(credential, now), now)
        return warned or f"certificate valid for {in_words(credential.validity.not_after - now)}"

    async def ready(self) -> None:
        """Returns once there is a certificate.

        Raises:
            IdentityError: there was none within `READY_TIMEOUT`, or every control plane refused.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READY_TIMEOUT):
                while self._credential is None and not (self._failures and self._refused):
                    change = asyncio.get_running_loop().create_future()
                    self._changes.add(change)
                    await change
        if self._credential is None:
            raise IdentityError(self.problem)

    # -- life

    async def start(self) -> None:
        """Begins to get a certificate and to keep it fresh. Each start is matched by one `stop`.

        Raises:
            ConfigError: its files are unsafe, another's, or used by another process; or there is nothing to join with.
        """
        async with self._starting:
            if self._users == 0:
                await self._start()
            self._users += 1

    async def stop(self) -> None:
        """Ends what `start` began; the last one ends the tasks."""
        async with self._starting:
            self._users -= 1
            if self._users == 0:
                await self._stop()

    async def _start(self) -> None:
        try:
            if self._store is not None:
                await in_thread(self._store.open)
                self._restore(await asyncio.to_thread(self._store.load))
            if self._credential is None:
                await self._authority.check_attestation()
                if self._bundle is None:
                    self._principal = Principal.service(await self._authority.trust_domain(), self._settings.service)
        except BaseException:
            if self._store is not None:
                self._store.close()
            raise
        name = f"identity of {self._settings.service}"
        self._tasks = [asyncio.create_task(self._keep(), name=name)]
        if self._credential is not None:
            self._follow()

    async def _stop(self) -> None:
        self._confirmation.stop()
        await end_tasks(*self._tasks)
        self._tasks = []
        if self._saving is not None:
            await asyncio.gather(self._saving, return_exceptions=True)
        if self._store is not None:
            self._store.close()

    def _follow(self) -> None:
        if len(self._tasks) == 1:
            self._tasks.append(asyncio.create_task(self._watch.run(), name=f"trust of {self._settings.service}"))
        else:
            self._watch.reopen()

    def _restore(self, stored: tuple[Credential, TrustBundle] | None) -> None:
        if stored is None:
            return
        credential, bundle = stored
        self._principal, self._bundle = credential.principal, bundle
        if credential.validity.expired(self._clock()):
            log.warning("the stored certificate of %s has expired; joining again", credential.principal)
            return
        self._use(credential, bundle, fresh=False)
        self._confirmation.begin(bundle.version)

    # -- the certificate

    async def _keep(self) -> None:
        while True:
            self._speak()
            wait = self._due()
            if wait > 0.0:
                await self._sleep(wait)
                continue
            try:
                await self._obtain()
            except IdentityError as error:
                await asyncio.sleep(self._failed(error))
            except Exception as error:
                # A defect of ours. To stop renewing would be worse than to try again.
                log.exception("getting a certificate for %s failed", self._principal)
                await asyncio.sleep(self._failed(IdentityError(type(error).__name__)))

    def _due(self) -> float:
        credential, now = self._credential, self._clock()
        if credential is None or self._renewal is None or credential.validity.expired(now):
            return 0.0
        return self._renewal.wait(now, time.monotonic())

    async def _sleep(self, wait: float) -> None:
        """Until a renewal is due, but no longer than it takes to see a jump of the clock or a reason to warn."""
        life = self._credential.validity.life if self._credential else LOOK
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(wait, LOOK, life / 20)):
                await self._wake.wait()

    async def _obtain(self) -> None:
        """Renews while the certificate held can prove who this is, joins otherwise."""
        # The same key until there is a certificate for it: should an answer get lost, the token is not spent twice.
        key = self._key = self._key or certificates.new_key()
        request, old, before = certificates.signing_request(key), self._credential, self._bundle
        if old is not None and self._root and not old.validity.expired(self._clock()):
            answer, how = await self._authority.renew(request, self._transport), "renewed"
        else:
            answer = await self._authority.join(request, self._principal.trust_domain, self._bundle)
            how = "joined"
        async with self._changing:
            bundle = TrustBundle.from_proto(answer.trust_bundle)
            if self._bundle is not None and self._bundle is not before:
                bundle = self._bundle  # It came while the answer was on its way, and is newer.
            credential = certificates.accept(
                certificates.key_to_pem(key), tuple(answer.certificate_chain), bundle, self._principal
            )
            self._key = None
            self._failures, self._refused, self._renewal_error = 0, False, ""
            await self._save(credential, bundle)  # First: the token may be spent.
            self._use(credential, bundle, fresh=True)
        left = in_words(credential.validity.not_after - self._clock())
        which = f"workload {credential.workload_id}, serial {credential.serial}"
        log.info("%s: %s as %s, for %s", self._principal, how, which, left)
        if trouble := clock_warning(credential.chain[0], self._clock()):
            log.warning("%s: %s; certificates are judged by the clock", self._principal, trouble)
        self._changed()
        self._confirmation.begin(bundle.version)
        self._follow()

    def _failed(self, error: IdentityError) -> float:
        """Seconds to wait before the next attempt."""
        self._failures += 1
        self._refused = error.refused if isinstance(error, EveryoneFailedError) else isinstance(error, RefusedError)
        if str(error) != self._renewal_error:
            self._renewal_error = str(error)
            log.warning("%s gets no certificate: %s", self._principal, error)
        self._changed()
        delay = self._retry(self._failures, self._rng, refused=self._refused)
        return max(delay, error.delay) if isinstance(error, EveryoneFailedError) else delay

    def _use(self, credential: Credential, bundle: TrustBundle, *, fresh: bool) -> None:
        """From now on new connections show this certificate and trust this bundle."""
        self._credential, self._bundle = credential, bundle
        self._renewal = Renewal(credential.validity, time.monotonic(), self._rng, fresh=fresh)
        self._hasten_if_rotated(credential, bundle)
        self._make_credentials(credential, bundle)

    def _make_credentials(self, credential: Credential, bundle: TrustBundle) -> None:
        roots = certificates.to_pem(bundle.roots)
        self._channel_credentials = grpc.ssl_channel_credentials(roots, credential.key, credential.chain_pem)
        self._configuration = grpc.ssl_server_certificate_configuration([(credential.key, credential.chain_pem)], roots)
        self._generation += 1

    def _hasten_if_rotated(self, credential: Credential, bundle: TrustBundle) -> None:
        self._root = credential.root_in(bundle)
        if self._renewal is not None and bundle.signing_root and self._root != bundle.signing_root:
            log.info("%s: another root signs now; renewing soon", self._principal)
            self._renewal.hasten(time.monotonic())
            self._wake.set()

    # -- the trust bundle

    def _in_force(self) -> certificate_pb2.WatchTrustBundleRequest:
        request = certificate_pb2.WatchTrustBundleRequest(version=self._confirmation.version)
        if self._credential is not None:
            expires = Timestamp()
            expires.FromNanoseconds(round(self._credential.validity.not_after * 1e9))
            request.certificate_expires.CopyFrom(expires)
        return request

    async def _apply(self, bundle: TrustBundle) -> None:
        """Puts a bundle in force, on disk as well, before it is acknowledged.

        Raises:
            IdentityError: it is another mesh's.
        """
        if bundle.trust_domain != self._principal.trust_domain:
            raise IdentityError(f"the trust bundle is for {bundle.trust_domain}, not {self._principal.trust_domain}")
        async with self._changing:
            old, credential = self._bundle, self._credential
            if bundle == old or old is None or credential is None:
                self._confirmation.begin(bundle.version)
                return
            self._bundle = bundle
            if set(bundle.roots) != set(old.roots):
                log.info("%s: %d trusted roots now, version %s", self._principal, len(bundle.roots), bundle.version)
                self._make_credentials(credential, bundle)
            self._hasten_if_rotated(credential, bundle)
            self._changed()
            await self._save(credential, bundle)
            self._confirmation.begin(bundle.version)

    def _followed(self, error: str) -> None:
        if error != self._watch_error:
            self._watch_error = error
            if error:
                log.warning("%s cannot follow the trust bundle: %s", self._principal, error)
            self._speak()
            self._changed()

    async def _save(self, credential: Credential, bundle: TrustBundle) -> None:
        if self._store is None:
            return
        self._saving = asyncio.ensure_future(asyncio.to_thread(self._store.save, credential, bundle))
        try:
            await asyncio.shield(self._saving)
        except OSError as error:
            log.error("the identity cannot be saved in %s: %s", self._store.directory, error.strerror)

    # -- warnings

    def _level_of(self, credential: Credential, now: float) -> Level:
        return level(credential.validity, now, failing=bool(self._renewal_error or self._watch_error))

    def _speak(self) -> None:
        """Logs what there is to warn of, once per level."""
        credential = self._credential
        if credential is None:
            return
        now = self._clock()
        reached = self._level_of(credential, now)
        if reached > self._level:
            severity = logging.WARNING if reached < Level.LATE else logging.ERROR
            log.log(severity, "%s: %s", self._principal, self._warning(credential, reached, now))
        elif reached is Level.FINE and self._level is not Level.FINE:
            log.info("%s: its certificate is renewed again", self._principal)
        if reached is not self._level:
            self._level = reached
            self._changed()

    def _warning(self, credential: Credential, reached: Level, now: float) -> str:
        why = self._renewal_error or self._watch_error or "not tried yet"
        return warning(credential.validity, reached, now, why)

    def _changed(self) -> None:
        changes, self._changes = self._changes, set()
        for change in changes:
            if not change.done():
                change.set_result(None)
        for callback in tuple(self._callbacks):
            try:
                callback()
            except Exception:
                log.exception("what follows the identity of %s failed", self._principal)
