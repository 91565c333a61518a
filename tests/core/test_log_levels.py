from __future__ import annotations

import pytest

from mesh_client.core.errors import InvalidValueError
from mesh_client.core.log_levels import (
    MAX_OVERRIDES,
    LevelOverrides,
    Restore,
    check_duration,
    check_logger,
)


def test_a_level_falls_back_when_its_time_has_passed() -> None:
    levels = LevelOverrides()
    assert levels.next_expiry() is None
    levels.set("shop", 30, until=10.0)
    levels.set("", 20, until=5.0)
    assert levels.next_expiry() == 5.0
    assert levels.expire(4.9) == ()
    assert levels.expire(5.0) == (Restore("", 20),)
    assert levels.next_expiry() == 10.0
    assert levels.expire(99.0) == (Restore("shop", 30),)
    assert levels.expire(99.0) == ()


def test_one_that_is_set_again_falls_back_to_what_was_configured() -> None:
    levels = LevelOverrides()
    levels.set("shop", 30, until=10.0)
    levels.set("shop", 10, until=20.0)
    assert levels.expire(10.0) == ()
    assert levels.expire(20.0) == (Restore("shop", 30),)


def test_one_can_be_reset_before_its_time() -> None:
    levels = LevelOverrides()
    levels.set("shop", 0, until=10.0)
    assert levels.reset("shop") == Restore("shop", 0)
    assert levels.reset("shop") is None
    assert levels.next_expiry() is None


def test_there_are_not_many_at_once() -> None:
    levels = LevelOverrides()
    for number in range(MAX_OVERRIDES):
        levels.set(f"shop.{number}", 0, until=10.0)
    levels.set("shop.0", 10, until=20.0)
    with pytest.raises(InvalidValueError, match="at most 100"):
        levels.set("one.more", 0, until=10.0)


@pytest.mark.parametrize("name", ["", "shop", "shop.v1.Orders-2", "x" * 200])
def test_names_of_loggers_are_taken(name: str) -> None:
    assert check_logger(name) == name


@pytest.mark.parametrize("name", ["a b", "a\n", "x" * 201, "\x1b[0m", "é"])
def test_what_no_logger_is_called_is_refused(name: str) -> None:
    with pytest.raises(InvalidValueError, match="printable"):
        check_logger(name)


@pytest.mark.parametrize("seconds", [0.0, -1.0, 86_401.0, float("nan"), float("inf")])
def test_a_time_out_of_range_is_refused(seconds: float) -> None:
    with pytest.raises(InvalidValueError, match="24 hours"):
        check_duration(seconds)
    assert check_duration(600.0) == 600.0
