"""Whom to trust, as it is told to workloads and written for clients to pin."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from cryptography import x509

from control_plane.files import read_public, write_atomically
from control_plane.identity import ca
from control_plane.identity.authority_state import AuthorityState
from control_plane.identity.bundle import TrustBundle
from control_plane.identity.errors import StoreUnavailableError
from control_plane.identity.own_authority import ROOTS_FILE
from control_plane.identity.store import IdentityStore

REVOKED_LONGER = 3600.0
"""Seconds for which workloads stay revoked when their certificates have ended: connections and TLS sessions go on."""


class Trust:
    """Keeps the bundle, and tells whoever listens of each change.

    Args:
        trust_domain: of the mesh.
        directory: of the CA; None for no files.
        store: knows who was revoked.
    """

    def __init__(self, trust_domain: str, directory: Path | None, store: IdentityStore) -> None:
        self._trust_domain = trust_domain
        self._path = None if directory is None else directory / ROOTS_FILE
        self._store = store
        self._bundle: TrustBundle | None = None
        self._callbacks: list[Callable[[], None]] = []

    @property
    def bundle(self) -> TrustBundle:
        """Whom to trust, now."""
        if self._bundle is None:
            raise RuntimeError("the certificate authority is not open")
        return self._bundle

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Has ``callback`` called after each change of the bundle; the returned function ends that."""
        self._callbacks.append(callback)

        def unsubscribe() -> None:
            with contextlib.suppress(ValueError):
                self._callbacks.remove(callback)

        return unsubscribe

    async def publish(self, state: AuthorityState, now: float) -> None:
        """Has the bundle follow.

        Raises:
            StoreUnavailableError: who was revoked cannot be read: what was known of it stays.
        """
        problem: StoreUnavailableError | None = None
        try:
            revoked = await self._store.revoked(now - REVOKED_LONGER)
        except StoreUnavailableError as error:
            if self._bundle is None:
                raise
            revoked, problem = self._bundle.revoked, error
        bundle = TrustBundle.of(self._trust_domain, map(ca.der, state.trusted), state.signing, revoked)
        if bundle != self._bundle:
            self._bundle = bundle
            for callback in list(self._callbacks):
                callback()
        if problem is not None:
            raise problem

    def remembered(self) -> list[x509.Certificate]:
        """The roots that were trusted when the control plane ended.

        Raises:
            ConfigError: their file is damaged, or others may write it.
        """
        if self._path is None or not self._path.exists():
            return []
        return ca.load_certificates(read_public(self._path), str(self._path))

    def write(self, state: AuthorityState) -> None:
        """Has the file of the trusted roots follow.

        Raises:
            ConfigError: others may write it.
            OSError: it cannot be written.
        """
        content = ca.pem(state.trusted)
        if self._path is not None and (not self._path.exists() or read_public(self._path) != content):
            write_atomically(self._path, content, 0o644)
