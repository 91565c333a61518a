"""How traffic is shown: rates, shares, percentiles, status codes and failed calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import grpc
from google.protobuf.duration_pb2 import Duration
from mesh.v1 import telemetry_pb2, traffic_pb2
from rich.console import RenderableType
from rich.text import Text

from mesh_cli.output import Indented, age, count, printable, seconds
from mesh_cli.waterfall import took

_CODES = {code.value[0]: code.name for code in grpc.StatusCode}
GOOD, POOR = 0.999, 0.95
"""Shares below which a success rate is coloured as less than good, and as bad."""
Percentile = Literal["p50", "p95", "p99"]
PERCENTILES: tuple[Percentile, ...] = ("p50", "p95", "p99")


def code_name(number: int) -> str:
    """The name of a gRPC status."""
    return _CODES.get(number, str(number))


def rate(per_second: float) -> str:
    """Calls a second with about three digits."""
    return f"{per_second:.{2 if per_second < 10 else 1 if per_second < 100 else 0}f}"


def share(stats: traffic_pb2.TrafficStats) -> Text:
    """A success rate in percent: never 100% unless it is; a dash without calls."""
    if not stats.HasField("success_rate"):
        return Text("-")
    value = stats.success_rate
    shown = "100%" if value >= 1.0 else f"{int(value * 10_000) / 100:.2f}%"
    return Text(shown, style="" if value >= GOOD else "yellow" if value >= POOR else "bold red")


def percentile(stats: traffic_pb2.TrafficStats, name: Percentile) -> str:
    """A percentile, such as ``12.3ms``; a dash without calls, and ``>104s`` beyond what is told apart."""
    if not stats.HasField(name):
        return ">104s" if stats.count else "-"
    value: Duration = getattr(stats, name)
    return took(seconds(value))


def failure(group: traffic_pb2.FailureGroup, *, told: bool = True) -> Iterator[RenderableType]:
    """A group of failed calls: what, how many, why, the last one, and what to do."""
    who = printable(group.caller) or ("callers without identity" if group.received else "no service")
    method = printable(group.method.removeprefix("/"))
    yield Text.assemble(
        (f"{count(group.count, 'call')}", "bold"),
        f" of {who} to {printable(group.service)}, {method}: ",
        (code_name(group.code), "red"),
        ", as received" if group.received else "",
    )
    lines = [printable(group.explanation)] if group.explanation else []
    if told and group.HasField("example"):
        lines += _example(group.example)
    if group.remedy:
        lines.append(f"-> {printable(group.remedy)}")
    for line in lines:
        yield Indented(Text(line), 2)


def _example(example: telemetry_pb2.FailedCall) -> list[str]:
    state = [f"last one {age(example.ago)} ago", f"breaker {breaker(example.breaker)}"]
    if example.endpoints_version:
        snapshot = age(example.snapshot_age) + " old" if example.HasField("snapshot_age") else "from the disk cache"
        state.append(f"endpoints {printable(example.endpoints_version)} {snapshot}")
    if example.control_plane:
        state.append(f"control plane {printable(example.control_plane)}")
    if example.identity:
        state.append(f"identity: {printable(example.identity)}")
    lines = ["; ".join(state)]
    for attempt in example.attempts:
        where = f"{printable(attempt.endpoint_id)} at {printable(attempt.target)}"
        details = f": {one_line(attempt.details)}" if attempt.details else ""
        lines.append(f"tried {where}: {code_name(attempt.code)} after {took(seconds(attempt.elapsed))}{details}")
    if example.trace_id:
        lines.append(f"trace {example.trace_id}")
    return lines


def one_line(text: str) -> str:
    """A message of somebody else, in one line."""
    return printable(" ".join(text.split()))


def within(window: Duration) -> str:
    """How far back something goes: ``42 s``, ``1 min``, ``10 min``."""
    whole = round(seconds(window))
    return f"{whole // 60} min" if whole and whole % 60 == 0 else f"{whole} s"


def breaker(state: telemetry_pb2.BreakerState.ValueType) -> str:
    """The state of a breaker."""
    return telemetry_pb2.BreakerState.Name(state).removeprefix("BREAKER_STATE_").lower().replace("_", "-")
