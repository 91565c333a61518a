"""Who of several gateways leads, without Consul and without a clock; then several of them against a model of Consul."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from random import Random

import pytest

from gateway.election_state import Ask, Election, Question, Role
from mesh_client.core.errors import InvalidTransitionError, InvalidValueError

TTL = 10.0


def asked(election: Election, now: float, ask: Ask) -> Question:
    question = election.question(now)
    assert question is not None
    assert question.ask is ask
    return question


def leading(now: float = 0.0) -> Election:
    election = Election(TTL, now)
    asked(election, now, Ask.CREATE)
    election.created("mine")
    asked(election, now, Ask.LOOK)
    election.looked("", "", now)
    asked(election, now, Ask.ACQUIRE)
    election.acquired(now, taken=True)
    return election


def standing_by(now: float = 0.0) -> Election:
    election = Election(TTL, now)
    asked(election, now, Ask.CREATE)
    election.created("mine")
    asked(election, now, Ask.LOOK)
    election.looked("theirs", "edge-2", now)
    return election


def test_it_is_undecided_until_consul_has_said_who_holds_the_lock() -> None:
    election = Election(TTL, 0.0)
    assert election.role(0.0) is Role.UNDECIDED
    asked(election, 0.0, Ask.CREATE)
    assert election.deadline() is None
    assert election.question(1.0) is None
    election.created("mine")
    assert (election.role(0.0), election.session) == (Role.UNDECIDED, "mine")


def test_a_lock_that_nobody_holds_is_taken() -> None:
    election = leading()
    assert election.role(0.0) is Role.LEADER
    assert election.role(0.0).pushes


def test_a_lock_that_another_holds_is_looked_at_again_and_again() -> None:
    election = standing_by()
    assert election.role(0.0) is Role.STANDBY
    assert not election.role(0.0).pushes
    assert election.holder == "edge-2"
    assert election.deadline() == 1.0
    assert election.question(0.9) is None
    asked(election, 1.0, Ask.LOOK)
    election.looked("", "", 1.0)
    assert election.holder == ""
    asked(election, 1.0, Ask.ACQUIRE)
    election.acquired(1.0, taken=False)  # within the lock's delay, or another one was quicker
    assert election.role(1.0) is Role.STANDBY
    asked(election, 2.0, Ask.LOOK)


def test_a_session_is_renewed_three_times_as_often_as_it_must_be_and_the_lock_looked_at_each_time() -> None:
    election = leading()
    assert election.deadline() == pytest.approx(TTL / 3)
    asked(election, 3.5, Ask.RENEW)
    election.renewed(alive=True)
    asked(election, 3.5, Ask.LOOK)
    election.looked("mine", "edge-1", 3.6)
    assert election.role(3.6) is Role.LEADER
    assert election.deadline() == pytest.approx(3.5 + TTL / 3)


def test_whoever_lost_the_lock_stands_by() -> None:
    election = leading()
    asked(election, 3.5, Ask.RENEW)
    election.renewed(alive=True)
    asked(election, 3.5, Ask.LOOK)
    election.looked("theirs", "edge-2", 3.6)
    assert election.role(3.6) is Role.STANDBY


def test_a_session_that_has_ended_is_made_anew() -> None:
    election = leading()
    asked(election, 3.5, Ask.RENEW)
    election.renewed(alive=False)
    assert election.role(3.5) is Role.STANDBY
    asked(election, 3.5, Ask.CREATE)


@pytest.mark.parametrize("election", [Election(TTL, 0.0), leading(), standing_by()], ids=["new", "leader", "standby"])
def test_whoever_cannot_ask_for_a_ttl_acts_alone_until_consul_is_back(election: Election) -> None:
    before = election.role(0.0)
    for second in range(4, 11):
        assert election.question(float(second)) is not None
        election.failed("Consul cannot be asked", float(second))
        assert election.role(float(second)) is (before if second < TTL else Role.ALONE)
    assert election.trouble == "Consul cannot be asked"
    assert election.role(10.0).pushes
    assert election.deadline() == 11.0
    while (question := election.question(11.0)) is not None:
        if question.ask is Ask.CREATE:
            election.created("new")
        elif question.ask is Ask.RENEW:
            election.renewed(alive=True)
        else:
            election.looked("theirs", "edge-2", 11.0)
    assert (election.role(11.0), election.trouble) == (Role.STANDBY, "")


def test_a_leader_asks_soon_again_after_a_failure() -> None:
    election = leading()
    asked(election, 3.5, Ask.RENEW)
    election.failed("500", 3.6)
    assert election.role(3.6) is Role.LEADER
    assert election.deadline() == 4.6


def test_answers_to_what_was_not_asked_are_refused_and_change_nothing() -> None:
    election = Election(TTL, 0.0)
    with pytest.raises(InvalidTransitionError, match="create was not asked"):
        election.created("mine")
    with pytest.raises(InvalidTransitionError, match="nothing was not asked|was not asked"):
        election.failed("no", 0.0)
    asked(election, 0.0, Ask.CREATE)
    with pytest.raises(InvalidTransitionError, match="look was not asked"):
        election.looked("", "", 0.0)
    election.created("mine")
    assert election.session == "mine"


@pytest.mark.parametrize("ttl", [9.9, 86_401.0, float("nan")])
def test_a_ttl_that_consul_does_not_allow_is_refused(ttl: float) -> None:
    with pytest.raises(InvalidValueError, match="ttl"):
        Election(ttl, 0.0)


@dataclass
class ModelConsul:
    """Sessions with a TTL, and one lock. A session ends up to a TTL later than it may, as Consul's do."""

    rng: Random
    ends: dict[str, float] = field(default_factory=dict)
    holder: str = ""
    delayed_until: float = 0.0
    ids: itertools.count[int] = field(default_factory=itertools.count)

    def advance(self, now: float) -> None:
        for session in [name for name, end in self.ends.items() if end <= now]:
            del self.ends[session]
            if session == self.holder:
                self.holder, self.delayed_until = "", now + 1.0

    def end(self, now: float) -> float:
        return now + TTL * (1 + self.rng.random())

    def answer(self, question: Question, election: Election, now: float) -> None:
        if question.ask is Ask.CREATE:
            session = f"s{next(self.ids)}"
            self.ends[session] = self.end(now)
            election.created(session)
        elif question.ask is Ask.RENEW:
            alive = question.session in self.ends
            if alive:
                self.ends[question.session] = self.end(now)
            election.renewed(alive=alive)
        elif question.ask is Ask.LOOK:
            election.looked(self.holder, self.holder, now)
        else:
            may = question.session in self.ends and self.holder in ("", question.session) and now >= self.delayed_until
            if may:
                self.holder = question.session
            election.acquired(now, taken=may)


