"""Load reports for tests: made as clients make them, from calls of the core."""

from __future__ import annotations

import itertools
from typing import Any

from control_plane.subscription import ClientNode
from mesh_client.core.call import Attempt, AttemptFailure, Call, Pause
from mesh_client.core.load_report import Consumer, LoadReport, ReportBuilder, Server
from mesh_client.core.model import StatusCode
from mesh_client.core.served import ServedBook
from mesh_client.core.service import Service
from tests.core.worlds import service

PLACE = "/shop.v1.OrderService/PlaceOrder"
EVENT = "shop.v1.OrderPlaced"
_starts = itertools.count()
CALM: dict[str, Any] = {"outlier_detection": {"enabled": False}, "circuit_breaker": {"enabled": False}}


def refusal(details: str = "failed to connect to all addresses") -> AttemptFailure:
    return AttemptFailure(StatusCode.UNAVAILABLE, details)


class Process:
    """A process that calls ``orders``, and may serve as well."""

    def __init__(self, name: str = "checkout-1", caller: str = "checkout", began: float = 0.0, **policy: Any) -> None:
        self.node = ClientNode(name, caller)
        self.epoch = f"{name}-{next(_starts)}"
        self.world: Service = service("a", "b", **{**CALM, **policy})
        self.book = ServedBook()
        self.serves = False
        self.consumed = ServedBook()
        self.began = began
        self.builder = ReportBuilder(began)

    def calls(self, count: int = 1, method: str = PLACE, now: float = 0.0, took: float = 0.1) -> None:
        for _ in range(count):
            call = Call(self.world, method)
            call.begin(now)
            call.succeeded(now + took)

    def fails(
        self, count: int = 1, now: float = 0.0, trace_id: str = "", failure: AttemptFailure | None = None
    ) -> None:
        for _ in range(count):
            call = Call(self.world, PLACE)
            call.trace_id = trace_id
            action = call.begin(now)
            while isinstance(action, Attempt):
                action = call.failed(failure or refusal(), now)
                if isinstance(action, Pause):
                    action = call.resumed(now)

    def receives(self, count: int, caller: str, took: float = 0.1, code: str = "OK", method: str = PLACE) -> None:
        self.serves = True
        tally = self.book.tally(self.book.of(method), caller)
        for _ in range(count):
            tally.ended(code, took)

    def handles(self, count: int, publisher: str, type: str = EVENT, took: float = 0.1, code: str = "OK") -> None:
        tally = self.consumed.tally(self.consumed.of(f"/{type}"), publisher)
        for _ in range(count):
            tally.ended(code, took)

    def report(self, now: float) -> LoadReport:
        servers = [Server(self.node.service, self.node.id, self.book, 0)] if self.serves else []
        return self.builder.look([self.world], servers, now, [Consumer("main", self.consumed)])
