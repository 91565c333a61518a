"""What gRPC's C core writes to standard error, and which of it is worth a record: failed TLS handshakes above all.

The core refuses handshakes by itself and tells nobody but its log. Lines are those of grpcio 1.85 (absl, BoringSSL).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mesh_client.core.rate_limit import TokenBucket

TOLD_PER_SECOND, TOLD_AT_ONCE = 1.0, 20
"""Failed handshakes for one reason that are recorded, on average and at once: strangers must not fill the log."""

MAX_REASONS = 50
"""Reasons that are told apart; all further ones count as one."""

_LINE = re.compile(r"(?P<severity>[IWEF])\d{4} \d\d:\d\d:\d\d\.\d+\s+\d+ (?P<where>[\w.-]+:\d+)\] (?P<text>.*)")
_HANDSHAKE = re.compile(r"Handshake failed with error SSL_ERROR_\w+: error:\w+:[^:]*:\w+:(?P<reason>.+)")
_ABOUT_ITSELF = "is not suitable for production"
"""In what the core says of the level at which it was asked to log."""

_MEANINGS = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the other side showed no certificate",
    "WRONG_VERSION_NUMBER": "the other side speaks plaintext, not TLS",
    "HTTP_REQUEST": "the other side speaks plaintext HTTP, not TLS",
    "CERTIFICATE_VERIFY_FAILED": "the other side's certificate was refused",
    "TLSV1_ALERT_UNKNOWN_CA": "the other side refused this process's certificate: it trusts another authority",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the other side refused this process's certificate",
    "TLSV1_ALERT_PROTOCOL_VERSION": "the other side speaks no TLS version that is allowed here",
    "UNSUPPORTED_PROTOCOL": "the other side speaks no TLS version that is allowed here",
    "NO_SHARED_CIPHER": "the other side knows no cipher that is allowed here",
}
_NOISE = "Invalid certificate verification context"
"""What BoringSSL adds where no certificate was looked at."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the core's log."""

    severity: str
    """I, W, E or F, as absl has them."""
    where: str
    """Source file and line."""
    text: str

    @property
    def is_about_itself(self) -> bool:
        """Whether it only says that this much is logged."""
        return _ABOUT_ITSELF in self.text


def parse(line: str) -> Line | None:
    """The line's parts; None when the core did not write it."""
    match = _LINE.fullmatch(line)
    return None if match is None else Line(match["severity"], match["where"], match["text"])


def handshake(line: Line) -> str | None:
    """Why a handshake failed, in words; None when the line is about something else."""
    match = _HANDSHAKE.fullmatch(line.text)
    if match is None:
        return None
    name, _, more = match["reason"].partition(": ")
    meaning = _MEANINGS.get(name, name)
    return meaning if not more or more == _NOISE else f"{meaning}: {more}"


class Handshakes:
    """Bounds how many failed handshakes are recorded, reason by reason."""

    def __init__(self) -> None:
        self._reasons: dict[str, tuple[TokenBucket, list[int]]] = {}

    def record(self, reason: str, now: float) -> str | None:
        """What to record of one that failed for this reason at ``now`` (seconds, monotonic); None for nothing."""
        if reason not in self._reasons and len(self._reasons) >= MAX_REASONS:
            reason = "other reasons"
        bucket, untold = self._reasons.setdefault(reason, (TokenBucket(TOLD_PER_SECOND, TOLD_AT_ONCE, now), [0]))
        if bucket.take(now):
            untold[0] += 1
            return None
        more, untold[0] = untold[0], 0
        return f"a TLS handshake failed: {reason}" + (f" ({more} more since the last record)" if more else "")
