"""The log of a process: one line an event, JSON or text, without secrets; and what operators ask of it while it runs.

>>> mesh_client.configure_logs(service="orders")
>>> logging.getLogger(__name__).info("order placed", extra={"order_id": "1"})
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, Protocol, TextIO

from mesh_client.core.errors import ConfigError, InvalidValueError
from mesh_client.core.log_entry import LogEntry, check_level, plain_fields, to_json, to_text
from mesh_client.core.log_levels import LevelOverrides, Restore, check_duration, check_logger
from mesh_client.core.log_ring import Kept, LogFilter, LogRing
from mesh_client.core.scrub import scrub

LEVEL_VARIABLE = "MESH_LOG_LEVEL"
FORMAT_VARIABLE = "MESH_LOG_FORMAT"
SERVICE_VARIABLE = "MESH_SERVICE"

Format = Literal["json", "text"]
FORMATS: tuple[Format, ...] = ("json", "text")

Sink = Callable[[Kept], None]
"""Takes an event that is being followed. Called in the thread that logged it; never blocks, never logs."""

ALL = LogFilter()

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class _Span(Protocol):
    """What is needed of an OpenTelemetry span."""

    def get_span_context(self) -> _SpanContext:
        """Its context."""


class _SpanContext(Protocol):
    @property
    def trace_id(self) -> int:
        """128 bits; 0 without a span."""

    @property
    def span_id(self) -> int:
        """64 bits."""


def _no_span() -> _Span | None:
    return None


def _find_current_span() -> Callable[[], _Span | None]:
    """What returns the current span; without OpenTelemetry there never is one."""
    try:
        from opentelemetry.trace import get_current_span
    except ImportError:
        return _no_span
    return get_current_span


class Logs:
    """The log of this process. Made by `configure_logs`; of use to operators through the control plane.

    Attributes:
        service: the service that it is of; filled in by the first server or client of the mesh where it is not given.
        instance: likewise the instance.
    """

    def __init__(self, service: str, instance: str, *, form: Format, stream: TextIO | None) -> None:
        self.service = service
        self.instance = instance
        self._secret = secrets.token_hex(8)
        self._form = form
        self._stream = stream
        self._handler = _Handler(self)
        self._ring = LogRing()
        self._overrides = LevelOverrides()
        self._sinks: dict[object, Sink] = {}
        self._current_span = _find_current_span()

    @property
    def process(self) -> str:
        """Tells this process from others that are called the same, and from its own forks."""
        return f"{self._secret}-{os.getpid()}"

    def name(self, service: str, instance: str) -> None:
        """Fills in what was not given."""
        self.service = self.service or service
        self.instance = self.instance or instance

    def last(self, count: int, wanted: LogFilter, after: int = 0) -> list[Kept]:
        """The newest events that are wanted, at most ``count``, oldest first; none up to sequence ``after``."""
        with self._locked():
            return self._ring.last(count, wanted, after)

    def follow(self, sink: Sink, last: int = 0, wanted: LogFilter = ALL, after: int = 0) -> Callable[[], None]:
        """Has ``sink`` called with the newest events as `last` gives them, and then with every further one.

        None is missing in between, and none comes twice. The returned function ends it.
        """
        key = object()

        def chosen(kept: Kept) -> None:
            if wanted.matches(kept.entry):
                sink(kept)

        with self._locked():
            for kept in self._ring.last(last, wanted, after):
                sink(kept)
            self._sinks = {**self._sinks, key: chosen}

        def end() -> None:
            with self._locked():
                self._sinks = {each: sink for each, sink in self._sinks.items() if each is not key}

        return end

    def set_level(self, logger: str, level: int, seconds: float, now: float) -> None:
        """Gives a logger another level for a while. Whoever calls this calls `expire` when the time has passed.

        Args:
            logger: its name; empty for the root logger.
            level: as a number of `logging`.
            seconds: for how long; at most 24 h.
            now: monotonic seconds.

        Raises:
            InvalidValueError: the name, the time or the number of such loggers is not allowed.
        """
        target = logging.getLogger(check_logger(logger) or None)
        with self._locked():
            self._overrides.set(logger, target.level, now + check_duration(seconds))
        target.setLevel(level)

    def reset_level(self, logger: str) -> bool:
        """Gives a logger back the level that it was configured with; False when it has it."""
        with self._locked():
            restore = self._overrides.reset(logger)
        if restore is not None:
            _restore(restore)
        return restore is not None

    def expire(self, now: float) -> float | None:
        """Lets levels whose time has passed fall back; when the next one is due, monotonic seconds, or None."""
        with self._locked():
            due, following = self._overrides.expire(now), self._overrides.next_expiry()
        for each in due:
            _restore(each)
        return following

    def take(self, record: logging.LogRecord) -> None:
        """Writes, keeps and passes on one record. Called under the handler's lock."""
        entry = self._entry(record)
        if self._stream is not None:
            write = to_json if self._form == "json" else to_text
            self._stream.write(f"{write(entry, self.service, self.instance)}\n")
            self._stream.flush()
        kept = self._ring.append(entry)
        for sink in self._sinks.values():
            sink(kept)

    def close(self) -> None:
        """Ends it: records go elsewhere, or nowhere, and levels are as they were configured again."""
        global _current  # noqa: PLW0603 - see `configure_logs`
        self.detach()
        if _current is self:
            _current = None

    def attach(self) -> None:
        """Begins to take the records of the whole process."""
        logging.getLogger().addHandler(self._handler)

    def detach(self) -> None:
        """Ends that; levels are as they were configured again."""
        logging.getLogger().removeHandler(self._handler)
        self.expire(float("inf"))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # The handler's own lock: `logging` makes it anew in a fork.
        self._handler.acquire()
        try:
            yield
        finally:
            self._handler.release()

    def _entry(self, record: logging.LogRecord) -> LogEntry:
        trace_id, span_id = self._span_ids()
        extra = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if not trace_id and isinstance(known := extra.get("trace_id"), str):
            trace_id = known  # of a call whose span has ended, or that has none
        if trace_id == extra.get("trace_id"):
            del extra["trace_id"]
        return LogEntry(
            record.created,
            record.levelno,
            record.name,
            scrub(_message(record)),
            trace_id,
            span_id,
            plain_fields(extra) if extra else {},
            scrub(_exception(record)) if record.exc_info or record.exc_text or record.stack_info else "",
        )

    def _span_ids(self) -> tuple[str, str]:
        span = self._current_span()
        context = None if span is None else span.get_span_context()
        if context is None or not context.trace_id:
            return "", ""
        return f"{context.trace_id:032x}", f"{context.span_id:016x}"


