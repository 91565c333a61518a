"""What can be asked about the calls of the last minutes."""

from __future__ import annotations

from typing import Any

import pytest

from control_plane.telemetry.recorder import Recorder, Session
from control_plane.telemetry.timeline import BUSY, CODES, PEAK, STEPS, WINDOW
from control_plane.telemetry.traffic import MAX_FAILURES, Traffic
from control_plane.telemetry.window import EventKey, Limits, MethodKey, ReceivedKey, Window
from mesh_client.core.errors import Reason
from mesh_client.core.tally import OTHER
from tests.control_plane.load_reports import EVENT, PLACE, Process

GET = "/shop.v1.OrderService/GetOrder"


class World:
    """Processes that report to a recorder since ``since``."""

    def __init__(self, since: float = 0.0) -> None:
        self.window = Window()
        self.recorder = Recorder(self.window)
        self.traffic = Traffic(self.recorder, self.window, since)
        self.sessions: dict[str, Session] = {}

    def report(self, process: Process, now: float) -> None:
        name = process.node.id
        if name not in self.sessions:
            self.sessions[name] = self.recorder.open(process.node, process.epoch, now - process.began, "", now)
        self.recorder.take(self.sessions[name], process.report(now), now)

    def gone(self, process: Process, now: float) -> None:
        self.recorder.close(self.sessions[process.node.id], now)


def steady(world: World, process: Process, calls: int, until: float, method: str = PLACE) -> None:
    """So many calls within each 5 s, reported at their end."""
    for round_number in range(1, round(until / 5) + 1):
        process.calls(calls, method)
        world.report(process, round_number * 5.0)


def test_an_edge_has_rate_success_and_percentiles_of_the_calls_of_all_processes_of_its_caller() -> None:
    world, one, two = World(), Process("checkout-1"), Process("checkout-2")
    steady(world, one, 50, 120.0)
    steady(world, two, 100, 120.0)
    two.fails(10)
    world.report(two, 125.0)
    world.report(one, 125.0)
    (edge,) = world.traffic.edges(125.0)
    assert (edge.caller, edge.service, edge.processes) == ("checkout", "orders", 2)
    assert edge.calls.rate == pytest.approx(30, rel=0.1)
    assert edge.calls.success_rate == pytest.approx(1 - 10 / (edge.calls.count))
    assert edge.calls.p50 == pytest.approx(0.1, rel=0.2)
    assert edge.calls.retries == 20
    assert (edge.in_flight, edge.breakers_open, edge.ejected) == (0, 0, ())
    assert edge.total == 24 * 150 + 10


def test_a_rate_is_right_between_two_reports_too() -> None:
    world, process = World(), Process()
    steady(world, process, 50, 100.0)
    for ago in (0.0, 1.0, 4.9):
        (edge,) = world.traffic.edges(100.0 + ago, 30.0)
        assert edge.calls.rate == pytest.approx(10.0, rel=0.01)
    world.gone(process, 100.0)
    (edge,) = world.traffic.edges(110.0, 20.0)
    assert edge.calls.rate == pytest.approx(5.0, rel=0.4)


def test_a_rate_right_after_the_start_is_reckoned_from_it() -> None:
    world, process = World(since=1000.0), Process(began=1000.0)
    process.calls(50)
    world.report(process, 1005.0)
    (edge,) = world.traffic.edges(1005.0)
    assert edge.calls.rate == pytest.approx(10.0)
    assert world.traffic.reach(1005.0, 60.0) == 5.0
    assert world.traffic.reach(5000.0, 1e9) == WINDOW


def test_edges_that_were_used_within_the_window_are_there_without_calls() -> None:
    world, process = World(), Process()
    steady(world, process, 5, 10.0)
    world.report(process, 300.0)
    (edge,) = world.traffic.edges(300.0)
    assert (edge.calls.count, edge.calls.rate, edge.calls.success_rate) == (0, 0.0, None)
    world.recorder.expire(700.0)
    assert world.traffic.edges(700.0) == []


def test_edges_of_one_service_are_its_callers_and_its_callees() -> None:
    world = World()
    for name, caller in (("checkout-1", "checkout"), ("orders-1", "orders"), ("jobs-1", "jobs")):
        process = Process(name, caller)
        if caller == "orders":
            process.world.name = "stock"
        if caller == "jobs":
            process.world.name = "mail"
        process.calls()
        world.report(process, 5.0)
    edges = {(edge.caller, edge.service) for edge in world.traffic.edges(5.0)}
    assert edges == {("checkout", "orders"), ("orders", "stock"), ("jobs", "mail")}
    of_orders = {(edge.caller, edge.service) for edge in world.traffic.edges(5.0, service="orders")}
    assert of_orders == {("checkout", "orders"), ("orders", "stock")}


