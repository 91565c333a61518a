"""`mesh top`, `mesh tap`, `mesh explain` and `mesh diff`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from mesh.v1 import trace_pb2, traffic_pb2
from rich.console import Console
from rich.text import Text

from mesh_cli.watch import show
from tests.cli import traffic_samples as samples
from tests.cli.conftest import WIDTH, Run
from tests.cli.samples import ORDERS, SHIPPING
from tests.cli.scripted import Refusal, ScriptedAdmin

Golden = Callable[[str, str], None]


# -- top


def test_who_calls_whom_is_shown_as_a_table(run: Run, admin: ScriptedAdmin, golden: Golden) -> None:
    admin.answers["GetTraffic"] = samples.traffic()
    result = run("top", "--once", "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (0, "")
    golden("top.txt", result.stdout)
    assert admin.requests == [traffic_pb2.GetTrafficRequest(window=Duration(seconds=60))]


def test_one_service_is_shown_with_its_methods_and_endpoints(run: Run, admin: ScriptedAdmin, golden: Golden) -> None:
    admin.answers["GetTraffic"] = samples.traffic_of_orders()
    result = run("top", "orders", "--once", "--window", "30s", "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (0, "")
    golden("top_service.txt", result.stdout)
    assert admin.requests == [traffic_pb2.GetTrafficRequest(service="orders", window=Duration(seconds=30))]


def test_traffic_is_written_as_stable_json(run: Run, admin: ScriptedAdmin, golden: Golden) -> None:
    admin.answers["GetTraffic"] = samples.traffic_of_orders()
    result = run("top", "orders", "--once", "--json", "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (0, "")
    golden("top.json", result.stdout)
    assert set(json.loads(result.stdout)) == {field.name for field in traffic_pb2.GetTrafficResponse.DESCRIPTOR.fields}


@pytest.mark.parametrize(
    ("order", "first"), [("name", "-"), ("rate", "checkout"), ("failures", "orders"), ("p99", "orders")]
)
def test_what_comes_first_can_be_chosen(order: str, first: str, run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["GetTraffic"] = samples.traffic()
    shown = run("top", "--once", "--sort", order, "--control-plane", admin.address).stdout.splitlines()
    header = next(number for number, line in enumerate(shown) if line.startswith("CALLER"))
    assert shown[header + 1].split()[0] == first


def test_a_mesh_in_which_nobody_reports_says_so(run: Run, admin: ScriptedAdmin) -> None:
    assert "No process reports its calls" in run("top", "--once", "--control-plane", admin.address).stdout
    admin.answers["GetTraffic"] = traffic_pb2.GetTrafficResponse(window=Duration(seconds=60), reporting=1)
    shown = run("top", "--once", "--control-plane", admin.address).stdout
    assert "1 process reports" in shown
    assert "Nobody has called anybody within the last 10 minutes." in shown
    shown = run("top", "orders", "--once", "--control-plane", admin.address).stdout
    assert "Nobody has called orders, and it has called nobody, within the last 10 minutes." in shown


def test_a_percentile_beyond_what_is_told_apart_is_said_to_be(run: Run, admin: ScriptedAdmin) -> None:
    slow = traffic_pb2.EdgeTraffic(caller="a", service="b", calls=samples.stats(3, 1.0, 1.0))
    admin.answers["GetTraffic"] = traffic_pb2.GetTrafficResponse(reporting=1, edges=[slow])
    assert ">104s" in run("top", "--once", "--control-plane", admin.address).stdout


def test_top_repeats_itself_until_ctrl_c(admin: ScriptedAdmin) -> None:
    admin.answers["GetTraffic"] = samples.traffic()
    command = [sys.executable, "-m", "mesh_cli", "top", "--json", "--interval", "0.1", "--control-plane", admin.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline(), process.stdout.readline()]
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, errors) == (0, "")
    assert [json.loads(line)["reporting"] for line in lines] == [7, 7]


def test_on_a_terminal_each_answer_takes_the_place_of_the_one_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mesh_cli.watch.console", lambda: Console(force_terminal=True, width=20, height=4))
    texts = iter(["one\ntwo", "\n".join("abcdef")])
    waits = iter([None])

    def wait(_: float) -> None:
        if next(waits, "over") == "over":
            raise KeyboardInterrupt

    show(lambda: next(texts), Text, None, 1.0, wait)
    first, second = capsys.readouterr().out.split("\x1b[H")[1:]
    assert first == "one\x1b[K\ntwo\x1b[K\n\x1b[J"
    assert second.startswith("a\x1b[K\nb\x1b[K\n... and 4 more lines")
    assert second.endswith("\x1b[J")


# -- tap


def test_calls_are_shown_as_they_end(run: Run, admin: ScriptedAdmin, golden: Golden) -> None:
    admin.streams["Tap"] = list(samples.tapped())
    result = run("tap", "orders", "--control-plane", admin.address)
    assert result.exit_code == 0
    golden("tap.txt", result.stdout)
    assert result.stderr == (
        "waiting for calls to orders from 3 processes\n"
        "mesh: 7 calls not shown, there were too many: ask for fewer, or raise --rate\n"
    )
    assert admin.requests == [traffic_pb2.TapRequest(service="orders", rate=50, duration=Duration(seconds=60))]


def test_calls_are_written_as_json_one_a_line(run: Run, admin: ScriptedAdmin, golden: Golden) -> None:
    admin.streams["Tap"] = list(samples.tapped())
    result = run("tap", "orders", "--json", "--limit", "2", "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (0, "")
    golden("tap.jsonl", result.stdout)


def test_what_is_tapped_is_chosen_by_options(run: Run, admin: ScriptedAdmin) -> None:
    options = ["--method", "shop.v1.OrderService/*", "--status", "unavailable,INTERNAL", "--status", "UNKNOWN"]
    options += ["--slow", "100ms", "--from", "checkout", "--rate", "5", "--duration", "10s"]
    result = run("tap", "orders", *options, "--control-plane", admin.address)
    assert result.exit_code == 0
    assert result.stderr == (
        "mesh: no such call of a mesh client to orders ended meanwhile; calls of others, such as a proxy at the edge, "
        "are not shown, but `mesh top orders` counts them\n"
    )
    assert admin.requests == [
        traffic_pb2.TapRequest(
            service="orders",
            method="shop.v1.OrderService/*",
            codes=[14, 13, 2],
            slower_than=Duration(nanos=100_000_000),
            caller="checkout",
            rate=5,
            duration=Duration(seconds=10),
        )
    ]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--status", "NOPE"], "'NOPE' is no gRPC status"),
        (["--method", "nope"], "expected package.Service/Method"),
        (["--from", "Not A Service"], "expected a DNS label"),
        (["--slow", "fast"], "expected a time"),
    ],
)
def test_what_cannot_be_tapped_is_wrong_use(options: list[str], what: str, run: Run, admin: ScriptedAdmin) -> None:
    result = run("tap", "orders", *options, "--control-plane", admin.address)
    assert result.exit_code == 2
    assert what in " ".join(result.stderr.replace("│", " ").split())


def test_a_tap_that_nobody_answers_says_so(run: Run, admin: ScriptedAdmin) -> None:
    admin.streams["Tap"] = [traffic_pb2.TapResponse()]
    shown = run("tap", "orders", "--from", "web", "--control-plane", admin.address).stderr
    assert "no process of web reports to this control plane" in shown
    admin.answers["Tap"] = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "20 taps are open already")
    result = run("tap", "orders", "--control-plane", admin.address)
    assert result.exit_code == 1
    assert "20 taps are open already" in result.stderr


def test_an_unknown_service_is_not_tapped_in_silence(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["Tap"] = Refusal(grpc.StatusCode.NOT_FOUND, "nobody knows a service oders")
    result = run("tap", "oders", "--control-plane", admin.address)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "mesh: nobody knows a service oders\n")


# -- explain


def test_why_calls_fail_is_explained(run: Run, admin: ScriptedAdmin, golden: Golden) -> None:
    admin.answers["Explain"] = samples.explanation()
    result = run("explain", "orders", "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (0, "")
    golden("explain.txt", result.stdout)
    assert admin.requests == [traffic_pb2.ExplainRequest(service="orders")]


def test_an_explanation_in_a_pipe_has_no_spaces_at_the_ends_of_its_lines(run: Run, admin: ScriptedAdmin) -> None:
    answer = samples.explanation()
    answer.findings[0].remedy = "look at it " * 40
    admin.answers["Explain"] = answer
    lines = run("explain", "orders", "--control-plane", admin.address).stdout.splitlines()
    assert [line for line in lines if line != line.rstrip()] == []
    assert sum(line.startswith("        ") for line in lines) == 4  # a long remedy in three lines, all indented
    assert max(map(len, lines)) <= WIDTH


def test_a_service_that_is_well_is_explained_too(run: Run, admin: ScriptedAdmin, golden: Golden) -> None:
    admin.answers["Explain"] = samples.calm()
    golden("explain_calm.txt", run("explain", "inventory", "--control-plane", admin.address).stdout)


def test_an_explanation_is_written_as_stable_json(run: Run, admin: ScriptedAdmin, golden: Golden) -> None:
    admin.answers["Explain"] = samples.explanation()
    result = run("explain", "orders", "--json", "--control-plane", admin.address)
    golden("explain.json", result.stdout)


def test_the_call_of_a_trace_is_explained(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["Explain"] = samples.explanation()
    result = run("explain", samples.TRACE.upper(), "--control-plane", admin.address)
    assert result.exit_code == 0
    assert admin.requests == [traffic_pb2.ExplainRequest(trace_id=samples.TRACE)]


def test_a_trace_that_load_reports_do_not_know_is_explained_by_its_spans(run: Run, admin: ScriptedAdmin) -> None:
    spans = [
        trace_pb2.TraceSpan(service="web", name="GET /", depth=0, status=trace_pb2.SPAN_STATUS_ERROR),
        trace_pb2.TraceSpan(
            service="checkout",
            instance="checkout-1",
            name="shop.v1.OrderService/PlaceOrder",
            depth=2,
            status=trace_pb2.SPAN_STATUS_ERROR,
            status_message="no route\nto host",
            duration=Duration(nanos=31_200_000),
            attributes={"mesh.service": "orders"},
        ),
        trace_pb2.TraceSpan(service="stock", name="fine", depth=3),
    ]
    admin.answers["GetTrace"] = trace_pb2.GetTraceResponse(spans=spans)
    unknown = Refusal(grpc.StatusCode.NOT_FOUND, "no failed call of this trace is kept")
    admin.answers["Explain"] = lambda request: (
        samples.explanation() if request == traffic_pb2.ExplainRequest(service="orders") else unknown
    )
    result = run("explain", samples.TRACE, "--control-plane", admin.address)
    assert result.exit_code == 0
    assert result.stdout.startswith(
        "It failed in checkout at checkout-1: shop.v1.OrderService/PlaceOrder after 31.2ms: no route to host\n"
    )
    assert "Calls to orders" in result.stdout
    shown = json.loads(run("explain", samples.TRACE, "--json", "--control-plane", admin.address).stdout)
    assert shown["failed_span"]["service"] == "checkout"


def test_a_trace_is_explained_by_the_beginning_of_its_id(run: Run, admin: ScriptedAdmin) -> None:
    whole, service = traffic_pb2.ExplainRequest(trace_id=samples.TRACE), "nobody knows a service 4bf92f3577b3"
    admin.answers["Explain"] = lambda request: (
        samples.explanation() if request == whole else Refusal(grpc.StatusCode.NOT_FOUND, service)
    )
    admin.answers["GetTrace"] = trace_pb2.GetTraceResponse(summary=trace_pb2.TraceSummary(trace_id=samples.TRACE))
    result = run("explain", "4BF92F3577B3", "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("Calls to orders\n")
    assert admin.requests[1:] == [trace_pb2.GetTraceRequest(trace_id="4bf92f3577b3"), whole]
    for code, words in (
        (grpc.StatusCode.INVALID_ARGUMENT, "trace_id: 2 traces begin with 4bf92f3577b3: ..."),
        (grpc.StatusCode.NOT_FOUND, "no trace that begins with 4bf92f3577b3 is kept"),
    ):
        admin.answers["GetTrace"] = Refusal(code, words)
        result = run("explain", "4bf92f3577b3", "--control-plane", admin.address)
        assert (result.exit_code, result.stderr) == (1, f"mesh: {service}; {words}\n")
    admin.answers["GetTrace"] = Refusal(grpc.StatusCode.INTERNAL, "broken")
    assert "broken" in run("explain", "4bf92f3577b3", "--control-plane", admin.address).stderr


def test_a_service_whose_name_could_begin_the_id_of_a_trace_is_meant(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["Explain"] = samples.explanation()
    assert run("explain", "facade00", "--control-plane", admin.address).exit_code == 0
    assert admin.requests == [traffic_pb2.ExplainRequest(service="facade00")]
    admin.answers["Explain"] = Refusal(grpc.StatusCode.INTERNAL, "broken")
    assert "broken" in run("explain", "facade00", "--control-plane", admin.address).stderr


def test_a_trace_in_which_nothing_failed_and_one_that_nobody_knows(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["Explain"] = Refusal(grpc.StatusCode.NOT_FOUND, "no failed call of this trace is kept")
    admin.answers["GetTrace"] = trace_pb2.GetTraceResponse(spans=[trace_pb2.TraceSpan(service="web")])
    result = run("explain", samples.TRACE, "--control-plane", admin.address)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"no span of trace {samples.TRACE} failed; `mesh trace 4bf92f3577b34da6` shows it" in result.stderr
    admin.answers["GetTrace"] = Refusal(grpc.StatusCode.NOT_FOUND, "no such trace")
    result = run("explain", samples.TRACE, "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (1, "mesh: no failed call of this trace is kept\n")
    admin.answers["GetTrace"] = Refusal(grpc.StatusCode.INTERNAL, "broken")
    assert "broken" in run("explain", samples.TRACE, "--control-plane", admin.address).stderr


def test_a_service_that_nobody_knows_is_exit_code_1(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["Explain"] = Refusal(grpc.StatusCode.NOT_FOUND, "nobody knows a service oders")
    result = run("explain", "oders", "--control-plane", admin.address)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "mesh: nobody knows a service oders\n")
    admin.answers["Explain"] = Refusal(grpc.StatusCode.INTERNAL, "broken")
    assert run("explain", "oders", "--control-plane", admin.address).exit_code == 1
    assert run("explain", "Not A Service", "--control-plane", admin.address).exit_code == 2


# -- diff


@pytest.fixture
def orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("orders.yaml").write_text(ORDERS, encoding="utf-8")
    return "orders.yaml"


def test_a_policy_that_differs_is_shown_with_what_it_would_have_refused(
    run: Run, admin: ScriptedAdmin, golden: Golden, orders: str
) -> None:
    admin.answers["TryPolicy"] = samples.tried()
    result = run("diff", orders, "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (1, "")
    golden("diff.txt", result.stdout)
    assert admin.requests == [traffic_pb2.TryPolicyRequest(document=ORDERS, window=Duration(seconds=600))]


def test_a_difference_is_written_as_stable_json(run: Run, admin: ScriptedAdmin, golden: Golden, orders: str) -> None:
    admin.answers["TryPolicy"] = samples.tried()
    result = run("diff", orders, "--json", "--control-plane", admin.address)
    assert result.exit_code == 1
    golden("diff.json", result.stdout)


def test_a_policy_that_changes_how_events_are_handled_is_shown_with_what_would_not_have_been(
    run: Run, admin: ScriptedAdmin, golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("shipping.yaml").write_text(SHIPPING, encoding="utf-8")
    admin.answers["TryPolicy"] = samples.tried_events()
    result = run("diff", "shipping.yaml", "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (1, "")
    golden("diff-events.txt", result.stdout)
    both = samples.tried()
    both.MergeFrom(traffic_pb2.TryPolicyResponse(handled=1, current_events=samples.tried_events().current_events))
    admin.answers["TryPolicy"] = both
    shown = run("diff", "shipping.yaml", "--control-plane", admin.address).stdout
    assert "of 74010 calls that 2 instances received" in shown
    assert "of 1 event that its groups handled within the last 10 min:" in shown


def test_a_policy_that_is_in_force_is_exit_code_0(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["TryPolicy"] = samples.untried({"service": "orders", "timeout": "1s"})
    result = run(
        "diff", "-", "--window", "1m", "--control-plane", admin.address, stdin="service: orders\ntimeout: 1s\n"
    )
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (
        "orders: the policy in stdin is in force as it is\n\n"
        "orders: no instance has reported a call within the last 42 s.\n"
    )


def test_a_bad_policy_is_exit_code_2_and_asks_nobody(run: Run, admin: ScriptedAdmin) -> None:
    result = run("diff", "-", "--control-plane", admin.address, stdin="service: orders\ntimeout: soon\n")
    assert (result.exit_code, result.stdout, admin.requests) == (2, "", [])
    assert "stdin, document 1: timeout: expected a duration" in result.stderr
    assert "nothing was compared" in result.stderr


def test_what_the_control_plane_does_not_take_is_exit_code_2(run: Run, admin: ScriptedAdmin, orders: str) -> None:
    admin.answers["TryPolicy"] = Refusal(grpc.StatusCode.INVALID_ARGUMENT, "timeout: not with this version")
    result = run("diff", orders, "--control-plane", admin.address)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "mesh: orders.yaml, document 1: timeout: not with this version\n"
