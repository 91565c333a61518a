"""A certificate authority that was given as files: an intermediate of a root whose key is elsewhere.

The files are read again when they change, and what they ask for is done as soon as it cuts nobody off: a root that they
have in addition is trusted at once; an issuer below another root signs once everybody trusts that root; a root that
they have no more is trusted until nobody depends on it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from cryptography import x509

from control_plane.files import read_public, read_secret
from control_plane.identity import ca
from control_plane.identity.authority_state import AuthorityState
from control_plane.identity.errors import RotationRefusedError
from control_plane.identity.rotation import Dependent, Rotation
from mesh_client.core.errors import ConfigError

_log = logging.getLogger(__name__)


class GivenAuthority:
    """Follows the files.

    Args:
        certificate: PEM: the intermediate, then those between it and its root.
        key: PEM: its key, 0600.
        roots: PEM: the roots to trust.
    """

    kind = "intermediate"
    remedy = "have a new intermediate signed, and replace the files"

    def __init__(self, certificate: Path, key: Path, roots: Path) -> None:
        self._certificate = certificate
        self._key = key
        self._roots = roots
        self._seen: tuple[tuple[int, ...], ...] = ()
        self._state: AuthorityState | None = None
        self._wanted: AuthorityState | None = None
        self._said = ""

    @property
    def state(self) -> AuthorityState:
        """What is in force."""
        if self._state is None:
            raise RuntimeError("the certificate authority is not open")
        return self._state

    def open(self, now: float, remembered: Sequence[x509.Certificate]) -> None:
        """Reads the files.

        Raises:
            ConfigError: they are broken, unsafe or missing, or do not belong together.
        """
        self._seen = self._marks()
        wanted = self._read(now)
        kept = [root for root in remembered if root not in wanted.trusted and ca.expires(root) > now]
        self._wanted = wanted
        self._state = AuthorityState((*kept, *wanted.trusted), wanted.issuer)

    def tick(self, now: float) -> None:
        """Reads the files again when they changed; roots that they have in addition are trusted from then on.

        Raises:
            ConfigError: they are broken; what was read before stays in force.
        """
        marks = self._marks()
        if marks == self._seen:
            return
        self._seen = marks
        # Only what is complete and fits together replaces anything.
        wanted = self._read(now)
        state = self.state
        more = [root for root in wanted.trusted if root not in state.trusted]
        self._wanted = wanted
        self._state = AuthorityState((*state.trusted, *more), state.issuer)
        _log.info("the files of the CA have changed and are read again: %d roots", len(wanted.trusted))

    @property
    def pending(self) -> bool:
        """Whether what the files ask for is not in force yet."""
        state, wanted = self.state, self._wanted
        return wanted is not None and (
            wanted.issuer.certificate != state.issuer.certificate or set(wanted.trusted) != set(state.trusted)
        )

    def follow(self, dependents: Sequence[Dependent]) -> None:
        """Goes over to the issuer of the files, and drops roots that they have no more, if that cuts nobody off."""
        for step in (self._go_over, self._drop):
            try:
                step(dependents, force=False)
            except RotationRefusedError as error:
                self._say(str(error))
                return
        self._said = ""

    def add(self, now: float) -> None:
        """Not from here.

        Raises:
            RotationRefusedError: always.
        """
        del now
        raise RotationRefusedError(f"the CA is given as files: add the new root to {self._roots}")

    def overlap(self, now: float, dependents: Sequence[Dependent], *, force: bool) -> None:
        """Signs by the issuer of the files.

        Raises:
            RotationRefusedError: it signs already, or workloads would be cut off.
        """
        del now
        if not self._go_over(dependents, force=force):
            raise RotationRefusedError(
                f"the CA is given as files, and their issuer signs already: replace {self._certificate} and {self._key}"
            )

    def retire(self, dependents: Iterable[Dependent], *, force: bool) -> None:
        """Trusts the roots of the files alone.

        Raises:
            RotationRefusedError: no other one is trusted, or workloads would be cut off.
        """
        if not self._drop(list(dependents), force=force):
            raise RotationRefusedError(
                f"the CA is given as files, and no other roots are trusted: remove the old one from {self._roots}"
            )

    def _go_over(self, dependents: Sequence[Dependent], *, force: bool) -> bool:
        state, wanted = self.state, self._wanted
        if wanted is None or wanted.issuer.certificate == state.issuer.certificate:
            return False
        if wanted.signing != state.signing:
            Rotation(state.signing, next=wanted.signing).overlap(dependents, force=force)
        self._state = AuthorityState(state.trusted, wanted.issuer)
        _log.warning("certificates are signed by the new issuer below root %s", wanted.signing[:16])
        return True

    def _drop(self, dependents: Sequence[Dependent], *, force: bool) -> bool:
        state, wanted = self.state, self._wanted
        gone = [] if wanted is None else [root for root in state.trusted if root not in wanted.trusted]
        if not gone:
            return False
        if state.issuer.root in gone:
            raise RotationRefusedError(
                f"the root {state.signing[:16]}, which {self._roots} has no more, signs still: overlap is the next step"
            )
        for root in gone:
            Rotation(state.signing, previous=ca.fingerprint(root)).retire(dependents, force=force)
        self._state = AuthorityState(tuple(root for root in state.trusted if root not in gone), state.issuer)
        _log.warning("not trusted any more: %s", ", ".join(ca.fingerprint(root)[:16] for root in gone))
        return True

    def _read(self, now: float) -> AuthorityState:
        chain = ca.load_certificates(read_public(self._certificate), str(self._certificate))
        key = ca.load_key(read_secret(self._key), str(self._key))
        roots = ca.check_roots(ca.load_certificates(read_public(self._roots), str(self._roots)), now)
        issuer = ca.check_issuer(chain, key, roots)
        if issuer.expires <= now:
            raise ConfigError(f"{self._certificate} has ended: have a new intermediate signed")
        return AuthorityState(roots, issuer)

    def _marks(self) -> tuple[tuple[int, ...], ...]:
        """What changes when the files do."""
        marks: list[tuple[int, ...]] = []
        for path in (self._certificate, self._key, self._roots):
            try:
                found = path.stat()
            except OSError:
                marks.append(())
            else:
                marks.append((found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode))
        return tuple(marks)

    def _say(self, problem: str) -> None:
        """Logs what keeps the files from being followed, once for each."""
        if problem != self._said:
            _log.error("the files of the CA are not followed yet: %s", problem)
        self._said = problem
