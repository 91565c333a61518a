"""How often somebody may ask for certificates."""

from __future__ import annotations

import ipaddress
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from mesh_client.core.rate_limit import TokenBucket

MAX_CALLERS = 10_000
"""Callers that are remembered: past that, the one that asked longest ago is forgotten."""


class CallerLimits:
    """A token bucket for each caller.

    Args:
        rate: requests a second on average, above 0.
        burst: requests at once, 1 or more.
    """

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = burst
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def take(self, caller: str, now: float) -> float:
        """0.0 when the request is admitted, else seconds until one would be."""
        bucket = self._buckets.get(caller)
        if bucket is None:
            bucket = self._buckets[caller] = TokenBucket(self._rate, self._burst, now)
            if len(self._buckets) > MAX_CALLERS:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(caller)
        return bucket.take(now)


class StreamLimits:
    """How many streams each caller may have open.

    Args:
        most: for each caller.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: Counter[str] = Counter()

    @contextmanager
    def admit(self, caller: str) -> Iterator[bool]:
        """Whether one more may be open, within the block."""
        if self._open[caller] >= self._most:
            yield False
            return
        self._open[caller] += 1
        try:
            yield True
        finally:
            self._open[caller] -= 1
            if not self._open[caller]:
                del self._open[caller]


def address_of(peer: str) -> str:
    """Whom a peer as gRPC names it, such as ``ipv4:10.0.0.1:4711``, is counted as: its address without the port.

    IPv6 addresses are counted by their /64, for whoever has one of them mostly has all.
    """
    family, _, rest = peer.replace("%5B", "[").replace("%5D", "]").partition(":")
    if family not in {"ipv4", "ipv6"}:
        return peer[:100]
    host = rest.rpartition(":")[0].removeprefix("[").removesuffix("]").partition("%")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return peer[:100]
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
