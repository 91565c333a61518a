"""When certificates are renewed, how often that is tried, what is warned of."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_client.core.errors import InvalidValueError
from mesh_client.core.renewal import (
    BACKDATE,
    JITTER,
    LATEST,
    ROTATION_SPREAD,
    Level,
    Renewal,
    Validity,
    in_words,
    level,
    retry_delay,
    warning,
)

DAY = 86_400.0
ISSUED = 1_000_000.0
CERTIFICATE = Validity(ISSUED - BACKDATE, ISSUED + DAY)
seeds = st.integers(0, 2**32)


def test_a_certificate_that_ends_before_it_begins_is_none() -> None:
    with pytest.raises(InvalidValueError, match="after not_before"):
        Validity(10.0, 10.0)


@given(seeds, st.floats(10.0, 30 * DAY))
def test_a_renewal_is_due_at_two_thirds_of_life_or_a_little_earlier(seed: int, life: float) -> None:
    renewal = Renewal(Validity(500.0 - BACKDATE, 500.0 + life), 7.0, Random(seed), fresh=False)
    wait = renewal.wait(500.0, 7.0)
    assert (LATEST - JITTER) * life - 1e-3 <= wait <= LATEST * life + 1e-3
    assert renewal.wait(500.0 + wait + 1e-3, 7.0) == 0.0


def test_a_certificate_that_lives_shorter_than_it_is_dated_back_is_taken_as_it_is() -> None:
    assert Validity(100.0, 130.0).life == 30.0


def test_workloads_that_started_together_do_not_renew_together() -> None:
    rng = Random(1)
    waits = {round(Renewal(CERTIFICATE, 0.0, rng, fresh=True).wait(ISSUED, 0.0)) for _ in range(100)}
    assert len(waits) > 90
    assert max(waits) - min(waits) > 0.9 * JITTER * DAY


@pytest.mark.parametrize("wrong", [-3.0 * DAY, 0.0])
def test_a_fresh_certificate_is_renewed_in_time_though_the_clock_is_wrong_or_stands_still(wrong: float) -> None:
    renewal = Renewal(CERTIFICATE, 100.0, Random(2), fresh=True)
    now = ISSUED + wrong
    assert renewal.wait(now, 100.0) > 0.0
    assert renewal.wait(now, 100.0 + LATEST * DAY) == 0.0


def test_of_a_stored_certificate_only_the_time_of_day_says_how_old_it_is() -> None:
    renewal = Renewal(CERTIFICATE, 100.0, Random(2), fresh=False)
    assert renewal.wait(ISSUED, 100.0 + 10 * DAY) > 0.0


@given(seeds)
def test_when_another_root_signs_a_renewal_is_due_soon_at_a_random_time(seed: int) -> None:
    renewal = Renewal(CERTIFICATE, 0.0, Random(seed), fresh=True)
    renewal.hasten(50.0)
    assert 0.0 <= renewal.wait(ISSUED, 50.0) <= ROTATION_SPREAD


@given(seeds)
def test_short_lives_leave_less_time_for_that(seed: int) -> None:
    renewal = Renewal(Validity(-BACKDATE, 20.0), 0.0, Random(seed), fresh=True)
    renewal.hasten(1.0)
    assert renewal.wait(0.0, 1.0) <= 2.0


def test_hastening_never_delays() -> None:
    renewal = Renewal(CERTIFICATE, 0.0, Random(3), fresh=True)
    renewal.hasten(0.0)
    soon = renewal.wait(ISSUED, 0.0)
    renewal.hasten(1_000.0)
    assert renewal.wait(ISSUED, 0.0) == soon


@given(st.integers(1, 1_000), st.booleans(), seeds)
def test_attempts_come_slower_and_slower_but_never_in_a_loop(failures: int, refused: bool, seed: int) -> None:
    least, most = (5.0, 300.0) if refused else (0.5, 15.0)
    delay = retry_delay(failures, Random(seed), refused=refused)
    bound = min(most, least * 2.0 ** (failures - 1))
    assert bound / 2 <= delay <= bound


def test_there_is_no_delay_without_a_failure() -> None:
    with pytest.raises(InvalidValueError, match="1 or more"):
        retry_delay(0, Random(1), refused=False)


@pytest.mark.parametrize(
    ("age", "failing", "expected"),
    [
        (-61 / DAY, False, Level.NOT_YET),
        (-61 / DAY, True, Level.NOT_YET),
        (-1 / DAY, True, Level.FINE),
        (0.0, True, Level.FINE),
        (0.49, True, Level.FINE),
        (0.5, True, Level.EARLY),
        (0.67, True, Level.DUE),
        (0.84, True, Level.LATE),
        (0.96, True, Level.LAST),
        (0.96, False, Level.FINE),
        (1.0, True, Level.EXPIRED),
        (1.0, False, Level.EXPIRED),
    ],
)
def test_warnings_grow_as_the_end_comes_near_and_nothing_renews(age: float, failing: bool, expected: Level) -> None:
    assert level(CERTIFICATE, ISSUED + age * DAY, failing=failing) is expected


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-1.0, "0 s"),
        (0.9, "0 s"),
        (119.0, "119 s"),
        (120.0, "2 min"),
        (7199.0, "119 min"),
        (7200.0, "2 h"),
        (2 * DAY - 1, "47 h"),
        (2 * DAY, "2 days"),
        (30 * DAY, "30 days"),
    ],
)
def test_spans_of_time_are_told_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


@pytest.mark.parametrize(
    ("reached", "now", "words"),
    [
        (Level.FINE, ISSUED, ""),
        (Level.EARLY, ISSUED + DAY / 2, "the certificate expires in 12 h and cannot be renewed: refused"),
        (
            Level.NOT_YET,
            ISSUED - 600.0,
            "the certificate is valid in 9 min by this host's clock, which is probably behind",
        ),
        (
            Level.EXPIRED,
            ISSUED + DAY + 60.0,
            "the certificate expired 60 s ago and nobody accepts it; it is not renewed: refused",
        ),
    ],
)
def test_operators_are_told_what_is_wrong(reached: Level, now: float, words: str) -> None:
    assert warning(CERTIFICATE, reached, now, "refused") == words
