"""Metrics as values: sums, histograms, and what a process says of itself."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_client.core.call import Attempt, AttemptFailure, Call, Pause
from mesh_client.core.load_report import Server
from mesh_client.core.metric import HISTOGRAM_BOUNDS, Family, Histogram, Kind, MetricSet
from mesh_client.core.model import Health, StatusCode
from mesh_client.core.process_metrics import FAMILIES, add_process, add_server, add_services
from mesh_client.core.served import ServedBook
from mesh_client.core.service import Service
from mesh_client.core.store import Resolution
from mesh_client.core.tally import BOUNDS, Tally
from tests.core.worlds import activate, endpoint, service

PLACE = "/shop.v1.OrderService/PlaceOrder"


def test_bounds_double_from_a_tenth_of_a_millisecond_to_more_than_a_minute() -> None:
    assert HISTOGRAM_BOUNDS[0] == pytest.approx(1e-4)
    assert HISTOGRAM_BOUNDS[-1] == BOUNDS[-1]
    assert len(HISTOGRAM_BOUNDS) == 21
    assert set(HISTOGRAM_BOUNDS) <= set(BOUNDS)


@given(st.lists(st.floats(0.0, 300.0), max_size=60))
def test_a_histogram_counts_what_took_at_most_so_long(durations: list[float]) -> None:
    tally = Tally()
    for seconds in durations:
        tally.succeeded(seconds)
    made = Histogram.of(tally.buckets, tally.seconds)
    expected = [sum(seconds <= bound for seconds in durations) for bound in HISTOGRAM_BOUNDS]
    assert made.buckets == (*expected, len(durations))
    assert made.seconds == pytest.approx(sum(durations))


def test_what_several_say_of_one_thing_is_added_up() -> None:
    families = [
        Family("a_total", Kind.COUNTER, "", ("x",)),
        Family("b", Kind.GAUGE, ""),
        Family("c", Kind.HISTOGRAM, ""),
    ]
    metrics = MetricSet(families)
    metrics.add("a_total", ("1",), 2)
    metrics.add("a_total", ("1",), 3)
    metrics.add("a_total", ("2",), 1)
    metrics.top("b", (), 2)
    metrics.top("b", (), 1)
    metrics.top("b", (), 3)
    tally = Tally()
    tally.succeeded(0.5)
    metrics.durations("c", (), tally)
    metrics.durations("c", (), tally)
    found = {family.name: dict(values) for family, values in metrics}
    assert found["a_total"] == {("1",): 5, ("2",): 1}
    assert found["b"] == {(): 3}
    histogram = found["c"][()]
    assert isinstance(histogram, Histogram)
    assert (histogram.buckets[-1], histogram.seconds) == (2, 1.0)


def test_unknown_metrics_and_labels_are_mistakes_of_ours() -> None:
    metrics = MetricSet(FAMILIES)
    with pytest.raises(KeyError):
        metrics.add("no_such_metric", (), 1)
    with pytest.raises(ValueError, match="has the labels"):
        metrics.add("grpc_mesh_client_retries_total", (), 1)


def test_names_follow_the_conventions() -> None:
    for family in FAMILIES:
        assert family.name.startswith("grpc_mesh_")
        assert family.name.endswith("_total") == (family.kind is Kind.COUNTER)
        assert family.help.endswith(".")
        if family.kind is Kind.HISTOGRAM:
            assert family.name.endswith("_seconds")
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def values(metrics: MetricSet) -> dict[tuple[str, ...], Any]:
    return {
        (family.name.removeprefix("grpc_mesh_"), *labels): value
        for family, of in metrics
        for labels, value in of.items()
    }


def fail(world: Service, now: float) -> None:
    call = Call(world, PLACE)
    action = call.begin(now)
    while isinstance(action, Attempt):
        action = call.failed(AttemptFailure(StatusCode.UNAVAILABLE, "no"), now)
        if isinstance(action, Pause):
            action = call.resumed(now)


def test_what_a_process_calls() -> None:
    world = service(
        "a", "b", circuit_breaker={"consecutive_failures": 1}, outlier_detection={"consecutive_failures": 1}
    )
    call = Call(world, PLACE)
    call.begin(0.0)
    call.succeeded(0.25)
    fail(world, 1.0)
    running = Call(world, PLACE)
    metrics = MetricSet(FAMILIES)
    add_services(metrics, [world], 2.0)
    running.begin(2.0)
    found = values(metrics)
    assert found["client_calls_total", "orders", PLACE, "OK"] == 1
    assert found["client_calls_total", "orders", PLACE, "UNAVAILABLE"] == 1
    assert found["client_call_duration_seconds", "orders", PLACE].buckets[-1] == 2
    assert found["client_failed_calls_total", "orders", PLACE, "UNAVAILABLE", "ATTEMPTS_FAILED"] == 1
    attempts = {key[2:]: count for key, count in found.items() if key[0] == "client_attempts_total"}
    assert sum(attempts.values()) == 4
    assert {key[0] for key in attempts} == {"a", "b"}
    assert found["client_retries_total", "orders"] == 2
    assert found["client_retry_budget", "orders"] == pytest.approx(100 + 0.2 * 2 - 2)
    assert found["client_in_flight", "orders"] == 0
    assert [found["client_breaker_state", "orders", state] for state in ("closed", "open", "half-open")] == [0, 1, 0]
    assert found["client_breaker_transitions_total", "orders", "open"] == 1
    assert found["client_endpoints", "orders", "healthy"] == 2
    assert found["client_ejected_endpoints", "orders"] == 1
    assert found["client_ejections_total", "orders", "CONSECUTIVE_FAILURES"] == 1
    assert found["client_service_known", "orders"] == 1
    assert found["client_snapshot_info", "orders", world.policy_version, world.endpoints_version] == 1


def test_two_clients_of_one_process_are_added_up_and_the_worse_state_counts() -> None:
    well, ill = service("a"), service("a", circuit_breaker={"consecutive_failures": 1})
    activate(ill, endpoint("a", health=Health.UNHEALTHY), circuit_breaker={"consecutive_failures": 1})
    for world in (well, ill):
        call = Call(world, PLACE)
        call.begin(0.0)
        call.succeeded(0.25)
    fail(ill, 1.0)
    metrics = MetricSet(FAMILIES)
    add_services(metrics, [well, ill], 2.0)
    found = values(metrics)
    assert found["client_calls_total", "orders", PLACE, "OK"] == 2
    assert found["client_breaker_state", "orders", "open"] == 1
    assert found["client_endpoints", "orders", "unhealthy"] == 1


def test_a_service_that_is_not_known_has_no_versions() -> None:
    world = service("a")
    world.deactivate(Resolution.UNKNOWN, 1.0)
    metrics = MetricSet(FAMILIES)
    add_services(metrics, [world], 2.0)
    found = values(metrics)
    assert found["client_service_known", "orders"] == 0
    assert not any(key[0] == "client_snapshot_info" for key in found)


def test_a_process_as_a_whole() -> None:
    metrics = MetricSet(FAMILIES)
    add_process(metrics, "n1", age=None, in_sync=False, reports=None, certificate=None)
    assert values(metrics) == {("client_control_plane_connected", "n1"): 0}
    metrics = MetricSet(FAMILIES)
    add_process(metrics, "n1", age=0.0, in_sync=True, reports=(7, True), certificate=("spiffe://m/service/a", 123.0))
    add_process(metrics, "n2", age=9.0, in_sync=False, reports=(1, False), certificate=("spiffe://m/service/a", None))
    assert values(metrics) == {
        ("client_snapshot_age_seconds", "n1"): 0,
        ("client_snapshot_age_seconds", "n2"): 9,
        ("client_control_plane_connected", "n1"): 1,
        ("client_control_plane_connected", "n2"): 0,
        ("client_load_reports_total", "n1"): 7,
        ("client_load_reports_total", "n2"): 1,
        ("client_load_reports_accepted", "n1"): 1,
        ("client_load_reports_accepted", "n2"): 0,
        ("certificate_expiry_timestamp_seconds", "spiffe://m/service/a"): 123,
    }


def test_what_a_server_receives() -> None:
    book = ServedBook()
    place = book.of(PLACE)
    book.tally(place, "web").succeeded(0.5)
    book.tally(place, "jobs").failed("NOT_FOUND", 0.25)
    book.unauthorized, book.rate_limited, book.shed = 1, 2, 3
    metrics = MetricSet(FAMILIES)
    add_server(metrics, Server("orders", "o1", book, 4), serving=True)
    found = values(metrics)
    assert found["server_calls_total", "orders", "o1", PLACE, "OK", "web"] == 1
    assert found["server_calls_total", "orders", "o1", PLACE, "NOT_FOUND", "jobs"] == 1
    assert found["server_call_duration_seconds", "orders", "o1", PLACE].buckets[-1] == 2
    assert found["server_in_flight", "orders", "o1"] == 4
    assert [
        found["server_refused_calls_total", "orders", "o1", why]
        for why in ("unauthorized", "rate_limit", "concurrency_limit")
    ] == [1, 2, 3]
    assert found["server_serving", "orders", "o1"] == 1
