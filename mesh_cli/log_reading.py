"""Reads logs from every control plane at once: each has the processes that are connected to it, and no others."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc
from mesh.v1 import operations_pb2

from mesh_cli.client import AdminClient, RefusedError, UnreachableError
from mesh_client.core.errors import MeshError
from mesh_client.core.log_entry import Json, LogEntry

RETRY = 1.0
"""Seconds until a control plane that has gone is asked again."""

_TEMPORARY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


@dataclass
class Past:
    """What there was.

    Attributes:
        records: in the order of time.
        processes: whose logs were read.
        notes: what is missing, in words.
    """

    records: list[operations_pb2.LogRecord] = field(default_factory=list)
    processes: list[operations_pb2.Process] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read(clients: Sequence[AdminClient], request: operations_pb2.TailLogsRequest) -> Past:
    """The last records of all processes that are meant, those of all control planes together.

    Raises:
        MeshError: no control plane could answer.
    """
    past, failures = Past(), list[MeshError]()
    for client in clients:
        try:
            for response in client.stream(client.operations.TailLogs, request, bounded=True):
                past.records += response.records
                past.processes += response.processes
                past.notes += [f"{name} did not answer in time: its log is missing" for name in response.silent]
        except (UnreachableError, RefusedError) as error:
            failures.append(error)
    if len(failures) == len(clients):
        raise failures[0]
    past.notes += [f"logs of processes that are connected there are missing: {error}" for error in failures]
    past.records.sort(key=lambda record: (record.time.ToNanoseconds(), record.process, record.sequence))
    del past.records[: max(0, len(past.records) - request.last)]
    return past


class Following:
    """Follows logs on every control plane, and goes on when one has gone and come back.

    Args:
        clients: one of each control plane.
        request: what is wanted.
        retry: seconds until one that has gone is asked again.
    """

    def __init__(
        self, clients: Sequence[AdminClient], request: operations_pb2.TailLogsRequest, retry: float = RETRY
    ) -> None:
        self._clients = clients
        self._request = request
        self._retry = retry
        self._answers: queue.Queue[tuple[AdminClient, operations_pb2.TailLogsResponse | MeshError]] = queue.Queue(100)
        self._stopped = threading.Event()
        self._seen: dict[str, int] = {}
        self._troubled: set[str] = set()
        self._failed: dict[str, MeshError] = {}
        self._answered = False

    def run(self, show: Callable[[operations_pb2.LogRecord], None], note: Callable[[str], None]) -> None:
        """Shows records as they come, for ever.

        Args:
            show: writes one.
            note: says what went wrong, or is missing.

        Raises:
            MeshError: no control plane could answer, or one refuses.
        """
        threads = [threading.Thread(target=self._follow, args=(client,), daemon=True) for client in self._clients]
        for thread in threads:
            thread.start()
        try:
            while True:
                client, answer = self._answers.get()
                if isinstance(answer, MeshError):
                    self._trouble(client, answer, note)
                else:
                    self._take(client, answer, show, note)
        finally:
            self._stopped.set()
            for client in self._clients:
                client.close()
            for thread in threads:
                while thread.is_alive():
                    self._drain()
                    thread.join(0.01)

    def _take(
        self,
        client: AdminClient,
        answer: operations_pb2.TailLogsResponse,
        show: Callable[[operations_pb2.LogRecord], None],
        note: Callable[[str], None],
    ) -> None:
        if client.address in self._troubled:
            self._troubled.discard(client.address)
            note(f"the control plane at {client.address} answers again")
        self._answered = True
        for name in answer.silent:
            note(f"{name} did not answer in time: its log up to now is missing")
        if answer.dropped:
            note(f"{answer.dropped} records came faster than they could be read, and are missing here")
        for record in answer.records:
            # A process may have gone over to another control plane, which then tells of its past again.
            if record.sequence > self._seen.get(record.process, 0):
                self._seen[record.process] = record.sequence
                show(record)

    def _trouble(self, client: AdminClient, error: MeshError, note: Callable[[str], None]) -> None:
        if isinstance(error, RefusedError) and error.code not in _TEMPORARY:
            raise error
        self._failed[client.address] = error
        if not self._answered and len(self._failed) == len(self._clients):
            raise error
        if client.address not in self._troubled:
            self._troubled.add(client.address)
            note(f"{error}; trying again")

    def _follow(self, client: AdminClient) -> None:
        while not self._stopped.is_set():
            try:
                for response in client.stream(client.operations.TailLogs, self._request):
                    self._put(client, response)
                self._put(client, RefusedError(grpc.StatusCode.UNAVAILABLE, "it ended the stream", client.address))
            except MeshError as error:
                self._put(client, error)
            except ValueError:
                return  # the channel was closed: this ends
            self._stopped.wait(self._retry)

    def _put(self, client: AdminClient, answer: operations_pb2.TailLogsResponse | MeshError) -> None:
        if not self._stopped.is_set():
            self._answers.put((client, answer))

    def _drain(self) -> None:
        while not self._answers.empty():
            self._answers.get()


def entry_from_proto(record: operations_pb2.LogRecord) -> LogEntry:
    """The event that a record is of."""
    return LogEntry(
        time=record.time.ToNanoseconds() / 1e9,
        level=10 * record.level,
        logger=record.logger,
        message=record.message,
        trace_id=record.trace_id,
        span_id=record.span_id,
        fields=_fields(record.fields),
        exception=record.exception,
    )


def _fields(text: str) -> dict[str, Json]:
    try:
        made = json.loads(text or "{}")
    except ValueError:
        return {"fields": text}
    return made if isinstance(made, dict) else {"fields": made}
