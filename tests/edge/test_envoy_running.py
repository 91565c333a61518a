"""A running Envoy follows the mesh: endpoints, policies and certificates change, and nothing restarts."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import pytest

from gateway.envoy_settings import DownstreamTls, UpstreamTls
from mesh_client.core.identity import Principal
from tests.certificates import Certificate, TestAuthority
from tests.edge import contract
from tests.edge.contract_rig import ContractRig, contract_rig, contract_server, local, running_envoy
from tests.edge.contract_rows import Answer
from tests.edge.http_client import ask
from tests.ports import held_address

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


class KeptConnection:
    """A connection that is used again, and notices if the other side closes it."""

    def __init__(self, rig: ContractRig) -> None:
        self._connection = http.client.HTTPConnection(*rig.address, timeout=10)

    def __enter__(self) -> Self:
        self._connection.connect()
        self._socket = self._connection.sock
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def get(self, path: str) -> int:
        self._connection.request("GET", path)
        response = self._connection.getresponse()
        response.read()
        return response.status

    @property
    def kept(self) -> bool:
        return self._connection.sock is self._socket


@pytest.fixture
def changing(rig: ContractRig) -> Iterator[ContractRig]:
    """The rig, as it was again after the test."""
    yield rig
    rig.envoy.apply(rig.render())


def test_endpoints_move_under_a_connection_that_stays(changing: ContractRig) -> None:
    with contract_server() as port, KeptConnection(changing) as connection:
        assert connection.get("/v1/echo/a") == 200
        with contract_server() as other:
            changing.envoy.apply(changing.render(local(other, "two")))
            before = changing.envoy.counters(r"^cluster\.contract\.membership_total$")
            assert [connection.get("/v1/echo/a") for _ in range(20)] == [200] * 20
            changing.envoy.apply(changing.render(local(port, "three"), local(other, "two")))
            assert changing.envoy.counters(r"^cluster\.contract\.membership_total$") != before
            changing.envoy.apply(changing.render(local(port, "three")))
        assert [connection.get("/v1/echo/a") for _ in range(20)] == [200] * 20
        changing.envoy.apply(changing.render())
        assert connection.get("/v1/echo/a") == 200
        assert connection.kept


def test_an_endpoint_that_refuses_connections_costs_no_request(changing: ContractRig) -> None:
    with held_address() as nobody:
        dead = local(int(nobody.rpartition(":")[2]), "dead")
        changing.envoy.apply(changing.render(dead, changing.endpoint))
        assert {changing.ask("/v1/echo/a").status for _ in range(30)} == {200}
        changing.envoy.apply(changing.render(dead))
        answer = changing.ask("/v1/echo/a")
        Answer(503, code=14, message="the service cannot be reached").check(answer.status, answer.headers, answer.body)


def test_an_endpoint_can_be_a_hosts_name(changing: ContractRig) -> None:
    named = changing.render(local(changing.endpoint.port, "named", "localhost"))
    assert "eds/contract.json" not in named.files
    changing.envoy.apply(named)
    assert changing.ask("/v1/echo/a").status == 200
    changing.envoy.apply(changing.render())
    assert changing.ask("/v1/echo/a").status == 200


def test_a_policy_changes_under_a_connection_that_stays(changing: ContractRig) -> None:
    service = {"upstream": "contract", "authentication": ["api_key"]}
    with KeptConnection(changing) as connection:
        assert connection.get("/v1/echo/a") == 200
        changing.envoy.apply(changing.render(services={"contract.v1.ContractService": service}))
        assert connection.get("/v1/echo/a") == 401
        assert connection.get("/v1/gone") == 404
        changing.envoy.apply(changing.render())
        assert connection.get("/v1/echo/a") == 200
        assert connection.kept


def test_a_key_is_replaced_while_requests_are_answered(changing: ContractRig) -> None:
    old, new = {"x-api-key": contract.KEYS["web-key"]}, {"x-api-key": "another-key"}
    answers: list[int] = []
    slow = threading.Thread(target=lambda: answers.append(changing.ask("/v1/sleep/300").status))
    slow.start()
    changing.envoy.apply(changing.render(keys={**contract.KEYS, "web-key": "another-key"}))
    until(lambda: changing.ask("/v1/with-key", new).status == 200, "the new key is not known")
    assert changing.ask("/v1/with-key", old).status == 401
    slow.join()
    assert answers == [200]


def test_what_envoy_cannot_use_changes_nothing(changing: ContractRig) -> None:
    good = changing.render()
    broken = good.files["rds.json"].replace('"regex": "/v1/count/', '"regex": "((/v1/count/')
    changing.envoy.write({"rds.json": broken})
    rejected = "http.edge.rds.edge.update_rejected"
    until(lambda: changing.envoy.counters("update_rejected$")[rejected] > 0, "it was not rejected")
    assert changing.ask("/v1/count/1").status == 200
    changing.envoy.apply(good)


def test_a_stream_that_has_begun_carries_its_status_in_trailers(rig: ContractRig) -> None:
    with socket.create_connection(rig.address, timeout=10) as connection:
        connection.sendall(b"GET /v1/count/1?code=5 HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        received = b"".join(iter(lambda: connection.recv(4096), b""))
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b'{"number":1}\n' in body
    assert body.rstrip().endswith(b"grpc-status: 5\r\ngrpc-message: counted")


def test_messages_of_a_stream_arrive_as_they_are_sent(rig: ContractRig) -> None:
    for milliseconds, lines in ((60_000, 1), (400, 2)):  # the first comes although the second is a minute away
        connection = http.client.HTTPConnection(*rig.address, timeout=10)
        connection.request("GET", f"/v1/count/2?milliseconds={milliseconds}")
        response = connection.getresponse()
        for number in range(1, lines + 1):
            assert response.readline() == b'{"number":%d}\n' % number
        response.close()
        connection.close()


def test_a_large_body_and_a_large_answer_pass(changing: ContractRig) -> None:
    service = {"upstream": "contract", "max_body_bytes": 3_000_000}
    changing.envoy.apply(changing.render(services={"contract.v1.ContractService": service}))
    text = "x" * 2_500_000
    connection = http.client.HTTPConnection(*changing.address, timeout=10)
    connection.request("POST", "/v1/echo/a", body=json.dumps({"tags": [text]}))
    assert json.loads(connection.getresponse().read())["request"]["tags"] == [text]
    connection.close()


def test_the_log_has_a_line_for_each_request_and_no_secrets(rig: ContractRig) -> None:
    headers = {"x-api-key": contract.KEYS["web-key"], "x-request-id": "the-logged-one", "authorization": "Bearer hush"}
    rig.ask("/v1/with-key?unknown=hush", headers)
    rig.ask("/v1/with-key", headers)

    def lines() -> list[dict[str, object]]:
        whole, _, _ = rig.envoy.output.read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines() if "the-logged-one" in line]

    until(lambda: len(lines()) >= 2, "the lines are missing")
    refused, answered = lines()[-2:]
    assert (refused["status"], refused["path"], refused["method"]) == (400, "/v1/with-key", "GET")
    assert answered["consumer"] == "web"
    assert answered["route"] == "contract.v1.ContractService.WithKey"
    assert (answered["status"], answered["grpc_status"], answered["attempts"]) == (200, 0, 1)
    output = rig.envoy.output.read_text()
    assert "hush" not in output
    assert contract.KEYS["web-key"] not in output


def test_keys_are_not_shown_by_envoys_own_interface(rig: ContractRig) -> None:
    assert contract.KEYS["web-key"] not in rig.envoy.admin("GET", "/config_dump?include_eds")


@contextlib.contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """Where spans go by OTLP over HTTP, and what has come."""
    received: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = b""
            while size := int(self.rfile.readline(), 16):  # in chunks
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            received.append(body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1/traces", received
        finally:
            server.shutdown()
            thread.join()


def test_spans_go_to_the_collector_and_the_trace_goes_on_in_the_service() -> None:
    with collector() as (endpoint, received), contract_rig(tracing={"endpoint": endpoint}) as rig:
        sent = f"00-{TRACE}-00f067aa0ba902b7-01"
        answers = [rig.ask("/v1/metadata", {"traceparent": sent}) for _ in range(6)]
        passed = json.loads(answers[0].body)["metadata"]["traceparent"]
        assert passed.startswith(f"00-{TRACE}-")
        assert passed != sent
        until(lambda: any(bytes.fromhex(TRACE) in body for body in received), "no span of the trace has come")
        spans = b"".join(received)
        assert b"contract.v1.ContractService/Metadata" in spans


class Files:
    """PEM files that are replaced one by one, each at once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()

    def write(self, certificate: Certificate, roots: bytes) -> dict[str, str]:
        contents = {"certificate": certificate.chain, "key": certificate.key, "roots": roots}
        for name, content in contents.items():
            fresh = self.directory / f".{name}"
            fresh.write_bytes(content)
            fresh.rename(self.directory / name)
        return {name: str(self.directory / name) for name in contents}


