from __future__ import annotations

import json
from collections.abc import Callable

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from mesh.v1 import trace_pb2 as pb
from rich.console import Console

from mesh_cli.trace import render_trace
from mesh_cli.waterfall import took
from tests.cli import trace_samples as samples
from tests.cli.conftest import Run
from tests.cli.scripted import Refusal, ScriptedAdmin

Golden = Callable[[str, str], None]


def test_a_trace_is_shown_as_a_waterfall(run: Run, admin: ScriptedAdmin, golden: Golden) -> None:
    admin.answers["GetTrace"] = samples.retried_trace()
    result = run("trace", "4bf92f35", "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (0, "")
    golden("trace.txt", result.stdout)
    assert admin.requests == [pb.GetTraceRequest(trace_id="4bf92f35")]


def test_attributes_are_shown_on_demand(run: Run, admin: ScriptedAdmin, golden: Golden) -> None:
    admin.answers["GetTrace"] = samples.retried_trace("https://jaeger.example")
    result = run("trace", samples.RETRIED, "-a", "--control-plane", admin.address)
    golden("trace_attributes.txt", result.stdout)


def test_a_trace_is_written_as_stable_json(run: Run, admin: ScriptedAdmin, golden: Golden) -> None:
    admin.answers["GetTrace"] = samples.retried_trace()
    result = run("trace", samples.RETRIED, "--json", "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (0, "")
    golden("trace.json", result.stdout)


def test_what_is_missing_of_a_trace_is_said(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["GetTrace"] = samples.fragment()
    shown = run("trace", "c0ffee", "--control-plane", admin.address).stdout
    assert "its parent 0000000000000001 is missing" in shown
    assert "1 span of this trace was not kept" in shown
    assert "The first span of the trace, the one without a parent, has not come." in shown


@pytest.mark.parametrize("width", [20, 60, 100, 300])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_waterfall_fits_the_terminal_and_its_characters(width: int, ascii_only: bool) -> None:
    console = Console(width=width, force_terminal=True)
    drawn = render_trace(samples.retried_trace(), width, attributes=True, ascii_only=ascii_only)
    lines = ["".join(segment.text for segment in line) for line in console.render_lines(drawn)]
    assert {len(line) for line in lines} == {width}
    assert all(line.isascii() for line in lines) == ascii_only


def test_traces_are_listed_as_a_table(run: Run, admin: ScriptedAdmin, golden: Golden) -> None:
    admin.answers["ListTraces"] = samples.listing()
    result = run("trace", "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (0, "")
    golden("traces.txt", result.stdout)
    assert admin.requests == [pb.ListTracesRequest(filter=pb.TraceFilter(), limit=20)]


def test_traces_are_listed_as_stable_json(run: Run, admin: ScriptedAdmin, golden: Golden) -> None:
    admin.answers["ListTraces"] = samples.listing()
    result = run("trace", "--json", "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (0, "")
    golden("traces.json", result.stdout)


def test_with_jaeger_each_trace_has_a_link(run: Run, admin: ScriptedAdmin, golden: Golden) -> None:
    admin.answers["ListTraces"] = samples.listing("https://jaeger.example")
    golden("traces_jaeger.txt", run("trace", "--control-plane", admin.address).stdout)


def test_what_is_wanted_is_asked_for(run: Run, admin: ScriptedAdmin) -> None:
    options = ("--service", "orders", "--method", "PlaceOrder", "--errors", "--slow", "200ms", "--limit", "5")
    result = run("trace", *options, "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (0, "")
    wanted = pb.TraceFilter(
        service="orders", method="PlaceOrder", errors=True, min_duration=Duration(nanos=200_000_000)
    )
    assert admin.requests == [pb.ListTracesRequest(filter=wanted, limit=5)]


def test_an_empty_answer_says_why(run: Run, admin: ScriptedAdmin) -> None:
    def shown(*arguments: str, **answer: object) -> str:
        admin.answers["ListTraces"] = pb.ListTracesResponse(**answer)  # type: ignore[arg-type] # of the message
        return run("trace", *arguments, "--control-plane", admin.address).stdout

    assert "No traces have come yet. Services send them when they run with MESH_TRACING=1" in shown()
    some = pb.TraceStoreState(traces=3, spans=9, bytes=1_048_576, max_bytes=2_097_152, max_age=Duration(seconds=60))
    assert shown("--errors", store=some) == (
        "No trace that is kept is one of those.\n3 traces with 9 spans kept, 1.0 of 2 MiB, each for 1m00s at most.\n"
    )
    assert shown(store=pb.TraceStoreState(refused=1, refused_requests=2), jaeger_ui="http://jaeger").endswith(
        "Refused since the start: 1 span, 2 requests; the control plane's log says whose and why.\n"
        "Jaeger: http://jaeger\n"
    )


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (grpc.StatusCode.NOT_FOUND, "no trace that begins with ab is kept"),
        (grpc.StatusCode.INVALID_ARGUMENT, "trace_id: 2 traces begin with ab: ..."),
        (grpc.StatusCode.FAILED_PRECONDITION, "this control plane was started to keep no traces"),
    ],
)
def test_a_trace_that_cannot_be_shown_is_exit_code_1(
    code: grpc.StatusCode, said: str, run: Run, admin: ScriptedAdmin
) -> None:
    admin.answers["GetTrace"] = Refusal(code, said)
    result = run("trace", "ab", "--control-plane", admin.address)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"mesh: {said}\n")


def test_another_refusal_is_shown_as_the_control_plane_put_it(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["ListTraces"] = Refusal(grpc.StatusCode.INTERNAL, "broken")
    result = run("trace", "--control-plane", admin.address)
    assert result.stderr == f"mesh: the control plane at {admin.address} answered INTERNAL: broken\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("ab", "--errors"),
        ("ab", "--service", "orders"),
        ("ab", "--watch"),
        ("--slow", "fast"),
        ("--service", "Not_A_Name"),
        ("--limit", "0"),
    ],
)
def test_wrong_use_is_exit_code_2(arguments: tuple[str, ...], run: Run, admin: ScriptedAdmin) -> None:
    assert run("trace", *arguments, "--control-plane", admin.address).exit_code == 2
    assert not admin.requests


def test_new_traces_are_shown_as_they_come(run: Run, admin: ScriptedAdmin, golden: Golden) -> None:
    listing = samples.listing("https://jaeger.example")
    admin.streams["WatchTraces"] = [pb.WatchTracesResponse(trace=trace) for trace in listing.traces]
    admin.answers["WatchTraces"] = Refusal(grpc.StatusCode.UNAVAILABLE, "the control plane is stopping")
    result = run("trace", "--watch", "--errors", "--control-plane", admin.address)
    golden("trace_watch.txt", result.stdout)
    assert result.exit_code == 1
    assert "the control plane is stopping" in result.stderr
    assert admin.requests == [pb.WatchTracesRequest(filter=pb.TraceFilter(errors=True))]
    del admin.answers["WatchTraces"]
    lines = run("trace", "--watch", "--json", "--control-plane", admin.address).stdout.splitlines()
    assert [json.loads(line)["trace_id"] for line in lines] == [trace.trace_id for trace in listing.traces]


def test_following_ends_with_ctrl_c(run: Run, admin: ScriptedAdmin, monkeypatch: pytest.MonkeyPatch) -> None:
    admin.streams["WatchTraces"] = [pb.WatchTracesResponse(trace=samples.listing().traces[0])]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mesh_cli.trace._line", interrupt)
    result = run("trace", "--watch", "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("span", "text"),
    [
        (0.0, "0.00ms"),
        (0.000_05, "0.05ms"),
        (0.001_25, "1.25ms"),
        (0.0231, "23.1ms"),
        (0.231, "231ms"),
        (1.25, "1.25s"),
        (12.5, "12.5s"),
        (3_600.0, "3600s"),
    ],
)
def test_durations_have_about_three_digits(span: float, text: str) -> None:
    assert took(span) == text
