"""From a request's bytes to spans in the store, a few at a time, with what was refused and why."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from control_plane.traces.allowance import Reporters
from control_plane.traces.otlp import UnusableSpanError, claimed_name, process_of, span_of
from control_plane.traces.otlp_wire import RawRequest, split
from control_plane.traces.span import Process
from control_plane.traces.store import Added, TraceStore

AT_ONCE = 32
"""Spans that are taken in before everything else that the control plane does has its turn: about a millisecond."""

MAX_KNOWN, MAX_KNOWN_BYTES = 500, 4096
"""Resources that are remembered, so that the spans of a process share one; larger ones are not."""


@dataclass(frozen=True, slots=True)
class Sender:
    """Who has sent something.

    Attributes:
        key: by which it is limited: its workload id, else the address of its connection.
        service: whose workload it is; None for one without an identity, who may say anything.
        workload_id: empty for one without an identity.
    """

    key: str
    service: str | None = None
    workload_id: str = ""

    def __str__(self) -> str:
        return f"{self.service} (workload {self.workload_id})" if self.service else self.key


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a request.

    Attributes:
        kept: spans that were taken in, or were there already.
        refused: spans that were not, by the reason in words.
        claimed: what the sender calls its service, when that is not what its identity says; else empty.
    """

    kept: int
    refused: Counter[str]
    claimed: str = ""

    @property
    def explanation(self) -> str:
        """In a sentence for whoever runs the sender; empty when there is nothing to say."""
        said = [
            f"{self.refused.total()} of {self.kept + self.refused.total()} spans were not kept: "
            + ", ".join(f"{count} {why}" for why, count in self.refused.most_common())
        ]
        claim = [f"service.name is {self.claimed!r}, which is not the identity's: spans are kept under the latter"]
        return "; ".join((said if self.refused else []) + (claim if self.claimed else []))


class Intake:
    """Takes requests in.

    Args:
        store: where spans go.
        reporters: what each sender may send.
        notify: called when spans have come.
        wall_clock: nanoseconds since 1970.
    """

    def __init__(
        self,
        store: TraceStore,
        reporters: Reporters,
        notify: Callable[[], None],
        wall_clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._store = store
        self._reporters = reporters
        self._notify = notify
        self._wall_clock = wall_clock
        self._processes: OrderedDict[tuple[bytes, str | None, str], Process] = OrderedDict()
        self.refused = 0
        """Spans since the start that were not taken in."""
        self.refused_requests = 0
        """Requests since the start that were refused before they were read."""

    def refusal(self, sender: Sender) -> str:
        """Why the sender's next request is refused before it is read; empty when it is not."""
        now = _now()
        refusal = self._reporters.reporter(sender.key, now).refusal(now)
        self.refused_requests += bool(refusal)
        return refusal

    async def take(self, body: bytes, sender: Sender) -> Verdict:
        """Takes a request in, as much of it as may be.

        Args:
            body: a serialised ``ExportTraceServiceRequest``.
            sender: who sent it.

        Raises:
            MalformedRequestError: it is no such message, or has too many parts.
        """
        reporter = self._reporters.reporter(sender.key, _now())
        reporter.read(len(body), _now())
        request = split(body)
        granted = reporter.grant(request.spans, request.fields - request.spans, _now())
        refused: Counter[str] = Counter()
        if granted < request.spans:
            refused["beyond what may be sent a second: sample"] = request.spans - granted
        kept = 0
        claimed = ""
        for done, (process, span) in enumerate(self._spans(request, sender, granted, refused), 1):
            claimed = claimed or claimed_name(process) * (sender.service is not None)
            try:
                trace_id, made = span_of(span, process, self._wall_clock())
            except UnusableSpanError as error:
                refused[str(error)] += 1
            else:
                added = self._store.add(trace_id, made, _now())
                if added is Added.TRACE_FULL:
                    refused["too many or too large for their trace"] += 1
                else:
                    kept += 1
            if done % AT_ONCE == 0:
                await asyncio.sleep(0)
        self.refused += refused.total()
        if kept:
            self._notify()
        return Verdict(kept, refused, claimed)

    def _spans(
        self, request: RawRequest, sender: Sender, most: int, refused: Counter[str]
    ) -> Iterator[tuple[Process, bytes]]:
        for each in request.processes:
            spans = each.spans[:most]
            most -= len(spans)
            if not spans:
                continue
            try:
                process = self._process(each.resource, sender)
            except UnusableSpanError as error:
                refused[str(error)] += len(spans)
                continue
            for span in spans:
                yield process, span

    def _process(self, resource: bytes, sender: Sender) -> Process:
        key = resource, sender.service, sender.workload_id
        known = self._processes.get(key)
        if known is not None:
            self._processes.move_to_end(key)
            return known
        made = process_of(resource, sender.service, sender.workload_id)
        if len(resource) <= MAX_KNOWN_BYTES:
            self._processes[key] = made
            if len(self._processes) > MAX_KNOWN:
                self._processes.popitem(last=False)
        return made


def _now() -> float:
    return asyncio.get_running_loop().time()
