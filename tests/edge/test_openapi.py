"""The edge serves its own description, and answers as that says: the real shop behind a real Envoy, by schemathesis."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import given
from openapi_spec_validator import validate
from schemathesis import APIOperation, GenerationMode

from gateway.envoy import EnvoyRenderer
from gateway.openapi import render as render_openapi
from gateway.routes import build
from mesh_client.core.edge_policy import EdgePolicy
from mesh_client.core.model import Endpoint
from tests.edge.contract_rig import ContractRig
from tests.edge.envoy_process import EnvoyProcess, short_directory
from tests.edge.http_client import ask
from tests.gateway.compiling import ROOT, shop

KEY = "key-of-the-tests"
POLICY = {
    "services": {
        "shop.v1.InventoryService": {"upstream": "shop"},
        "shop.v1.OrderService": {
            "upstream": "shop",
            "authentication": ["api_key"],
            "methods": {"GetOrder": {"authentication": ["none"]}},
        },
        "shop.v1.PaymentService": {"upstream": "shop"},
    },
    "consumers": {"tests": {"api_keys": ["tests-key"]}},
}
ENDLESS = "shop.v1.InventoryService.WatchStock"


@pytest.fixture(scope="module")
def shop_edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    command = [sys.executable, "-m", "tests.edge.shop_server", str(tmp_path_factory.mktemp("shop"))]
    with (
        short_directory() as directory,
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        envoy = EnvoyProcess(directory)
        try:
            endpoint = Endpoint("shop", "127.0.0.1", int(process.stdout.readline()))
            policy = EdgePolicy.parse(POLICY)
            table = build(shop(), policy.services)
            document = json.dumps(render_openapi(table, title="Shop", version="1", policy=policy))
            keys = {"tests-key": KEY}
            envoy.start(
                EnvoyRenderer(table, policy, envoy.settings, api_keys=keys, openapi=document).render(
                    {"shop": [endpoint]}
                )
            )
            yield "127.0.0.1", envoy.port
        finally:
            envoy.stop()
            process.stdin.close()


def test_the_description_is_served_and_is_valid_and_says_what_is_asked_for(shop_edge: tuple[str, int]) -> None:
    answer = ask(shop_edge, "GET", "/openapi.json")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    document = json.loads(answer.body)
    validate(document)
    operations = {item["operationId"]: item for path in document["paths"].values() for item in path.values()}
    assert operations["shop.v1.OrderService.PlaceOrder"]["security"] == [{"api_key": []}]
    assert "security" not in operations["shop.v1.OrderService.GetOrder"]
    assert document["components"]["securitySchemes"].keys() == {"api_key"}


def test_what_is_not_exposed_is_not_described(rig: ContractRig) -> None:
    document = json.loads(rig.ask("/openapi.json").body)
    validate(document)
    described = {(verb.upper(), path) for path, item in document["paths"].items() for verb in item}
    assert ("GET", "/v1/gone") in described
    assert len(described) == len(rig.table.routes)
    assert rig.ask("/openapi.json?x").status == 200


Operation = APIOperation[Any, Any, Any, Any]


def operations(address: tuple[str, int]) -> list[Operation]:
    url = "http://{}:{}/openapi.json".format(*address)
    found: list[Operation] = [result.ok() for result in schemathesis.openapi.from_url(url).get_all_operations()]  # type: ignore[union-attr] # raises if there is none
    return [operation for operation in found if operation.definition.raw["operationId"] != ENDLESS]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_answers_are_as_described(mode: GenerationMode, shop_edge: tuple[str, int]) -> None:
    tried = [operation for operation in operations(shop_edge) if _run(operation, mode)]
    assert len(tried) >= (8 if mode is GenerationMode.POSITIVE else 5)


def _run(operation: Operation, mode: GenerationMode) -> bool:
    """False if there is no such request."""
    checks = [
        schemathesis.checks.not_a_server_error,
        schemathesis.checks.status_code_conformance,
        schemathesis.checks.content_type_conformance,
        schemathesis.checks.response_schema_conformance,
    ]

    @hypothesis.settings(
        max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @given(case=operation.as_strategy(mode))
    def run(case: schemathesis.Case[Any]) -> None:
        response = case.call(headers={"x-api-key": KEY})
        case.validate_response(response, checks=checks)

    try:
        run()
    except hypothesis.errors.Unsatisfiable:
        return False
    return True


def test_the_shop_is_used_by_rest(shop_edge: tuple[str, int]) -> None:
    """Everything that the shop's annotations show, in one visit."""
    key = {"x-api-key": KEY}

    def call(verb: str, path: str, body: object = None) -> dict[str, object]:
        answer = ask(shop_edge, verb, path, key, None if body is None else json.dumps(body))
        assert answer.status == 200, answer
        found = json.loads(answer.body)
        assert isinstance(found, dict)
        return found

    placed = call("POST", "/v1/orders", {"idempotencyKey": "visit", "sku": "grinder", "quantity": 2})["order"]
    assert isinstance(placed, dict)
    path = f"/v1/orders/{placed['orderId']}"
    assert placed["number"].isdigit()
    assert placed["takenAt"].endswith("Z")
    assert call("GET", path)["order"] == placed
    assert call("GET", "/v1/orders/by-key/visit")["order"] == placed
    noted = call("PATCH", path, {"note": "a gift"})["order"]
    assert noted == {**placed, "note": "a gift"}
    states = "states=ORDER_STATE_PLACED&states=ORDER_STATE_PENDING"
    listed = call(
        "GET",
        f"/v1/orders?{states}&filter.sku=grinder&filter.takenFrom={placed['takenAt']}&sort=ORDER_SORT_OLDEST_FIRST",
    )
    assert listed["orders"][0] == noted  # type: ignore[index] # JSON
    assert int(str(listed["totalAmountCents"])) >= 2 * 18900
    cancelled = call("POST", f"{path}:cancel", {"reason": "too loud"})["order"]
    assert cancelled == {**noted, "state": "ORDER_STATE_CANCELLED", "cancellation": "too loud"}
    assert call("GET", f"/v1/payments/{placed['orderId']}")["refunded"] is True