def test_an_edge_says_in_how_many_processes_the_breaker_is_open_and_what_is_ejected() -> None:
    strict: dict[str, Any] = {
        "circuit_breaker": {"consecutive_failures": 2},
        "outlier_detection": {"consecutive_failures": 1},
        "retry": {"max_attempts": 1},
    }
    world, well, ill = World(), Process("checkout-1"), Process("checkout-2", **strict)
    well.calls()
    ill.fails(2, now=3.0)
    world.report(well, 5.0)
    world.report(ill, 5.0)
    (edge,) = world.traffic.edges(5.0)
    assert (edge.processes, edge.breakers_open, len(edge.ejected)) == (2, 1, 1)
    (ejected,) = [each for each in world.traffic.endpoints("orders", 5.0) if each.ejected_by]
    assert (ejected.endpoint_id, ejected.ejected_by) == (edge.ejected[0], 1)
    assert [event.what for event in world.traffic.events("orders")] == [
        f"ejected {edge.ejected[0]} for 30 s: failures in a row",
        "breaker closed -> open",
    ]
    assert [(event.at, event.caller, event.node_id) for event in world.traffic.events()][:1] == [
        (3.0, "checkout", "checkout-2")
    ]
    assert world.traffic.events("stock") == []
    world.gone(ill, 6.0)
    (edge,) = world.traffic.edges(6.0)
    assert (edge.processes, edge.breakers_open) == (1, 0)
    assert [each.ejected_by for each in world.traffic.endpoints("orders", 6.0)] == [0, 0]


def test_methods_and_endpoints_of_a_service_are_summed_over_its_callers() -> None:
    world = World()
    for name, caller in (("checkout-1", "checkout"), ("jobs-1", "jobs")):
        process = Process(name, caller)
        process.calls(3)
        process.calls(2, GET)
        process.fails(1)
        world.report(process, 5.0)
    methods = {each.method: (each.calls.count, each.calls.attempts) for each in world.traffic.methods("orders", 5.0)}
    assert methods == {PLACE: (8, 12), GET: (4, 4)}
    endpoints = world.traffic.endpoints("orders", 5.0)
    assert [each.endpoint_id for each in endpoints] == ["a", "b"]
    assert sum(each.attempts.count for each in endpoints) == 16
    assert world.traffic.methods("stock", 5.0) == []
    assert (world.traffic.calls_to("orders", 5.0).count, world.traffic.calls_to("stock", 5.0).count) == (12, 0)


def test_failures_are_grouped_the_largest_first_with_an_example() -> None:
    world, one, two = World(), Process("checkout-1"), Process("jobs-1", "jobs")
    one.fails(2, now=3.0, trace_id="a" * 32)
    two.fails(5, now=4.0)
    world.report(one, 5.0)
    world.report(two, 5.0)
    largest, smaller = world.traffic.failures(5.0)
    assert (largest.caller, largest.count, smaller.caller, smaller.count) == ("jobs", 5, "checkout", 2)
    assert (largest.code, largest.reason, largest.method) == ("UNAVAILABLE", Reason.ATTEMPTS_FAILED, PLACE)
    assert smaller.example is not None
    assert smaller.example.example.at == 3.0
    assert world.traffic.failures(5.0, service="stock") == []
    traced = world.traffic.failure_of("a" * 32)
    assert traced is not None
    assert (traced.caller, traced.count) == ("checkout", 1)
    assert world.traffic.failure_of("b" * 32) is None
    assert world.traffic.failure_of("") is None
    assert world.traffic.failures(100.0, 20.0) == []


def test_an_answer_about_failures_is_bounded() -> None:
    world, process = World(), Process()
    for number in range(MAX_FAILURES + 5):
        process.world.failed_calls[f"/s/M{number}", "INTERNAL", Reason.ATTEMPTS_FAILED] = 1
    world.report(process, 5.0)
    assert len(world.traffic.failures(5.0)) == MAX_FAILURES


def test_the_history_of_an_edge_has_a_moment_for_each_step() -> None:
    world, process = World(since=3.0), Process(began=3.0)
    for now in (8.0, 13.0, 18.0, 23.0):
        process.calls(10)
        world.report(process, now)
    moments = world.traffic.history(23.0, "checkout", "orders")
    assert [moment.ago for moment in moments] == [13.0, 3.0, 0.0]
    assert [moment.calls.count for moment in moments] == [14, 20, 6]
    assert [moment.calls.rate for moment in moments] == [2.0, 2.0, 2.0]
    assert [moment.calls.count for moment in world.traffic.history(23.0)] == [14, 20, 6]
    assert [moment.calls.count for moment in world.traffic.history(23.0, service="stock")] == [0, 0, 0]
    assert len(world.traffic.history(10_000.0)) == STEPS


