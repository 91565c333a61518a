"""The log of a process, in this one and, where standard error or the environment matter, in one of its own."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mesh_client.core.errors import ConfigError, InvalidValueError
from mesh_client.core.log_ring import Kept, LogFilter
from mesh_client.logs import ALL, Logs, configure_logs, current_logs, name_logs

log = logging.getLogger("shop.orders")

Configure = Callable[..., Logs]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def written() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def configure(written: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> Iterator[Configure]:
    """`configure_logs`, undone at the end."""
    for name in ("MESH_LOG_LEVEL", "MESH_LOG_FORMAT", "MESH_SERVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("mesh_client.logs._current", None)
    level = logging.getLogger().level

    def made(**options: Any) -> Logs:
        return configure_logs(**{"stream": written, **options})

    yield made
    if (logs := current_logs()) is not None:
        logs.detach()
    logging.getLogger().setLevel(level)
    log.setLevel(logging.NOTSET)


def lines(written: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written.getvalue().splitlines()]


def test_an_event_is_one_line_of_json_with_all_that_it_carries(configure: Configure, written: io.StringIO) -> None:
    configure(service="orders", instance="orders-1")
    log.info("placed %s", "o-1", extra={"order": {"items": 2}})
    log.debug("not at this level")
    (line,) = lines(written)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "logger": "shop.orders",
        "message": "placed o-1",
        "service": "orders",
        "instance": "orders-1",
        "order": {"items": 2},
    }


def test_exceptions_and_stacks_are_in_the_line(configure: Configure, written: io.StringIO) -> None:
    configure()
    try:
        raise LookupError("lost mesh1.eyJpZCI6IjEifQ.abc")
    except LookupError:
        log.exception("went wrong")
    log.info("here", stack_info=True)
    log.handle(logging.makeLogRecord({"name": "x", "levelno": 40, "msg": "told", "exc_text": "Traceback: kept"}))
    first, second, third = lines(written)
    assert first["exception"].startswith("Traceback")
    assert first["exception"].endswith("LookupError: lost [join token removed]")
    assert "test_exceptions_and_stacks_are_in_the_line" in second["exception"]
    assert third["exception"] == "Traceback: kept"


def test_secrets_are_taken_out_of_messages_and_extras(configure: Configure, written: io.StringIO) -> None:
    configure()
    log.warning("got %s", "Bearer abcdefgh1234", extra={"password": "hunter2"})
    (line,) = lines(written)
    assert (line["message"], line["password"]) == ("got Bearer [removed]", "[removed]")


def test_arguments_that_do_not_fit_cost_no_event(configure: Configure, written: io.StringIO) -> None:
    # Handlers of pytest would raise.
    configure().take(logging.makeLogRecord({"name": "shop", "levelno": 20, "msg": "%d items", "args": ("two",)}))
    (line,) = lines(written)
    assert line["message"].startswith("'%d items' with ('two',) (TypeError: ")


def test_an_event_of_a_span_names_it(configure: Configure, written: io.StringIO) -> None:
    trace = pytest.importorskip("opentelemetry.trace")
    configure()
    context = trace.SpanContext(0xABC, 0xDEF, is_remote=False)
    with trace.use_span(trace.NonRecordingSpan(context)):
        log.info("inside")
    log.info("outside")
    inside, outside = lines(written)
    assert (inside["trace_id"], inside["span_id"]) == (f"{0xABC:032x}", f"{0xDEF:016x}")
    assert "trace_id" not in outside


def test_on_a_terminal_it_is_text(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    configure(stream=terminal, service="orders")
    log.info("placed \x1b[31m")
    assert terminal.getvalue().endswith("info     shop.orders: placed \\x1b[31m  service=orders\n")
    monkeypatch.setenv("MESH_LOG_FORMAT", "json")
    configure(stream=terminal)
    log.info("placed")
    assert json.loads(terminal.getvalue().splitlines()[-1])["message"] == "placed"


def test_the_environment_is_obeyed_and_an_argument_overrides_it(
    configure: Configure, written: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESH_LOG_LEVEL", "warning")
    monkeypatch.setenv("MESH_LOG_FORMAT", "text")
    monkeypatch.setenv("MESH_SERVICE", "payments")
    assert configure().service == "payments"
    assert logging.getLogger().level == logging.WARNING
    configure(level="debug", form="json", service="orders")
    log.debug("said")
    assert lines(written)[-1]["service"] == "orders"
    for name in ("MESH_LOG_LEVEL", "MESH_LOG_FORMAT"):
        monkeypatch.setenv(name, "loud")
        with pytest.raises(ConfigError, match=f"{name}: 'loud' is not allowed; expected "):
            configure()
        monkeypatch.delenv(name)


def test_called_again_it_takes_the_place_of_what_it_did_before(configure: Configure, written: io.StringIO) -> None:
    first = configure()
    second = configure(service="orders")
    assert current_logs() is second
    log.info("once")
    assert len(lines(written)) == 1
    assert first.last(10, ALL) == []


def test_who_it_is_of_is_filled_in_unless_it_was_said(configure: Configure) -> None:
    name_logs("nobody has a log yet", "")
    logs = configure(service="orders")
    name_logs("payments", "payments-1")
    name_logs("payments", "payments-2")
    assert (logs.service, logs.instance) == ("orders", "payments-1")


def test_without_output_it_still_remembers(configure: Configure, written: io.StringIO) -> None:
    logs = configure(output=False)
    log.info("kept")
    assert written.getvalue() == ""
    assert [kept.entry.message for kept in logs.last(10, ALL)] == ["kept"]


def test_events_are_remembered_and_can_be_followed_from_any_thread(configure: Configure) -> None:
    logs = configure()
    seen: list[Kept] = []
    log.warning("of the past")
    end = logs.follow(seen.append, last=10, wanted=LogFilter(logger="shop"))
    logging.getLogger("other").info("not wanted")
    thread = threading.Thread(target=lambda: log.info("from a thread"))
    thread.start()
    thread.join()
    end()
    log.info("unseen")
    assert [kept.entry.message for kept in seen] == ["of the past", "from a thread"]
    assert [kept.sequence for kept in seen] == [1, 3]
    assert [kept.entry.message for kept in logs.last(2, ALL)] == ["from a thread", "unseen"]
    assert [kept.entry.message for kept in logs.last(9, ALL, after=3)] == ["unseen"]


def test_a_level_is_another_for_a_while(configure: Configure, written: io.StringIO) -> None:
    logs = configure()
    logs.set_level("shop", logging.DEBUG, 10.0, now=100.0)
    logs.set_level("", logging.ERROR, 20.0, now=100.0)
    log.debug("in detail")
    logging.getLogger("other").warning("not a word")
    assert [line["message"] for line in lines(written)] == ["in detail"]
    assert logs.expire(109.0) == 110.0
    assert logs.expire(110.0) == 120.0
    log.info("not below error now")
    assert logs.expire(120.0) is None
    assert (logging.getLogger("shop").level, logging.getLogger().level) == (logging.NOTSET, logging.INFO)
    assert len(lines(written)) == 1


def test_levels_can_be_reset_and_fall_back_when_another_log_takes_over(configure: Configure) -> None:
    logs = configure()
    logs.set_level("shop", logging.DEBUG, 10.0, now=0.0)
    assert logs.reset_level("shop")
    assert not logs.reset_level("shop")
    logs.set_level("shop", logging.DEBUG, 10.0, now=0.0)
    configure()
    assert logging.getLogger("shop").level == logging.NOTSET
    for name, seconds in (("no such name", 1.0), ("shop", 0.0)):
        with pytest.raises(InvalidValueError):
            logs.set_level(name, logging.DEBUG, seconds, now=0.0)
    assert logging.getLogger("shop").level == logging.NOTSET


def test_a_process_and_its_forks_are_told_apart(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = configure()
    before = logs.process
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert logs.process != before


def test_a_stream_that_is_closed_does_not_stop_the_program(
    configure: Configure, written: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure()
    written.close()
    monkeypatch.setattr(logging, "raiseExceptions", False)
    log.info("nowhere to write")


def test_it_writes_to_standard_error_and_takes_grpcs_log_over_if_asked_to() -> None:
    program = """
import logging, os, mesh_client
mesh_client.configure_logs(service="orders", grpc=True)
logging.getLogger("shop").info("placed")
os.write(2, b"E1130 05:45:23.998911    3071 chttp2.cc:7] out of luck\\n")
"""
    inherited = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    done = subprocess.run([sys.executable, "-c", program], env=inherited, capture_output=True, check=True, timeout=30)
    found = {line["logger"]: line["message"] for line in map(json.loads, done.stderr.decode().splitlines())}
    assert found == {"shop": "placed", "grpc.core": "out of luck (chttp2.cc:7)"}


def test_it_works_without_opentelemetry() -> None:
    program = """
import sys
sys.modules["opentelemetry"] = None
import logging, mesh_client
mesh_client.configure_logs()
logging.info("placed")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=30)
    assert json.loads(done.stderr)["message"] == "placed"
