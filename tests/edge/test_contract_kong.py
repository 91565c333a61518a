"""The contract of the REST edge, by a running Kong that the environment names: ``make test-kong``."""

from __future__ import annotations

import http.server
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from gateway.routes import build
from mesh_client.core.edge_policy import EdgePolicy
from tests.edge.contract import TABLE, kong_policy
from tests.edge.contract_rig import contract_api
from tests.edge.contract_rows import Answer, Row
from tests.edge.http_client import ask
from tests.edge.kong import NEEDED, KongAddresses, kong_configuration, kong_rig

FOR_KONG = [row for row in TABLE if row.kong is None or row.kong.answer is not None]
ASKED = FOR_KONG if all(os.environ.get(name) for name in NEEDED) else FOR_KONG[:1]
"""Without a Kong, one test that is skipped is enough."""


@pytest.fixture(scope="module")
def kong() -> Iterator[tuple[str, int]]:
    addresses = KongAddresses.from_environment()
    if addresses is None:
        pytest.skip(f"no Kong is named: set {', '.join(NEEDED)}")
    with kong_rig(addresses) as proxy:
        # Workers take new configuration one after the other.
        deadline = time.monotonic() + 30
        while ask(proxy, "GET", "/openapi.json").status != 200:
            assert time.monotonic() < deadline, "the configuration is not served"
            time.sleep(0.2)
        yield proxy


@pytest.mark.parametrize("row", ASKED, ids=lambda row: row.name)
def test_contract(row: Row, kong: tuple[str, int]) -> None:
    answer: Answer = row.answer if row.kong is None or row.kong.answer is None else row.kong.answer
    for _ in range(row.times - 1):
        ask(kong, row.verb, row.path, row.request_headers(), row.body)
    response = ask(kong, row.verb, row.path, row.request_headers(), row.body)
    answer.check(response.status, response.headers, response.body)


def test_the_configuration_of_the_contract_is_rendered() -> None:
    made = kong_configuration("127.0.0.1:50051")
    assert "vault://" not in made.declarative
    document = yaml.safe_load(made.declarative)
    assert [target for upstream in document["upstreams"] for target in upstream["targets"]] == [
        {"target": "127.0.0.1:50051", "weight": 100}
    ]
    assert {proto.file_name.partition("-")[0] for proto in made.protos} == {
        "contract.v1.ContractService",
        "contract.v1.GoneService",
    }
    assert document["routes"][0]["paths"] == ["~/openapi[.]json$"]


def test_kong_has_a_route_for_each_request_that_a_method_answers() -> None:
    services = yaml.safe_load(kong_configuration("127.0.0.1:50051").declarative)["services"]
    routes = [route for service in services for route in service["routes"] if "https" in route["protocols"]]
    table = build(contract_api(), EdgePolicy.parse(kong_policy()).services)
    for row in FOR_KONG:
        path = row.path.partition("?")[0]
        found = [
            route["name"]
            for route in sorted(routes, key=lambda route: -route["regex_priority"])
            if row.verb in route["methods"] and any(re.fullmatch(pattern[1:-1], path) for pattern in route["paths"])
        ]
        match = table.match(row.verb, path)
        assert found[:1] == ([match[0].name] if match is not None else found[:1] if row.verb == "OPTIONS" else [])


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"KONG_PROXY": "http://a:8000"}, "KONG_ADMIN, KONG_PROTOS is not set"),
        ({"KONG_PROXY": "a", "KONG_ADMIN": "b", "KONG_PROTOS": "c"}, "expected http://host:port"),
    ],
)
def test_a_kong_that_is_named_in_part_is_an_error(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NEEDED:
        monkeypatch.delenv(name, raising=False)
    assert KongAddresses.from_environment() is None
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        KongAddresses.from_environment()


def test_kong_gets_protos_first_and_then_its_configuration(tmp_path: Path) -> None:
    received: list[tuple[str, dict[str, str], list[str]]] = []

    class Admin(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            received.append((self.path, body, sorted(path.name for path in tmp_path.iterdir())))
            self.send_response(201)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Admin) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            admin = f"http://127.0.0.1:{server.server_port}"
            addresses = KongAddresses(("127.0.0.1", 1), admin, tmp_path, "/protos", "localhost")
            with kong_rig(addresses) as proxy:
                assert proxy == ("127.0.0.1", 1)
        finally:
            server.shutdown()
            thread.join()
    ((path, body, protos),) = received
    assert path == "/config?check_hash=1"
    assert all(f"/protos/{name}\n" in body["config"] for name in protos)
    assert len(protos) == 2
    assert "target: localhost:" in body["config"]