@pytest.mark.parametrize("seed", range(20))
def test_one_leads_while_consul_answers_and_somebody_pushes_at_all_times_but_the_sessions(seed: int) -> None:
    rng = Random(seed)
    consul = ModelConsul(rng)
    gateways: dict[int, Election] = {number: Election(TTL, 0.0) for number in range(3)}
    nobody_since, down_until, dead_until = 0.0, -1.0, dict.fromkeys(gateways, -1.0)
    for tick in range(6_000):
        now = tick / 10
        consul.advance(now)
        if now > down_until + 60 and rng.random() < 0.002:
            down_until = now + rng.uniform(1.0, 40.0)
        for number in gateways:
            if now > dead_until[number] + 60 and rng.random() < 0.002:  # killed, and started again some time later
                dead_until[number] = now + rng.uniform(1.0, 40.0)
                gateways[number] = Election(TTL, dead_until[number])
        alive = [election for number, election in gateways.items() if now >= dead_until[number]]
        for election in alive:
            while (question := election.question(now)) is not None:
                if now < down_until:
                    election.failed("down", now)
                else:
                    consul.answer(question, election, now)
        roles = [election.role(now) for election in alive]
        assert roles.count(Role.LEADER) <= 1
        if now > down_until + 2.0:
            assert Role.ALONE not in roles
        if any(role.pushes for role in roles) or not alive:
            nobody_since = now
        # A session's end, the lock's delay, and a look; twice, for who takes over may die at once.
        assert now - nobody_since < 2 * (2 * TTL + 3.0)
