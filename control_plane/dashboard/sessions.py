"""Who is signed in to the dashboard: one-time codes, and the sessions that they are exchanged for. Pure.

Codes and keys of sessions are kept as hashes: what is kept is of no use to whoever reads it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from mesh_client.core.caller import Caller

CODE_LIFETIME = 60.0
"""Seconds in which a code can be used."""
SESSION_LIFETIME = 12 * 3600.0
"""Seconds that a session lasts, used or not."""
MAX_CODES, MAX_SESSIONS = 100, 100
"""Codes that wait to be used, and sessions."""


class TooManyCodesError(Exception):
    """More codes wait to be used than may."""


@dataclass(frozen=True, slots=True)
class Identity:
    """An operator, with what proves it.

    Attributes:
        caller: who it is.
        certificate: that of the connection over which the code was asked for, PEM.
        expires: when that ends, seconds since the epoch. No session lasts longer.
    """

    caller: Caller
    certificate: bytes
    expires: float


@dataclass(frozen=True, slots=True)
class Session:
    """One browser.

    Attributes:
        identity: who uses it.
        expires: when it ends, by the clock that ``now`` is of.
    """

    identity: Identity
    expires: float


class Sessions:
    """Codes and sessions of one dashboard. Times are wall-clock times, for sessions outlive the process."""

    def __init__(self) -> None:
        self._codes: dict[str, Session] = {}
        self._sessions: dict[str, Session] = {}

    @property
    def kept(self) -> Mapping[str, Session]:
        """Sessions by the hashes of their keys, to be stored."""
        return self._sessions

    def restore(self, kept: Mapping[str, Session], now: float) -> None:
        """Takes stored sessions over, but for those that have ended or would last too long."""
        self._sessions |= {
            hashed: session for hashed, session in kept.items() if now < session.expires <= now + SESSION_LIFETIME
        }

    def issue(self, code: str, identity: Identity, now: float) -> None:
        """From now on the code can be exchanged, once, for a session of this operator.

        Args:
            code: made up at random by the caller, at least 128 bits.
            identity: who asked for it.
            now: seconds since the epoch.

        Raises:
            TooManyCodesError: others have not been used.
        """
        self._codes = _alive(self._codes, now)
        if len(self._codes) >= MAX_CODES:
            raise TooManyCodesError(
                f"{MAX_CODES} links to the dashboard have been asked for within {CODE_LIFETIME:.0f} s and not been "
                "opened; open one, or wait"
            )
        self._codes[_hashed(code)] = Session(identity, now + CODE_LIFETIME)

    def redeem(self, code: str, key: str, now: float) -> Session | None:
        """Exchanges a code for a session; None for a code that is none, was used, or has expired.

        Of too many sessions the one that would end first ends.

        Args:
            code: as the browser has sent it.
            key: of the session; made up at random by the caller, at least 128 bits.
            now: seconds since the epoch.
        """
        issued = self._codes.pop(_hashed(code), None)
        if issued is None or issued.expires <= now:
            return None
        self._sessions = _alive(self._sessions, now)
        while len(self._sessions) >= MAX_SESSIONS:
            del self._sessions[min(self._sessions, key=lambda each: self._sessions[each].expires)]
        expires = min(now + SESSION_LIFETIME, issued.identity.expires)
        session = self._sessions[_hashed(key)] = Session(issued.identity, expires)
        return session

    def find(self, key: str, now: float) -> Session | None:
        """The session of a key, unless it has ended."""
        session = self._sessions.get(_hashed(key))
        return None if session is None or session.expires <= now else session

    def end(self, key: str) -> bool:
        """Ends a session; whether there was one."""
        return self._sessions.pop(_hashed(key), None) is not None


def _alive(kept: Mapping[str, Session], now: float) -> dict[str, Session]:
    return {hashed: session for hashed, session in kept.items() if session.expires > now}


def _hashed(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
