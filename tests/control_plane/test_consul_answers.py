"""What Consul's answers say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.events import Registration
from control_plane.sources import StoredDocument
from control_plane.sources.consul_answers import (
    MalformedAnswerError,
    ServiceHealth,
    parse_checks,
    parse_health,
    parse_policies,
    parse_services,
    policy_prefix,
)
from mesh_client.core.model import Endpoint, Health, Locality
from mesh_client.core.policy import ServicePolicy

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def check(status: str = "passing", check_id: str = "service:x", **fields: Any) -> dict[str, Any]:
    return {"Node": "n1", "CheckID": check_id, "Status": status, "ServiceName": "orders", **fields}


def instance(node: str = "n1", checks: list[dict[str, Any]] | None = None, **service: Any) -> dict[str, Any]:
    return {
        "Node": {"Node": node, "Address": "10.0.0.9"},
        "Service": {
            "ID": "orders-1",
            "Service": "orders",
            "Tags": ["grpc-mesh"],
            "Address": "10.0.0.1",
            "Port": 80,
            "Meta": None,
            "Weights": {"Passing": 1, "Warning": 1},
            **service,
        },
        "Checks": checks,
    }


def only(entry: dict[str, Any]) -> Endpoint:
    health = parse_health([entry])
    assert health.problems == ()
    (endpoint,) = health.endpoints
    return endpoint


# -- health


def test_an_instance_becomes_an_endpoint() -> None:
    meta = {"version": "v2", "mesh-zone": "a", "mesh-region": "eu", "mesh-draining": "false"}
    assert only(instance(Meta=meta, Weights={"Passing": 7})) == Endpoint(
        "orders-1", "10.0.0.1", 80, 7, Health.HEALTHY, Locality("eu", "a"), {"version": "v2"}
    )


def test_the_nodes_address_stands_in_for_a_missing_one() -> None:
    assert only(instance(Address="")).address == "10.0.0.9"


def test_an_instance_without_weights_has_weight_one() -> None:
    assert only(instance(Weights=None)).weight == 1
    assert only(instance(Weights={})).weight == 1


@pytest.mark.parametrize(
    ("checks", "health"),
    [
        (None, Health.HEALTHY),
        ([], Health.HEALTHY),
        ([check("passing"), check("warning")], Health.HEALTHY),
        ([check("passing"), check("critical")], Health.UNHEALTHY),
        ([check("critical", "serfHealth")], Health.UNHEALTHY),
        ([check("critical"), check("critical", "_node_maintenance")], Health.DRAINING),
        ([check("critical", "_service_maintenance:orders-1")], Health.DRAINING),
    ],
)
def test_checks_decide_health(checks: list[dict[str, Any]] | None, health: Health) -> None:
    assert only(instance(checks=checks)).health is health


def test_a_mark_in_the_metadata_means_leaving() -> None:
    assert only(instance(Meta={"mesh-draining": "true"}, checks=[check("critical")])).health is Health.DRAINING


def test_a_registration_is_told_apart_by_what_it_says_of_itself_else_by_when_consul_created_it() -> None:
    says = instance(ID="a", Meta={"mesh-registration": "x"}, CreateIndex=7)
    silent = instance(ID="b", CreateIndex=7)
    assert parse_health([says, silent, instance(ID="c")]).registrations == {
        "a": Registration("x", of_process=True),
        "b": Registration("7"),
        "c": Registration(),
    }
    assert only(says).metadata == {}


def test_instances_without_the_tag_are_ignored() -> None:
    assert parse_health([instance(Tags=["other"]), instance(Tags=None), instance(Tags=[7])]) == ServiceHealth(
        (), {}, ()
    )


def test_endpoints_are_ordered_by_id() -> None:
    health = parse_health([instance(ID="b"), instance(ID="a")])
    assert [endpoint.id for endpoint in health.endpoints] == ["a", "b"]


def test_ids_that_are_not_unique_in_the_service_get_the_nodes_name() -> None:
    health = parse_health([instance("n1"), instance("n2"), instance("n3", ID="c"), instance(ID="orders")])
    assert [endpoint.id for endpoint in health.endpoints] == ["c", "orders-1:n1", "orders-1:n2", "orders:n1"]
    assert health.problems == ()


def test_an_instance_listed_twice_counts_once() -> None:
    health = parse_health([instance(), instance()])
    assert [endpoint.id for endpoint in health.endpoints] == ["orders-1:n1"]
    assert "listed twice" in health.problems[0]


@pytest.mark.parametrize(
    "bad",
    [
        instance(ID="a/b"),
        instance(ID=""),
        instance(Port=0),
        instance(Port=70000),
        instance(Port="80"),
        instance(Port=True),
        instance(Address="0.0.0.0"),
        instance(Address=7),
        instance(Tags="grpc-mesh"),
        instance(Weights=[]),
        instance(Weights={"Passing": "many"}),
        instance(Meta=[]),
        instance(checks=[check(7)]),  # type: ignore[arg-type]  # what Consul may answer
        instance(checks=["critical"]),  # type: ignore[list-item]  # likewise
        {"Node": None},
        {},
        None,
        7,
    ],
)
def test_a_bad_instance_is_left_out_and_disturbs_no_other(bad: Any) -> None:
    health = parse_health([bad, instance(ID="good")])
    assert [endpoint.id for endpoint in health.endpoints] == ["good"]
    assert len(health.problems) == 1


def test_what_is_bad_in_a_good_instance_is_left_out_alone() -> None:
    meta: dict[str, object] = {f"key-{number:02}": "v" for number in range(33)}
    meta |= {"long": "x" * 300, "": "empty", "odd": 7, "mesh-zone": "no such zone"}
    health = parse_health([instance(Meta=meta, Weights={"Passing": 5000})])
    assert health.endpoints[0].weight == 1000
    assert len(health.endpoints[0].metadata) == 32
    assert health.endpoints[0].locality == Locality()
    assert len(health.problems) == 6


@pytest.mark.parametrize("answer", [None, {}, 7, "x"])
def test_an_answer_that_is_no_list_of_instances_is_malformed(answer: object) -> None:
    with pytest.raises(MalformedAnswerError):
        parse_health(answer)


@given(st.lists(ANYTHING, max_size=4))
def test_any_list_parses(answer: list[Any]) -> None:
    assert parse_health(answer).endpoints == ()


@given(st.dictionaries(st.sampled_from(sorted(instance()["Service"])), ANYTHING))
def test_any_instance_parses(service: dict[str, Any]) -> None:
    health = parse_health([instance(**service), instance(ID="good")])
    assert "good" in [endpoint.id for endpoint in health.endpoints]


# -- services


def test_services_of_the_mesh_have_its_tag() -> None:
    answer = {"consul": [], "orders": ["a", "grpc-mesh"], "web": ["a"]}
    services = parse_services(answer)
    assert (services.names, services.problems, services.empty, services.complete) == ({"orders"}, (), False, True)


def test_a_service_whose_name_is_no_name_is_described() -> None:
    services = parse_services({"Orders!": ["grpc-mesh"], "payments": ["grpc-mesh"]})
    assert services.names == {"payments"}
    assert "'Orders!'" in services.problems[0]
    assert not services.complete


def test_an_empty_list_is_seen_as_such() -> None:
    assert parse_services({}).empty


@pytest.mark.parametrize("answer", [None, [], "x", {"orders": None}, {"orders": "grpc-mesh"}])
def test_an_answer_that_is_no_list_of_services_is_malformed(answer: object) -> None:
    with pytest.raises(MalformedAnswerError):
        parse_services(answer)


@given(ANYTHING)
def test_services_parse_or_are_malformed(answer: object) -> None:
    try:
        parse_services(answer)
    except MalformedAnswerError:
        assert answer != {}


# -- checks


def test_checks_are_known_by_node_and_id() -> None:
    assert parse_checks([check("passing"), check("critical", "other", ServiceName="web")]) == {
        ("n1", "service:x"): ("orders", "passing"),
        ("n1", "other"): ("web", "critical"),
    }


@pytest.mark.parametrize("answer", [None, {}, [{}], [7], [{"Node": "n", "CheckID": "c", "Status": "x"}]])
def test_an_answer_that_is_no_list_of_checks_is_malformed(answer: object) -> None:
    with pytest.raises(MalformedAnswerError):
        parse_checks(answer)


# -- policies

PREFIX = policy_prefix(ServicePolicy)


def key(name: str, value: object = "c2VydmljZTogeA==", index: object = 7) -> dict[str, object]:
    return {"Key": f"mesh/policies/{name}", "Value": value, "ModifyIndex": index}


def test_a_key_is_a_policy() -> None:
    documents, problems = parse_policies([key("orders"), key("payments", None, 9)], PREFIX)
    assert documents == {
        "orders": StoredDocument("orders", b"service: x", "7"),
        "payments": StoredDocument("payments", b"", "9"),
    }
    assert problems == ()


def test_a_key_that_names_no_service_is_described() -> None:
    documents, problems = parse_policies([key("orders/old"), key(""), key("orders")], PREFIX)
    assert set(documents) == {"orders"}
    assert len(problems) == 1
    assert "orders/old" in problems[0]


@pytest.mark.parametrize(
    "answer",
    [None, {}, [{}], [7], [key("a", "not base64!")], [key("a", 7)], [key("a", index="7")], [key("a", "é")]],
)
def test_an_answer_that_is_no_list_of_keys_is_malformed(answer: object) -> None:
    with pytest.raises(MalformedAnswerError):
        parse_policies(answer, PREFIX)
