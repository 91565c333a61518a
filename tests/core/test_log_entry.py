from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh_client.core.errors import InvalidValueError
from mesh_client.core.log_entry import (
    MAX_EXCEPTION,
    MAX_FIELDS,
    MAX_MESSAGE,
    LogEntry,
    check_level,
    clipped,
    level_name,
    level_step,
    plain,
    plain_fields,
    to_json,
    to_object,
    to_text,
)
from mesh_client.core.scrub import REMOVED

ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=6,
)


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no")


def entry(**options: Any) -> LogEntry:
    return LogEntry(**{"time": 1_764_000_000.25, "level": 20, "logger": "shop", "message": "placed", **options})


def test_the_line_has_the_fields_in_their_order_and_leaves_empty_ones_out() -> None:
    assert to_json(entry(), "", "") == (
        '{"time": "2025-11-24T16:00:00.250Z", "level": "info", "logger": "shop", "message": "placed"}'
    )
    full = entry(trace_id="0" * 31 + "1", span_id="0" * 15 + "2", fields={"order": 1}, exception="Traceback")
    assert list(to_object(full, "orders", "orders-1")) == [
        *("time", "level", "logger", "message", "service", "instance", "trace_id", "span_id", "order", "exception")
    ]


@settings(max_examples=50)
@given(st.text(), st.dictionaries(st.text(), ANYTHING, max_size=3))
def test_whatever_is_logged_is_one_line_of_ascii_json(message: str, extra: dict[str, Any]) -> None:
    line = to_json(entry(message=message, fields=plain_fields(extra)), "orders", "orders-1")
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["message"] == message


@given(st.text(), st.text())
def test_text_for_people_cannot_command_a_terminal(message: str, value: str) -> None:
    text = to_text(entry(message=message, fields={"value": value}), "", "")
    assert "\n" not in text
    assert not any(character in text for character in "\x1b\x07\r\x00\u202e")


def test_text_for_people_has_fields_behind_the_message_and_the_traceback_below() -> None:
    text = to_text(entry(fields={"order": "o-1", "items": 2}, exception="Traceback:\n  here"), "orders", "orders-1")
    assert text == (
        "2025-11-24T16:00:00.250Z info     shop: placed  service=orders instance=orders-1 order=o-1 items=2\n"
        "Traceback:\n  here"
    )
    assert to_text(entry(), "", "").endswith("shop: placed")


def test_fields_never_take_the_place_of_an_events_own() -> None:
    made = to_object(entry(fields=plain_fields({"message": "other", "service": "x"})), "orders", "")
    assert (made["message"], made["service"]) == ("placed", "orders")
    assert (made["extra_message"], made["extra_service"]) == ("other", "x")


def test_secrets_are_taken_out_of_fields_at_any_depth() -> None:
    extra = {
        "password": "hunter2",
        "request": {"headers": {"authorization": "Bearer abcdef123456", "x": ["Bearer abcdef123456"]}},
    }
    assert plain_fields(extra) == {
        "password": REMOVED,
        "request": {"headers": {"authorization": REMOVED, "x": [f"Bearer {REMOVED}"]}},
    }


def test_what_json_does_not_know_becomes_text() -> None:
    assert plain({1: {2, 3} - {3}, "b": b"x", "nan": float("nan"), "u": Unprintable(), "t": (1, None)}) == {
        "1": [2],
        "b": "b'x'",
        "nan": "nan",
        "u": "<Unprintable that cannot be shown: RuntimeError>",
        "t": [1, None],
    }
    assert plain(1 << 5000) == "<integer of 5001 bits>"


def test_depth_and_number_are_bounded() -> None:
    deep: Any = 1
    for _ in range(100):
        deep = [deep]
    assert len(json.dumps(plain(deep))) < 250
    assert len(json.dumps(plain(list(range(100_000))))) < 2_000
    assert len(json.dumps(plain({str(number): 1 for number in range(100_000)}))) < 3_000


def test_what_is_kept_is_cut() -> None:
    assert clipped(entry(message="half \ud800")).message == "half \\ud800"
    small = entry(fields={"a": 1}, exception="x")
    assert clipped(small) is small
    assert entry(fields={"a": ["bc", 1]}).size() - entry().size() == 21
    large = clipped(entry(message="m" * 100_000, exception="e" * 100_000, fields={"a": "f" * 100_000, "b": 1}))
    assert len(large.message) < MAX_MESSAGE + 100
    assert large.message.endswith("(91808 more characters)")
    assert len(large.exception) < MAX_EXCEPTION + 100
    assert large.fields == {"cut": "a, b"}
    assert large.size() < MAX_MESSAGE + MAX_EXCEPTION + MAX_FIELDS + 500


@pytest.mark.parametrize(
    ("number", "name"), [(0, "debug"), (10, "debug"), (20, "info"), (25, "info"), (50, "critical"), (99, "critical")]
)
def test_every_level_has_a_name(number: int, name: str) -> None:
    assert level_name(number) == name


def test_levels_are_known_by_name() -> None:
    assert check_level("WARNING") == 30
    with pytest.raises(InvalidValueError, match="debug, info"):
        check_level("loud")


@pytest.mark.parametrize(("number", "step"), [(0, 1), (10, 1), (25, 2), (30, 3), (50, 5), (99, 5)])
def test_levels_are_steps_from_debug_to_critical(number: int, step: int) -> None:
    assert level_step(number) == step