def issue(authority: TestAuthority, service: str) -> Certificate:
    return authority.issue(Principal.service(authority.trust_domain, service))


def test_services_are_called_over_mtls_and_certificates_rotate_without_a_restart(tmp_path: Path) -> None:
    old, new = TestAuthority(), TestAuthority()
    edge, server = Files(tmp_path / "edge"), Files(tmp_path / "server")
    tls = UpstreamTls(**edge.write(issue(old, "edge"), old.roots))
    with (
        contract_server(**server.write(issue(old, "contract"), old.roots)) as port,
        running_envoy(port, upstream_tls=tls) as rig,
    ):
        assert rig.ask("/v1/echo/a").status == 200
        with contract_server(**Files(tmp_path / "next").write(issue(new, "contract"), new.roots)) as other:
            rig.envoy.apply(rig.render(local(other, "two")))
            assert rig.ask("/v1/echo/a").status == 503
            edge.write(issue(new, "edge"), new.roots)
            until(lambda: rig.ask("/v1/echo/a").status == 200, "the new certificate is not used")


def test_a_server_must_have_the_name_of_the_service(tmp_path: Path) -> None:
    authority = TestAuthority()
    tls = UpstreamTls(**Files(tmp_path / "edge").write(issue(authority, "edge"), authority.roots))
    files = Files(tmp_path / "server").write(issue(authority, "payments"), authority.roots)
    with contract_server(**files) as port, running_envoy(port, upstream_tls=tls) as rig:
        answer = rig.ask("/v1/echo/a")
        assert (answer.status, json.loads(answer.body)["message"]) == (503, "the service cannot be reached")


