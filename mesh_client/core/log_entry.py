"""One event of a log as a value: without secrets, and in the two forms that logs are written in."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice

from mesh_client.core.errors import InvalidValueError
from mesh_client.core.scrub import REMOVED, names_secret, scrub

Json = dict[str, "Json"] | list["Json"] | str | int | float | bool | None

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
"""The levels of Python's `logging` by their names here."""

MAX_LOGGER = 200
MAX_MESSAGE = 8 * 1024
MAX_EXCEPTION = 16 * 1024
MAX_FIELDS = 8 * 1024
"""Characters of one event that are kept and sent to operators. What a process writes itself is not cut."""

_MAX_DEPTH = 6
_MAX_ITEMS = 200
_MAX_BITS = 1_000
"""Python refuses to write much larger integers, and a log must not fail."""
_OWN = frozenset({"time", "level", "logger", "message", "service", "instance", "trace_id", "span_id", "exception"})


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One event.

    Attributes:
        time: seconds since the epoch.
        level: number as `logging` has it.
        logger: name of the logger.
        message: the message.
        trace_id: of the current span, 32 hex digits; empty without one.
        span_id: likewise, 16 hex digits.
        fields: what the caller gave as ``extra``.
        exception: traceback, or stack; empty for none.
    """

    time: float
    level: int
    logger: str
    message: str
    trace_id: str = ""
    span_id: str = ""
    fields: Mapping[str, Json] = field(default_factory=dict)
    exception: str = ""

    def size(self) -> int:
        """About how many characters it takes."""
        return 100 + len(self.logger) + len(self.message) + len(self.exception) + _length(self.fields)


def check_level(name: str) -> int:
    """The number of a level: ``debug``, ``info``, ``warning``, ``error`` or ``critical``, in any case.

    Raises:
        InvalidValueError: there is no such level.
    """
    try:
        return LEVELS[name.lower()]
    except KeyError:
        raise InvalidValueError("log level", name, "debug, info, warning, error or critical") from None


def level_name(level: int) -> str:
    """The name of a level; of one in between, that of the next lower one."""
    return next((name for name, number in reversed(LEVELS.items()) if level >= number), "debug")


def level_step(level: int) -> int:
    """A level from 1, debug, to 5, critical; of one in between, that of the next lower one."""
    return min(max(level // 10, 1), len(LEVELS))


def plain(value: object) -> Json:
    """The value as JSON has it, without secrets, and bounded in depth and number; what JSON does not know as text."""
    return _plain(value, _MAX_DEPTH)


def plain_fields(extra: Mapping[str, object]) -> dict[str, Json]:
    """Fields as they are written: without secrets, and never in place of an event's own, hence ``extra_message``."""
    made: dict[str, Json] = {}
    for name, value in extra.items():
        made[f"extra_{name}" if name in _OWN else name] = REMOVED if names_secret(name) else plain(value)
    return made


def clipped(entry: LogEntry) -> LogEntry:
    """The event with what is too long cut, in text that UTF-8 can hold: for keeping and sending."""
    fields = entry.fields
    if fields and _length(fields) > MAX_FIELDS:
        fields = {"cut": ", ".join(islice(fields, 20))[:MAX_MESSAGE]}
    logger, message = _cut(entry.logger, MAX_LOGGER), _cut(entry.message, MAX_MESSAGE)
    exception = _cut(entry.exception, MAX_EXCEPTION)
    if fields is entry.fields and (logger, message, exception) == (entry.logger, entry.message, entry.exception):
        return entry
    return replace(entry, logger=logger, message=message, exception=exception, fields=fields)


def to_object(entry: LogEntry, service: str, instance: str) -> dict[str, Json]:
    """The event's fields in the order in which they are written. Those that are empty are left out."""
    made: dict[str, Json] = {
        "time": timestamp(entry.time),
        "level": level_name(entry.level),
        "logger": entry.logger,
        "message": entry.message,
    }
    named = {"service": service, "instance": instance, "trace_id": entry.trace_id, "span_id": entry.span_id}
    made.update({name: text for name, text in named.items() if text})
    made.update(entry.fields)
    if entry.exception:
        made["exception"] = entry.exception
    return made


def to_json(entry: LogEntry, service: str, instance: str) -> str:
    """The event as one line of JSON, ASCII alone, without its newline."""
    return json.dumps(to_object(entry, service, instance))


def to_text(entry: LogEntry, service: str, instance: str) -> str:
    """The event for people: one line, and the traceback below it. Nothing in it can command a terminal."""
    made = to_object(entry, service, instance)
    for name in ("time", "level", "logger", "message", "exception"):
        made.pop(name, None)
    head = f"{timestamp(entry.time)} {level_name(entry.level):<8} {entry.logger}: {entry.message}"
    return visible(f"{head}{pairs(made)}", entry.exception)


def pairs(fields: Mapping[str, Json]) -> str:
    """Fields as they stand behind a message; nothing for none."""
    shown = (f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in fields.items())
    return "".join(f"{' ' * (2 if number == 0 else 1)}{pair}" for number, pair in enumerate(shown))


def visible(line: str, exception: str) -> str:
    """One line, and those of a traceback below it, without what could command a terminal."""
    return "\n".join(_visible(each) for each in (line, *exception.splitlines()))


def timestamp(seconds: float) -> str:
    """Seconds since the epoch as RFC 3339 has them, in UTC with milliseconds."""
    return f"{datetime.fromtimestamp(seconds, UTC).isoformat(timespec='milliseconds').removesuffix('+00:00')}Z"


def _plain(value: object, depth: int) -> Json:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if value.bit_length() <= _MAX_BITS else f"<integer of {value.bit_length()} bits>"
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, float):
        return value if abs(value) < float("inf") else str(value)  # JSON has neither infinity nor NaN
    if depth and isinstance(value, Mapping):
        made: dict[str, Json] = {}
        for key, each in islice(value.items(), _MAX_ITEMS):
            name = scrub(_text(key))
            made[name] = REMOVED if names_secret(name) else _plain(each, depth - 1)
        return made
    if depth and isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes | bytearray):
        return [_plain(each, depth - 1) for each in islice(value, _MAX_ITEMS)]
    return scrub(_text(value))


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception as error:
        return f"<{type(value).__name__} that cannot be shown: {type(error).__name__}>"


def _cut(text: str, most: int) -> str:
    if len(text) > most:
        text = f"{text[:most]}... ({len(text) - most} more characters)"
    # Python's strings may hold halves of surrogate pairs.
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


def _length(value: Json | Mapping[str, Json]) -> int:
    """About how many characters a value takes as JSON, for those of `plain`, which are not deep."""
    if isinstance(value, str):
        return len(value) + 2
    if isinstance(value, Mapping):
        return sum(len(name) + 4 + _length(each) for name, each in value.items())
    if isinstance(value, list):
        return sum(2 + _length(each) for each in value)
    return 8


def _visible(text: str) -> str:
    return "".join(_escaped(text))


def _escaped(text: str) -> Iterator[str]:
    for character in text:
        if unicodedata.category(character)[0] == "C" and character != "\t":
            yield character.encode("unicode_escape").decode("ascii")
        else:
            yield character
