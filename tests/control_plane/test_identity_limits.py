"""How often somebody may ask."""

from __future__ import annotations

import pytest

from control_plane.identity import limits
from control_plane.identity.limits import CallerLimits, StreamLimits, address_of


def test_each_caller_has_a_bucket_of_its_own() -> None:
    made = CallerLimits(2.0, 3)
    assert [made.take("a", 0.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert made.take("b", 0.0) == 0.0
    assert made.take("a", 0.5) == 0.0


def test_callers_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_CALLERS", 2)
    made = CallerLimits(1.0, 1)
    for caller in ("a", "b", "a", "c"):
        made.take(caller, 0.0)
    assert made.take("a", 0.0) > 0.0  # asked last before c
    assert made.take("b", 0.0) == 0.0  # forgotten


def test_streams_are_counted_while_they_are_open() -> None:
    made = StreamLimits(1)
    with made.admit("a") as first, made.admit("a") as second, made.admit("b") as other:
        assert (first, second, other) == (True, False, True)
    with made.admit("a") as again:
        assert again


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.0.0.1:4711", "10.0.0.1"),
        ("ipv6:[2001:db8:1:2:3:4:5:6]:4711", "2001:db8:1:2::/64"),
        ("ipv6:%5B2001:db8:1:2::9%5D:80", "2001:db8:1:2::/64"),
        ("ipv6:[fe80::1%eth0]:80", "fe80::/64"),
        ("ipv6:[::ffff:10.0.0.1]:80", "10.0.0.1"),
        ("ipv4:nonsense:1", "ipv4:nonsense:1"),
        ("unix:/run/x", "unix:/run/x"),
        ("unix:" + "x" * 200, "unix:" + "x" * 95),
    ],
)
def test_a_peer_is_counted_by_its_address(peer: str, address: str) -> None:
    assert address_of(peer) == address
