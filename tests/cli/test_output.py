from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_cli.output import age, console, count, printable, to_json
from tests.cli import samples


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0s"),
        (0.049, "0s"),
        (0.05, "0s"),
        (3.29, "3.2s"),
        (9.99, "9.9s"),
        (10, "10s"),
        (59.9, "59s"),
        (60, "1m00s"),
        (252, "4m12s"),
        (3599.9, "59m59s"),
        (3600, "1h00m"),
        (86_399, "23h59m"),
        (86_400, "1d00h"),
        (400 * 86_400 + 7200, "400d02h"),
    ],
)
def test_ages_are_shown_in_their_two_largest_units(seconds: float, expected: str) -> None:
    assert age(seconds) == expected
    assert age(samples.span(seconds)) == expected


def test_numbers_of_things_are_grammatical() -> None:
    assert [count(number, "endpoint") for number in (0, 1, 2)] == ["0 endpoints", "1 endpoint", "2 endpoints"]
    assert count(2, "policy") == "2 policies"


@given(st.text())
def test_nothing_printable_moves_the_cursor(text: str) -> None:
    assert all(character.isprintable() for character in printable(text) if not character.isspace())
    assert printable(text).splitlines() in ([], [printable(text)]) or "\u2028" in text or "\u2029" in text


def test_what_is_no_control_character_is_shown_as_it_is() -> None:
    assert printable("Zürich 東京 [bold] ✓") == "Zürich 東京 [bold] ✓"


def test_a_pipe_gets_wide_lines_unless_columns_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console().width == 200
    monkeypatch.setenv("COLUMNS", "77")
    assert console(stderr=True).width == 77


def test_json_of_a_policy_leaves_out_what_is_not_set_and_that_of_a_status_does_not() -> None:
    policy = samples.policy({"service": "orders", "timeout": "250ms", "routes": [{"fault": {}}]})
    assert to_json(policy, sparse=True) == {
        "service": "orders",
        "timeout": 0.25,
        "routes": [{"method": "", "fault": {}}],
    }
    status = to_json(samples.quiet_status())
    assert status["clients"] == []
    assert status["removal_hold"] is None
