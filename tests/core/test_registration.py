from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from mesh_client.core.errors import ConfigError, InvalidTransitionError
from mesh_client.core.registration import (
    WAITS,
    Registration,
    RegistrationState,
    RegistrationStatus,
    SelfCheckRecord,
    Verdict,
)


def make(*addresses: str, seed: int = 1) -> Registration:
    return Registration(addresses or ("a:1",), Random(seed), 100.0)


def fail_when_due(machine: Registration, now: float, *, refused: bool = False) -> tuple[str, float, float]:
    """The address tried, the time of it, and the wait that follows."""
    now += machine.wait(now)
    address = machine.attempt(now)
    machine.failed(now, "refused" if refused else "unreachable", refused=refused)
    return address, now, machine.wait(now)


def registered(machine: Registration, now: float = 100.0) -> Registration:
    machine.attempt(now)
    machine.confirmed(now)
    return machine


def test_registration_without_an_address_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="host:port"):
        Registration((), Random(1), 0.0)


def test_first_attempt_is_due_at_once() -> None:
    machine = make()
    assert machine.wait(100.0) == 0.0
    assert machine.attempt(100.0) == "a:1"
    assert machine.state is RegistrationState.ATTEMPTING


def test_confirmation_is_news_once() -> None:
    machine = make()
    machine.attempt(100.0)
    assert machine.confirmed(101.0)
    assert not machine.confirmed(102.0)
    assert machine.status() == RegistrationStatus(RegistrationState.REGISTERED, "a:1", 101.0, 0, "")


def test_failures_go_through_the_addresses_in_turn() -> None:
    machine = make("a:1", "b:2", "c:3")
    now = 100.0
    tried = []
    for _ in range(7):
        address, now, _ = fail_when_due(machine, now)
        tried.append(address)
    assert tried == ["a:1", "b:2", "c:3", "a:1", "b:2", "c:3", "a:1"]


def test_waits_grow_with_each_round_and_stay_below_their_bound() -> None:
    for seed in range(50):
        machine = make("a:1", "b:2", seed=seed)
        now = 100.0
        for failure in range(30):
            _, now, wait = fail_when_due(machine, now)
            assert 0.0 <= wait <= min(WAITS.max, WAITS.initial * 2.0 ** (failure // 2))


def test_waits_are_jittered() -> None:
    assert len({fail_when_due(make(seed=seed), 100.0)[2] for seed in range(20)}) == 20


def test_a_refusal_is_waited_out_long() -> None:
    for seed in range(50):
        wait = fail_when_due(make(seed=seed), 100.0, refused=True)[2]
        assert WAITS.max / 2 <= wait <= WAITS.max


def test_backoff_starts_anew_only_after_a_confirmation() -> None:
    machine = make()
    now = 100.0
    for _ in range(10):
        _, now, _ = fail_when_due(machine, now)
    assert machine.status().failures == 10
    assert machine.status().detail == "unreachable"
    now += machine.wait(now)
    registered(machine, now)
    machine.failed(now, "stream broke")
    assert machine.wait(now) <= WAITS.initial
    assert machine.status() == RegistrationStatus(RegistrationState.WAITING, "a:1", now, 1, "stream broke")


def test_wait_counts_down() -> None:
    machine = make()
    _, now, wait = fail_when_due(machine, 100.0)
    assert machine.wait(now + wait / 2) == pytest.approx(wait / 2)
    assert machine.wait(now + wait + 1.0) == 0.0


def test_an_attempt_before_it_is_due_changes_nothing() -> None:
    machine = make()
    _, now, _ = fail_when_due(machine, 100.0, refused=True)
    before = machine.status()
    with pytest.raises(InvalidTransitionError, match="due in"):
        machine.attempt(now)
    assert machine.status() == before


def test_leaving_keeps_what_is_registered_until_the_registry_confirms() -> None:
    machine = registered(make())
    machine.leave(110.0)
    assert machine.state is RegistrationState.LEAVING
    assert not machine.confirmed(111.0)
    machine.leave(112.0)
    assert machine.status().since == 110.0
    machine.left(113.0)
    assert machine.state is RegistrationState.GONE
    machine.left(114.0)
    machine.leave(114.0)
    assert machine.status().since == 113.0


def test_a_registration_that_breaks_while_leaving_is_not_renewed() -> None:
    machine = registered(make())
    machine.leave(110.0)
    machine.failed(111.0, "stream broke")
    assert machine.status() == RegistrationStatus(RegistrationState.GONE, "a:1", 111.0, 0, "stream broke")


@pytest.mark.parametrize("attempting", [False, True])
def test_leaving_before_it_was_registered_gives_up(attempting: bool) -> None:
    machine = make()
    if attempting:
        machine.attempt(100.0)
    machine.leave(101.0)
    assert machine.state is RegistrationState.GONE
    with pytest.raises(InvalidTransitionError):
        machine.wait(101.0)


@pytest.mark.parametrize(
    "event",
    [
        lambda machine: machine.confirmed(101.0),
        lambda machine: machine.failed(101.0, "why"),
        lambda machine: machine.left(101.0),
    ],
    ids=["confirmed", "failed", "left"],
)
def test_an_event_that_does_not_fit_changes_nothing(event: Callable[[Registration], object]) -> None:
    machine = make()
    before = machine.status()
    with pytest.raises(InvalidTransitionError, match="waiting"):
        event(machine)
    assert machine.status() == before


def test_a_server_is_not_well_before_its_first_check() -> None:
    assert SelfCheckRecord().verdict == Verdict(False, "not checked yet")


def test_the_servers_own_word_counts_at_once() -> None:
    record = SelfCheckRecord()
    assert record.answered(True, "fine") == Verdict(True, "fine")
    assert record.answered(False, "no database") == Verdict(False, "no database")
    assert record.verdict == Verdict(False, "no database")


def test_one_unanswered_check_decides_nothing_and_two_in_a_row_do() -> None:
    record = SelfCheckRecord()
    record.answered(True, "fine")
    assert record.unanswered("timeout") is None
    assert record.verdict.healthy
    record.answered(True, "fine")
    assert record.unanswered("timeout") is None
    assert record.unanswered("timeout again") == Verdict(False, "timeout again")
    assert record.answered(True, "fine").healthy
