"""One-time codes and sessions: good once and for a minute, and for twelve hours; never longer than the certificate."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from control_plane.dashboard.sessions import (
    CODE_LIFETIME,
    MAX_CODES,
    MAX_SESSIONS,
    SESSION_LIFETIME,
    Identity,
    Session,
    Sessions,
    TooManyCodesError,
)
from mesh_client.core.caller import Caller
from mesh_client.core.identity import Principal

FOREVER = 1e12


def operator(name: str = "alice", number: int = 1, expires: float = FOREVER) -> Identity:
    return Identity(Caller(Principal.operator("mesh.internal", name), f"{number:016x}"), b"certificate", expires)


ALICE = operator()


def test_a_code_is_exchanged_once_for_a_session() -> None:
    sessions = Sessions()
    sessions.issue("code", ALICE, 0.0)
    assert sessions.find("key", 0.0) is None
    assert sessions.redeem("code", "key", 1.0) == Session(ALICE, 1.0 + SESSION_LIFETIME)
    assert sessions.redeem("code", "other", 1.0) is None
    assert sessions.find("key", SESSION_LIFETIME) is not None
    assert sessions.find("key", 1.0 + SESSION_LIFETIME) is None
    assert sessions.find("other", 1.0) is None


@pytest.mark.parametrize("code", ["", "cod", "\ud800", "code "])
def test_what_is_no_code_is_worth_nothing(code: str) -> None:
    sessions = Sessions()
    sessions.issue("code", ALICE, 0.0)
    assert sessions.redeem(code, "key", 0.0) is None
    assert sessions.redeem("code", "key", 0.0) is not None


def test_a_code_expires_and_one_that_expired_stays_worth_nothing() -> None:
    sessions = Sessions()
    sessions.issue("code", ALICE, 0.0)
    assert sessions.redeem("code", "key", CODE_LIFETIME) is None
    assert sessions.redeem("code", "key", 0.0) is None


def test_no_session_outlasts_the_operators_certificate() -> None:
    sessions = Sessions()
    sessions.issue("code", operator(expires=100.0), 0.0)
    assert sessions.redeem("code", "key", 0.0) == Session(operator(expires=100.0), 100.0)
    assert sessions.find("key", 100.0) is None


def test_codes_and_sessions_are_bounded() -> None:
    sessions = Sessions()
    for number in range(MAX_CODES):
        sessions.issue(f"{number}", ALICE, 0.0)
    with pytest.raises(TooManyCodesError, match="100 links to the dashboard"):
        sessions.issue("more", ALICE, CODE_LIFETIME - 1.0)
    sessions.issue("later", ALICE, CODE_LIFETIME)
    for number in range(MAX_SESSIONS + 1):
        at = 100.0 + number
        sessions.issue("code", ALICE, at)
        assert sessions.redeem("code", f"key {number}", at) is not None
    assert len(sessions.kept) == MAX_SESSIONS
    assert sessions.find("key 0", 300.0) is None
    assert sessions.find("key 1", 300.0) is not None


def test_a_session_is_ended_once() -> None:
    sessions = Sessions()
    sessions.issue("code", ALICE, 0.0)
    sessions.redeem("code", "key", 0.0)
    assert sessions.end("key")
    assert not sessions.end("key")
    assert sessions.find("key", 0.0) is None


def test_stored_sessions_hold_no_key_and_go_on_unless_they_have_ended_or_claim_too_much() -> None:
    first = Sessions()
    first.issue("code", ALICE, 0.0)
    first.redeem("code", "key", 0.0)
    assert "key" not in first.kept
    (hashed,) = first.kept
    again = Sessions()
    again.restore({**first.kept, "ended": Session(ALICE, 5.0), "endless": Session(ALICE, 6.0 + SESSION_LIFETIME)}, 5.0)
    assert set(again.kept) == {hashed}
    assert again.find("key", 5.0) == Session(ALICE, SESSION_LIFETIME)


class Model(RuleBasedStateMachine):
    """Whatever happens in whatever order: a code is worth one session, and what has ended is worth nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.sessions = Sessions()
        self.now = 0.0
        self.codes: dict[str, float] = {}
        self.alive: dict[str, float] = {}
        self.made = 0

    @rule(by=st.floats(0.0, SESSION_LIFETIME / 3))
    def time_passes(self, by: float) -> None:
        self.now += by

    @rule()
    def a_link_is_made(self) -> None:
        self.made += 1
        if sum(end > self.now for end in self.codes.values()) < MAX_CODES:
            self.sessions.issue(f"code {self.made}", ALICE, self.now)
            self.codes[f"code {self.made}"] = self.now + CODE_LIFETIME

    @rule(data=st.data())
    def a_link_is_opened(self, data: Any) -> None:
        code = data.draw(st.sampled_from([*self.codes, "none"]))
        ends = self.codes.pop(code, 0.0)
        key = f"key of {code} at {self.now}"
        assert (self.sessions.redeem(code, key, self.now) is not None) == (ends > self.now)
        if ends > self.now:
            self.alive[key] = self.now + SESSION_LIFETIME

    @rule(data=st.data())
    def somebody_signs_out(self, data: Any) -> None:
        if self.alive:
            key = data.draw(st.sampled_from(list(self.alive)))
            self.sessions.end(key)
            del self.alive[key]

    @invariant()
    def exactly_the_living_are_found(self) -> None:
        assert all(
            (self.sessions.find(key, self.now) is not None) == (end > self.now) for key, end in self.alive.items()
        )
        assert len(self.sessions.kept) <= MAX_SESSIONS


TestModel = Model.TestCase
