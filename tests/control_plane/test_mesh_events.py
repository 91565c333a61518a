"""What happens in the mesh, found by comparing what is with what was."""

from __future__ import annotations

from typing import Any

import pytest

from control_plane.catalog_service import EndpointRecord
from control_plane.mesh_events import (
    MAX_REJECTIONS,
    CertificateIssued,
    Detector,
    EndpointDown,
    EndpointEjected,
    EndpointUp,
    MeshEvent,
    PolicyApplied,
    PolicyRejected,
    RootRotated,
)
from control_plane.policies import PROVISIONAL
from control_plane.subscription import ClientNode
from control_plane.telemetry.recorder import CalledState, Reporter
from mesh_client.core.breaker import BreakerState
from mesh_client.core.load_report import ServiceState
from mesh_client.core.model import Endpoint, Health, Locality
from mesh_client.core.store import Resolution


def record(name: str, port: int = 1, health: Health = Health.HEALTHY, zone: str = "") -> EndpointRecord:
    endpoint = Endpoint(name, "10.0.0.1", port, health=health, locality=Locality(zone=zone))
    return EndpointRecord(endpoint, "hand", 0.0, held=False)


def reporter(node_id: str, **ejected: Any) -> Reporter:
    """A process that reports, with what it has ejected of each service that it calls."""
    made = Reporter(ClientNode(node_id, "web"), "e", "", 0.0)
    for service, endpoints in ejected.items():
        made.called[service] = state = CalledState(service)
        if endpoints is not None:
            state.state = ServiceState(Resolution.ACTIVE, "", "", BreakerState.CLOSED, tuple(endpoints), 3, 0, 0, 0)
    return made


def test_endpoints_begin_and_end_to_take_calls() -> None:
    detector = Detector()
    assert detector.endpoints("orders", [record("a", zone="east"), record("b", health=Health.UNHEALTHY)]) == [
        EndpointUp("orders", "a", "10.0.0.1:1", "east")
    ]
    assert detector.endpoints("orders", [record("a", zone="east"), record("b")]) == [
        EndpointUp("orders", "b", "10.0.0.1:1", "")
    ]
    assert detector.endpoints("orders", [record("a"), record("b")]) == []
    assert detector.endpoints("orders", [record("a", health=Health.DRAINING)]) == [
        EndpointDown("orders", "a", "10.0.0.1:1", listed=True),
        EndpointDown("orders", "b", "10.0.0.1:1", listed=False),
    ]
    assert detector.endpoints("orders", []) == []
    assert detector.endpoints("payments", [record("a")]) == [EndpointUp("payments", "a", "10.0.0.1:1", "")]


def test_an_id_at_another_address_is_another_endpoint() -> None:
    detector = Detector()
    detector.endpoints("orders", [record("a", 1)])
    assert detector.endpoints("orders", [record("a", 2)]) == [
        EndpointDown("orders", "a", "10.0.0.1:1", listed=False),
        EndpointUp("orders", "a", "10.0.0.1:2", ""),
    ]


def test_a_policy_is_applied_when_another_one_is_in_force() -> None:
    detector = Detector()
    assert detector.policy("orders", "v1") == [PolicyApplied("orders", "v1")]
    assert detector.policy("orders", "v1") == []
    assert detector.policy("orders", "v2") == [PolicyApplied("orders", "v2")]
    assert detector.policy("orders", f"v3{PROVISIONAL}") == []


def test_an_invalid_policy_is_told_once() -> None:
    detector = Detector()
    detector.policy("orders", "v1")
    assert detector.policy("orders", "", "s1", "retry: too many") == [
        PolicyRejected("orders", "", "", "retry: too many")
    ]
    assert detector.policy("orders", "", "s1", "retry: too many") == []
    assert detector.policy("orders", "", "s2", "worse") == [PolicyRejected("orders", "", "", "worse")]
    # The one that was in force all the time is in force again.
    assert detector.policy("orders", "v1") == []
    assert detector.policy("orders", "", "s2", "worse") == [PolicyRejected("orders", "", "", "worse")]


def test_clients_that_reject_a_policy_are_told_once_each_and_not_all_of_them() -> None:
    detector = Detector()
    assert detector.rejected("orders", "v1", "web-1", "no") == [PolicyRejected("orders", "v1", "web-1", "no")]
    assert detector.rejected("orders", "v1", "web-1", "no") == []
    told = [detector.rejected("orders", "v1", f"job-{number}", "no") for number in range(50)]
    assert sum(map(len, told)) == MAX_REJECTIONS - 1
    assert detector.rejected("orders", "v2", "web-1", "no") == [PolicyRejected("orders", "v2", "web-1", "no")]


def test_an_endpoint_that_many_have_ejected_is_told_when_it_begins() -> None:
    detector = Detector()
    one, two, three = reporter("1", orders=["a", "b"]), reporter("2", orders=["a"]), reporter("3", orders=None)
    assert detector.ejections([one]) == []
    assert detector.ejections([one, two, three]) == [EndpointEjected("orders", "a", 2)]
    assert detector.ejections([one, two]) == []
    others = [reporter(str(number), orders=[]) for number in range(3)]
    assert detector.ejections([one, two, *others]) == []  # most of its callers are content with it
    two.gone_at = 5.0
    assert detector.ejections([one, two]) == []
    two.gone_at = None
    assert detector.ejections([one, two]) == [EndpointEjected("orders", "a", 2)]


@pytest.mark.parametrize(
    ("roots", "signing", "step"),
    [
        (("a", "b"), "a", "add"),
        (("a", "b"), "b", "overlap"),
        (("b",), "b", "overlap"),
        ((), "a", "retire"),
        (("a",), "a", None),
    ],
)
def test_a_step_of_a_rotation(roots: tuple[str, ...], signing: str, step: str | None) -> None:
    detector = Detector()
    assert detector.roots(("a",), "a") == []
    assert detector.roots(roots, signing) == ([] if step is None else [RootRotated(step, roots)])


def test_a_whole_rotation() -> None:
    detector = Detector()
    steps = [(("a",), "a"), (("a", "b"), "a"), (("a", "b"), "b"), (("b",), "b")]
    told = [event for roots, signing in steps for event in detector.roots(roots, signing)]
    assert [event.step for event in told if isinstance(event, RootRotated)] == ["add", "overlap", "retire"]


def test_events_are_ordered_by_service() -> None:
    events: list[MeshEvent] = [
        EndpointUp("orders", "a", "t", ""),
        EndpointDown("orders", "a", "t", listed=False),
        EndpointEjected("orders", "a", 2),
        PolicyApplied("orders", "v"),
        PolicyRejected("orders", "v", "n", "r"),
        CertificateIssued("spiffe://mesh.internal/service/orders", "w", "1f", 5.0, renewal=False),
    ]
    assert {event.key for event in events} == {"orders"}
    assert RootRotated("add", ()).key == ""