def test_what_instances_received_is_given_step_by_step() -> None:
    world = World()
    for name in ("orders-2", "orders-1"):
        process = Process(name, "orders")
        process.receives(3, "checkout", took=0.5)
        process.book.peak = 2
        world.report(process, 5.0)
        process.receives(1, "", code="PERMISSION_DENIED")
        world.report(process, 19.0)
    received = world.traffic.received("orders", 19.0)
    assert [(each.instance_id, each.step) for each in received] == [
        ("orders-1", 0),
        ("orders-1", 1),
        ("orders-2", 0),
        ("orders-2", 1),
    ]
    first = received[0]
    assert first.calls["checkout", PLACE][CODES["OK"]] == 3
    assert first.calls["checkout", PLACE][BUSY] / 1e6 == pytest.approx(1.5, rel=0.1)
    assert first.whole[PEAK] == 2
    assert world.traffic.received("stock", 19.0) == []


def test_calls_of_a_caller_that_does_not_report_are_those_that_instances_received() -> None:
    world, one, two = World(), Process("orders-1", "orders"), Process("orders-2", "orders")
    for now in (5.0, 10.0):
        one.receives(20, "edge", took=0.5)
        one.receives(4, "edge", code="PERMISSION_DENIED", method=GET)
        two.receives(16, "edge", took=0.5)
        world.report(one, now)
        world.report(two, now)
    (edge,) = world.traffic.edges(10.0)
    assert (edge.caller, edge.service, edge.received, edge.total) == ("edge", "orders", True, 80)
    assert edge.calls.codes == {"OK": 72, "PERMISSION_DENIED": 8}
    assert edge.calls.rate == pytest.approx(8.0)
    assert edge.calls.success_rate == pytest.approx(0.9)
    assert edge.calls.p50 == pytest.approx(0.5, rel=0.2)
    assert (edge.calls.retries, edge.processes, edge.in_flight, edge.breakers_open, edge.ejected) == (0, 0, 0, 0, ())
    assert world.traffic.edges(10.0, service="orders") == world.traffic.edges(10.0, service="edge") == [edge]
    assert world.traffic.edges(10.0, service="stock") == []
    assert world.traffic.calls_to("orders", 10.0).count == 80
    assert world.traffic.calls_to("edge", 10.0).count == 0
    methods = world.traffic.methods("orders", 10.0)
    assert [(each.method, each.calls.count) for each in methods] == [(GET, 8), (PLACE, 72)]
    endpoints = world.traffic.endpoints("orders", 10.0)
    assert [(each.endpoint_id, each.attempts.count) for each in endpoints] == [("orders-1", 48), ("orders-2", 32)]
    assert [moment.calls.count for moment in world.traffic.history(10.0, "edge", "orders")] == [80, 0]
    assert [moment.calls.count for moment in world.traffic.history(10.0, "web")] == [0, 0]
    (failed,) = world.traffic.failures(10.0)
    assert (failed.caller, failed.method, failed.code, failed.count) == ("edge", GET, "PERMISSION_DENIED", 8)
    assert (failed.reason, failed.example, failed.received) == (None, None, True)
    assert world.traffic.failures(10.0, service="stock") == []
    world.recorder.expire(700.0)
    assert world.traffic.edges(700.0) == []
    assert len(world.window.served) == 0


def test_calls_that_their_caller_reports_are_not_counted_as_received_too() -> None:
    world, client, server = World(), Process("checkout-1"), Process("orders-1", "orders")
    client.calls(10)
    client.fails(1)  # three attempts, each of which the server has counted
    server.receives(10, "checkout")
    server.receives(3, "checkout", code="UNAVAILABLE")
    server.receives(5, "edge")
    world.report(server, 5.0)
    early = {edge.caller: (edge.received, edge.calls.count) for edge in world.traffic.edges(5.0)}
    assert early == {"checkout": (True, 13), "edge": (True, 5)}
    world.report(client, 5.0)
    edges = {edge.caller: (edge.received, edge.calls.count) for edge in world.traffic.edges(5.0)}
    assert edges == {"checkout": (False, 11), "edge": (True, 5)}
    assert world.traffic.calls_to("orders", 5.0).count == 16
    assert sum(each.calls.count for each in world.traffic.methods("orders", 5.0)) == 16
    endpoints = {each.endpoint_id: each.attempts.count for each in world.traffic.endpoints("orders", 5.0)}
    assert endpoints.pop("orders-1") == 5
    assert sum(endpoints.values()) == 13
    assert sum(moment.calls.count for moment in world.traffic.history(5.0, service="orders")) == 16
    assert [(each.caller, each.received) for each in world.traffic.failures(5.0)] == [("checkout", False)]


