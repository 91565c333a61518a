"""Which HTTP requests the dashboard answers at all: pages of others, and other names for it, must not reach it. Pure.

Browsers send a request to wherever a name leads: names that anybody can have lead to the loopback interface
(DNS rebinding), and pages of anybody may send requests to it (CSRF).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass

JSON_TYPE = "application/json"
_LOOPBACK_NAME = "localhost"


def is_loopback(host: str) -> bool:
    """Whether an address, without brackets, is reached from this host alone."""
    if host == _LOOPBACK_NAME:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bracketed(host: str) -> str:
    """The host as it stands in an address with a port."""
    return f"[{host}]" if ":" in host else host


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not answered.

    Attributes:
        status: of HTTP.
        reason: for people.
    """

    status: int
    reason: str


@dataclass(frozen=True, slots=True)
class Doors:
    """What a request must say to be answered.

    Attributes:
        host: where the dashboard listens, without brackets.
        port: likewise.
        secure: whether it speaks TLS, which has the browser check the name.
    """

    host: str
    port: int
    secure: bool

    @property
    def hosts(self) -> frozenset[str] | None:
        """Values of ``Host`` that are answered; None for any.

        Beyond the loopback interface there is TLS, and the name is what the certificate says.
        """
        if not is_loopback(self.host):
            return None
        names = {bracketed(name) for name in (self.host, _LOOPBACK_NAME, "127.0.0.1", "::1")}
        named = {f"{name}:{self.port}" for name in names}
        return frozenset(named | names if self.port == (443 if self.secure else 80) else named)

    def refusal(self, method: str, headers: Mapping[str, str], *, api: bool) -> Refusal | None:
        """Why a request is refused; None for one that is answered.

        Args:
            method: of HTTP.
            headers: by name, whatever the case; the first of each.
            api: whether it asks for more than files that everybody has.
        """
        host = headers.get("Host", "").lower()
        if not host or (self.hosts is not None and host not in self.hosts):
            return Refusal(421, "this is the dashboard of a control plane; open it by the address at which it listens")
        if not api:
            return None if method in ("GET", "HEAD") else Refusal(405, "files are read, not written")
        if headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            return Refusal(403, "pages of other origins may not ask for this")
        origin = f"{'https' if self.secure else 'http'}://{host}"
        if method == "GET":
            return (
                None if headers.get("Origin", origin) == origin else Refusal(403, "pages of other origins may not read")
            )
        if headers.get("Origin") != origin:
            return Refusal(403, "pages of other origins may not change anything")
        if headers.get("Content-Type", "").partition(";")[0].strip().lower() != JSON_TYPE:
            return Refusal(415, f"send {JSON_TYPE}")
        return None