class _Handler(logging.Handler):
    """Hands records to `Logs`. What goes wrong there is `logging`'s to report, and never the program's."""

    def __init__(self, logs: Logs) -> None:
        super().__init__()
        self._logs = logs

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._logs.take(record)
        except Exception:
            self.handleError(record)


_current: Logs | None = None


def configure_logs(
    *,
    service: str | None = None,
    instance: str = "",
    level: str | None = None,
    form: Format | None = None,
    stream: TextIO | None = None,
    output: bool = True,
    grpc: bool = False,
) -> Logs:
    """Sets the log of this process up: for programs, at their start, not for libraries.

    Every record of `logging` becomes one line with ``time``, ``level``, ``logger``, ``message``, ``service``,
    ``instance``, ``trace_id`` and ``span_id`` of the current OpenTelemetry span, and whatever its ``extra`` has. Join
    tokens, private keys, bearer tokens and what stands under names such as ``password`` are taken out. The last 1000
    are kept in memory too, and operators can read them, follow the log and change levels for a while (``mesh logs``)
    through the control planes that the process is connected to; MESH_OPERATIONS=0 keeps them out.

    Called again, it takes the place of what it did before. Other handlers stay.

    Args:
        service: the service that the process is of; by default MESH_SERVICE, else that of its first server or client.
        instance: its name among others; by default the instance id of its first server.
        level: the lowest that is logged; by default MESH_LOG_LEVEL, else ``info``.
        form: ``json`` or ``text``; by default MESH_LOG_FORMAT, else text on a terminal and JSON elsewhere.
        stream: where to; by default standard error.
        output: whether to write at all. False for programs that write their log by other means.
        grpc: whether to take over the log of gRPC itself, as `adopt_grpc_log` does.

    Raises:
        ConfigError: a level or form is unknown.
    """
    global _current  # noqa: PLW0603 - a process has one log, as `logging` has one root
    number = _level(level)
    if grpc:
        from mesh_client.grpc_log import adopt_grpc_log

        adopt_grpc_log()
    target = sys.stderr if stream is None else stream
    logs = Logs(
        os.environ.get(SERVICE_VARIABLE, "") if service is None else service,
        instance,
        form=_form(form, target),
        stream=target if output else None,
    )
    if _current is not None:
        _current.detach()
    logs.attach()
    logging.getLogger().setLevel(number)
    _current = logs
    return logs


def current_logs() -> Logs | None:
    """The log of this process; None where nobody has set it up."""
    return _current


def name_logs(service: str, instance: str = "") -> None:
    """Fills in who the log of this process is of, where there is one and that was not given."""
    if _current is not None:
        _current.name(service, instance)


def _level(given: str | None) -> int:
    name = "level" if given is not None else LEVEL_VARIABLE
    text = given if given is not None else os.environ.get(LEVEL_VARIABLE) or "info"
    try:
        return check_level(text)
    except InvalidValueError as error:
        raise ConfigError(f"{name}: {text[:40]!r} is not allowed; expected {error.expected}") from None


def _form(given: str | None, stream: TextIO) -> Format:
    name = "form" if given is not None else FORMAT_VARIABLE
    text = given if given is not None else os.environ.get(FORMAT_VARIABLE)
    if not text:
        return "text" if stream.isatty() else "json"
    for known in FORMATS:
        if text.lower() == known:
            return known
    raise ConfigError(f"{name}: {text[:40]!r} is not allowed; expected json or text")


def _restore(restore: Restore) -> None:
    logging.getLogger(restore.logger or None).setLevel(restore.level)


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception as error:
        return f"{record.msg!r} with {record.args!r} ({type(error).__name__}: {error})"


_TRACEBACKS = logging.Formatter()


def _exception(record: logging.LogRecord) -> str:
    parts = []
    if record.exc_info:
        parts.append(_TRACEBACKS.formatException(record.exc_info))
    elif record.exc_text:
        parts.append(record.exc_text)
    if record.stack_info:
        parts.append(record.stack_info)
    return "\n".join(parts)