def test_received_calls_whose_caller_is_not_told_apart_count_only_where_nobody_reports() -> None:
    world, client, server = World(), Process("checkout-1"), Process("orders-1", "orders")
    server.receives(7, "")
    server.receives(2, OTHER)
    world.report(server, 5.0)
    assert [(edge.caller, edge.calls.count) for edge in world.traffic.edges(5.0)] == [("", 7), (OTHER, 2)]
    client.calls(7)  # without identity these are the same calls
    world.report(client, 5.0)
    assert [(edge.caller, edge.calls.count) for edge in world.traffic.edges(5.0)] == [("checkout", 7)]


def test_a_caller_whose_services_are_not_told_apart_any_more_is_not_counted_twice() -> None:
    window, counted = Window(Limits(keys_of_one=1)), {CODES["OK"]: 1}
    for service in ("stock", "orders"):
        window.add_calls(MethodKey("checkout", service, PLACE), counted, 5.0, 5.0)
    window.add_received(ReceivedKey("orders", "orders-1", "checkout", PLACE), counted, 5.0, 5.0)
    window.add_received(ReceivedKey("mail", "mail-1", "", PLACE), counted, 5.0, 5.0)
    traffic = Traffic(Recorder(window), window, 0.0)
    assert [(edge.service, edge.received) for edge in traffic.edges(5.0)] == [(OTHER, False), ("stock", False)]


def test_a_service_is_known_once_a_process_is_of_it_or_calls_it() -> None:
    world, process = World(), Process()
    assert not world.traffic.knows("orders")
    process.calls()
    world.report(process, 5.0)
    assert world.traffic.knows("orders")
    assert world.traffic.knows("checkout")
    assert not world.traffic.knows("stock")


def test_an_event_edge_leads_from_the_publisher_to_the_group_that_handles() -> None:
    world, one, two = World(), Process("shipping-1", "shipping"), Process("shipping-2", "shipping")
    for now in (5.0, 10.0):
        one.handles(10, "orders")
        one.handles(5, "mesh:control-plane", "mesh.v1.EndpointUp")
        two.handles(9, "orders", took=0.4)
        two.handles(1, "orders", code="UNKNOWN", took=0.4)
        world.report(one, now)
        world.report(two, now)
    up, placed = world.traffic.event_edges(10.0)
    assert (up.publisher, up.service, up.group, up.type) == (
        "mesh:control-plane",
        "shipping",
        "main",
        "mesh.v1.EndpointUp",
    )
    assert (placed.publisher, placed.type, placed.handled.count) == ("orders", EVENT, 40)
    assert placed.handled.rate == pytest.approx(4.0)
    assert placed.handled.codes == {"OK": 38, "UNKNOWN": 2}
    assert placed.handled.success_rate == pytest.approx(0.95)
    assert placed.handled.p99 == pytest.approx(0.4, rel=0.2)
    assert world.traffic.event_edges(10.0, service="orders") == [placed]
    assert world.traffic.event_edges(10.0, service="shipping") == [up, placed]
    assert world.traffic.event_edges(10.0, service="payments") == []
    # They are no calls: nobody waits for an answer.
    assert [edge for edge in world.traffic.edges(10.0) if edge.calls.count] == []


def test_event_edges_are_bounded_and_forgotten_like_everything_else() -> None:
    world = World()
    many = Process("shipping-1", "shipping")
    for number in range(150):
        many.handles(1, f"publisher-{number}")
    world.report(many, 5.0)
    edges = world.traffic.event_edges(5.0)
    assert sum(edge.handled.count for edge in edges) == 150
    assert len(edges) == 101
    tight = Window(Limits(keys_of_one=3))
    for number in range(5):
        tight.events.add(EventKey("shipping", "main", f"publisher-{number}", EVENT), {0: 1}, 5.0, 5.0)
    assert (
        EventKey("shipping", "main", OTHER, OTHER) in tight.events
        or EventKey("shipping", OTHER, OTHER, OTHER) in tight.events
    )
    world.recorder.expire(5.0 + WINDOW + 20.0)
    assert world.traffic.event_edges(6.0 + WINDOW) == []