def test_callers_come_over_tls_if_the_edge_has_a_certificate(tmp_path: Path) -> None:
    authority = TestAuthority()
    files = Files(tmp_path / "edge").write(issue(authority, "edge"), authority.roots)
    tls = DownstreamTls(certificate=files["certificate"], key=files["key"])
    with contract_server() as port, running_envoy(port, downstream_tls=tls) as rig:
        context = ssl.create_default_context(cadata=authority.roots.decode())
        context.set_alpn_protocols(["http/1.1"])
        connection = http.client.HTTPSConnection(*rig.address, timeout=10, context=context)
        connection.sock = context.wrap_socket(
            socket.create_connection(rig.address), server_hostname="edge.mesh.internal"
        )
        connection.request("GET", "/v1/echo/a")
        assert connection.getresponse().status == 200
        connection.close()


@pytest.mark.parametrize("path", ["//v1//echo/a", "/v1/x/../echo/a", "/v1/./echo/a", "/v1/echo/%61"])
def test_paths_are_made_canonical_before_they_are_looked_up(path: str, rig: ContractRig) -> None:
    assert json.loads(rig.ask(path).body) == {"request": {"name": "a"}}


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/with%2dtoken", "/v1/./with-token", "//v1/with-token", "/v1/x/../with-token", "/v1/with-token/"),
        *("/V1/with-token", "/v1/with-token;a=b", "/v1/with-token%20", "/v1/with-token%00", "/v1%2fwith-token"),
        *("/v1/with-token?", "/v1/with-token#", "/v1/with-token:loud", "/contract.v1.ContractService/WithToken"),
        *("/v1/echo/../with-token", "/v1/echo/%2e%2e/with-token"),
    ],
)
@pytest.mark.parametrize("verb", ["GET", "POST", "HEAD", "OPTIONS", "get"])
def test_no_way_of_writing_a_path_opens_it(verb: str, path: str, rig: ContractRig) -> None:
    assert ask(rig.address, verb, path).status in {400, 401, 404, 405}


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /v1/echo/a HTTP/1.1\r\nhost: a\r\nx_under_score: 1\r\n\r\n",
        b"GET /v1/echo/a%5cb HTTP/1.1\r\nhost: a\r\n\r\n",
        b"GET /v1/echo/a%00 HTTP/1.1\r\nhost: a\r\n\r\n",
        b"GET /v1/echo/a HTTP/1.1\r\n\r\n",
        b"GET /v1/echo/a HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
def test_a_malformed_request_is_refused(request_: bytes, rig: ContractRig) -> None:
    with socket.create_connection(rig.address, timeout=10) as connection:
        connection.sendall(request_)
        with http.client.HTTPResponse(connection) as response:
            response.begin()
            assert (response.status, json.loads(response.read())["code"]) == (400, 3)


def test_origins_and_headers_of_any_spelling_are_taken_as_they_are(changing: ContractRig) -> None:
    odd = "it's )% \"\\ %REQ(x-a)% https://ü.example"
    changing.envoy.apply(changing.render(cors={"origins": [odd, "https://[::1]:8443"], "exposed_headers": ["x-')%"]}))
    answer = changing.ask("/v1/nowhere", {"origin": "https://[::1]:8443"})
    assert answer.headers["access-control-allow-origin"] == "https://[::1]:8443"
    assert answer.headers["access-control-expose-headers"] == "x-')%"
    assert "access-control-allow-origin" not in changing.ask("/v1/nowhere", {"origin": "https://"}).headers


def test_pages_of_all_origins_may_read_what_the_edge_answers(changing: ContractRig) -> None:
    changing.envoy.apply(changing.render(cors={"origins": ["*"]}))
    for path in ("/v1/nowhere", "/v1/echo/a"):
        assert changing.ask(path, {"origin": "https://any"}).headers["access-control-allow-origin"] == "https://any"
        assert "access-control-allow-origin" not in changing.ask(path).headers
