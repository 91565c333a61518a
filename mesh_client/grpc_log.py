"""gRPC's own log as records of Python's `logging`, so that refused handshakes stand where everything else does."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Callable

from mesh_client.core.grpc_log import Handshakes, Line, handshake, parse

log = logging.getLogger("grpc.core")

_VERBOSITY = "GRPC_VERBOSITY"
_STANDARD_ERROR = 2
_LEVELS = {"I": logging.DEBUG, "W": logging.WARNING, "E": logging.ERROR, "F": logging.CRITICAL}
_PATIENCE = 1.0
"""Seconds at the end of the process in which what is still unread is passed on."""


def adopt_grpc_log() -> Callable[[], None]:
    """Takes gRPC's log over, for the rest of the process; returns what gives it back. For programs, not for libraries.

    Call it once, before the first channel or server, and configure `logging` afterwards. gRPC writes to file
    descriptor 2 and to nothing else, so that becomes a pipe: lines of gRPC become records of the logger ``grpc.core``,
    everything else goes on to standard error as it is. Failed TLS handshakes are warnings, for each reason once a
    second at most. Does nothing where GRPC_VERBOSITY is set: whoever sets it wants gRPC's log as it is.
    """
    if _VERBOSITY in os.environ:
        return _nothing
    os.environ[_VERBOSITY] = "info"  # handshakes are refused at that level
    sys.stderr.flush()
    real = os.dup(_STANDARD_ERROR)
    read, write = os.pipe()
    os.dup2(write, _STANDARD_ERROR)
    os.close(write)
    python_stderr = sys.stderr
    # Python's own goes past the pipe: a process that dies must not take its last words with it.
    sys.stderr = os.fdopen(real, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    reader = threading.Thread(target=_read, args=(read, real), name="grpc-log", daemon=True)
    reader.start()

    def give_back() -> None:
        atexit.unregister(give_back)
        sys.stderr.flush()
        sys.stderr = python_stderr
        os.dup2(real, _STANDARD_ERROR)  # the pipe's last writer in this process
        reader.join(_PATIENCE)
        if not reader.is_alive():
            os.close(real)
        os.environ.pop(_VERBOSITY, None)

    atexit.register(give_back)
    return give_back


def _nothing() -> None:
    """There is nothing to give back."""


def _read(descriptor: int, real: int) -> None:
    handshakes = Handshakes()
    with os.fdopen(descriptor, "rb") as lines:
        for raw in lines:
            line = parse(raw.decode(errors="backslashreplace").rstrip("\n"))
            if line is None:
                os.write(real, raw)
            else:
                _record(line, handshakes)


def _record(line: Line, handshakes: Handshakes) -> None:
    reason = handshake(line)
    if reason is not None:
        message = handshakes.record(reason, time.monotonic())
        if message is not None:
            log.warning("%s", message)
    elif not line.is_about_itself:
        log.log(_LEVELS[line.severity], "%s (%s)", line.text, line.where)
