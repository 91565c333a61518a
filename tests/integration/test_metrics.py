"""Metrics of a real process, scraped over a socket and read by Prometheus's own parsers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import prometheus_client
import prometheus_client.openmetrics.parser
import prometheus_client.parser
import pytest

import mesh_client
from mesh_client.core.errors import ConfigError
from mesh_client.core.process_metrics import FAMILIES
from mesh_client.metrics import MeshCollector
from tests.integration.consul_cluster import REPOSITORY
from tests.integration.echo_service import EchoService
from tests.integration.mesh_rig import Rig, open_rig, until
from tests.integration.orders import ORDER, Orders, running
from tests.integration.system import clean_environment
from tests.integration.test_load_reports import ECHO, call, eventually

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path) as rig:
        yield rig


async def http(address: str, request: bytes) -> tuple[str, dict[str, str], bytes]:
    """Status line, headers and body that a request is answered with."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    try:
        writer.write(request)
        answer = await reader.read()
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    line, *headers = head.decode().split("\r\n")
    return line, dict(header.split(": ", 1) for header in headers), body


async def scrape(address: str, accept: str = "text/plain") -> tuple[str, str]:
    """What Prometheus gets, with its content type."""
    line, headers, body = await http(
        address, f"GET /metrics HTTP/1.1\r\nHost: {address}\r\nAccept: {accept}\r\n\r\n".encode()
    )
    assert line == "HTTP/1.1 200 OK"
    assert len(body) == int(headers["Content-Length"])
    return body.decode(), headers["Content-Type"]


def parsed(text: str) -> dict[tuple[str, Any], float]:
    """Samples by name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in prometheus_client.parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return f"grpc_mesh_{name}", frozenset(labels.items())


async def test_what_a_client_calls_can_be_scraped(rig: Rig) -> None:
    await rig.serve("echo", "e1", EchoService().add_to)
    mesh = await rig.mesh(service="web", node_id="web-1", load_reports=0.1)
    channel = await rig.channel(mesh, "echo", {"e1"})
    address = await mesh.serve_metrics("127.0.0.1:0")
    for _ in range(5):
        await call(channel)
    with pytest.raises(grpc.aio.AioRpcError):
        await call(channel, b"fail")
    text, content_type = await scrape(address)
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    found = parsed(text)
    assert found[key("client_calls_total", service="echo", method=ECHO, code="OK")] == 5
    assert found[key("client_calls_total", service="echo", method=ECHO, code="NOT_FOUND")] == 1
    assert found[key("client_attempts_total", service="echo", endpoint="e1", code="OK")] == 5
    assert found[key("client_call_duration_seconds_count", service="echo", method=ECHO)] == 6
    assert found[key("client_call_duration_seconds_bucket", service="echo", method=ECHO, le="+Inf")] == 6
    assert 0 < found[key("client_call_duration_seconds_sum", service="echo", method=ECHO)] < 5
    assert found[key("client_breaker_state", service="echo", state="closed")] == 1
    assert found[key("client_control_plane_connected", node="web-1")] == 1
    assert found[key("client_snapshot_age_seconds", node="web-1")] == 0


async def test_openmetrics_is_spoken_with_those_who_ask_for_it(rig: Rig) -> None:
    await rig.serve("echo", "e1", EchoService().add_to)
    mesh = await rig.mesh(service="web")
    channel = await rig.channel(mesh, "echo", {"e1"})
    address = await mesh.serve_metrics("127.0.0.1:0")
    await call(channel)
    text, content_type = await scrape(address, OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
    parse: Any = prometheus_client.openmetrics.parser.text_string_to_metric_families
    families = {family.name: family for family in parse(text)}
    assert families.keys() == {family.name.removesuffix("_total") for family in FAMILIES}
    (sample,) = families["grpc_mesh_client_calls"].samples
    assert (sample.name, sample.value) == ("grpc_mesh_client_calls_total", 1)
    assert text.endswith("# EOF\n")
    odd, _ = await scrape(address, "application/openmetrics-text;version=none.at.all")
    assert odd


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "HTTP/1.1 404 Not Found"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", "HTTP/1.1 405 Method Not Allowed"),
        (b"\x16\x03\x01 hello\r\n\r\n", "HTTP/1.1 400 Bad Request"),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 20_000 + b"\r\n\r\n", "HTTP/1.1 400 Bad Request"),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", "HTTP/1.1 200 OK"),
    ],
)
async def test_other_requests_are_answered_as_http_says(request_: bytes, status: str, rig: Rig) -> None:
    mesh = await rig.mesh()
    address = await mesh.serve_metrics("127.0.0.1:0")
    line, headers, body = await http(address, request_)
    assert line == status
    assert headers["Connection"] == "close"
    assert (body == b"") == (request_.startswith(b"HEAD"))


async def test_who_says_nothing_and_who_goes_away_disturbs_nobody(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh_client.metrics_server.TIMEOUT", 2.0)
    monkeypatch.setattr("mesh_client.metrics_server.MAX_CONNECTIONS", 3)
    mesh = await rig.mesh()
    address = await mesh.serve_metrics("127.0.0.1:0")
    host, _, port = address.rpartition(":")
    silent = [await asyncio.open_connection(host, int(port)) for _ in range(3)]
    await eventually(lambda: len(mesh._metrics_servers[0]._connections) == 3)
    line = b"?"
    with contextlib.suppress(ConnectionError):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
        line = await reader.read()
        writer.close()
    assert line in (b"", b"?")
    for reader, writer in silent:
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
    assert (await scrape(address))[0]


async def test_an_address_that_cannot_be_used_is_said(rig: Rig) -> None:
    mesh = await rig.mesh()
    address = await mesh.serve_metrics("127.0.0.1:0")
    with pytest.raises(ConfigError, match="cannot listen on"):
        await mesh.serve_metrics(address)
    with pytest.raises(ConfigError, match="expected host:port"):
        await mesh.serve_metrics("9464")


async def test_a_broken_collector_is_an_error_and_not_an_empty_answer(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mesh = await rig.mesh()
    address = await mesh.serve_metrics("127.0.0.1:0")
    monkeypatch.setattr("mesh_client.mesh.Mesh.add_metrics", lambda *_: 1 / 0)
    line, _, body = await http(address, b"GET /metrics HTTP/1.1\r\n\r\n")
    assert line == "HTTP/1.1 500 Internal Server Error"
    assert b"the log says why" in body
    assert "ZeroDivisionError" in caplog.text


async def test_the_environment_asks_for_one_endpoint_of_all_clients_and_servers(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setenv("MESH_METRICS", "127.0.0.1:0")
    async with running(Orders("one"), control_plane=rig.plane.address, instance_id="orders-1") as server:
        mesh = await rig.mesh(service="web")
        mesh.channel("orders")
        await until(mesh, lambda: any(state.endpoints for state in mesh.state().services))
        assert caplog.text.count("metrics are at") == 1
        address = caplog.text.partition("metrics are at http://")[2].partition("/")[0]
        await call(mesh.channel("orders"), ORDER.SerializeToString(), "/shop.v1.OrderService/GetOrder")
        await eventually(lambda: server._admission.in_flight == 0)
        found = parsed((await scrape(address))[0])
        method = "/shop.v1.OrderService/GetOrder"
        where = {"service": "orders", "endpoint": "orders-1"}
        assert found[key("client_calls_total", service="orders", method=method, code="OK")] == 1
        assert found[key("server_calls_total", **where, method=method, code="OK", caller="")] == 1
        assert found[key("server_call_duration_seconds_count", **where, method=method)] == 1
        assert found[key("server_serving", **where)] == 1
        assert found[key("server_in_flight", **where)] == 0
        assert found[key("server_refused_calls_total", **where, why="rate_limit")] == 0
    await rig.stack.aclose()
    with pytest.raises(OSError, match="Connect call failed"):
        await scrape(address)


async def test_an_endpoint_that_the_environment_asks_for_and_cannot_be_had_fails_nobody(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = await rig.mesh()
    monkeypatch.setenv("MESH_METRICS", await first.serve_metrics("127.0.0.1:0"))
    async with mesh_client.connect(rig.plane.address, cache_dir=""):
        assert "no metrics are served" in caplog.text


async def test_a_process_can_add_them_to_what_it_exposes_already(rig: Rig) -> None:
    mesh = await rig.mesh(node_id="web-1")
    registry = prometheus_client.CollectorRegistry()
    registry.register(MeshCollector(clients=[mesh], servers=[]))
    text = await asyncio.to_thread(prometheus_client.generate_latest, registry)
    await until(mesh, lambda: mesh.state().in_sync)
    assert key("client_control_plane_connected", node="web-1") in parsed(text.decode())


def test_without_the_extra_the_message_says_what_to_install() -> None:
    program = """
import asyncio, sys
sys.modules["prometheus_client"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "prometheus_client" else find(name, *rest)
from mesh_client.metrics_server import MetricsServer
try:
    asyncio.run(MetricsServer().start("127.0.0.1:0"))
except Exception as error:
    print(error)
"""
    shown = subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY, capture_output=True, text=True)
    assert "pip install" not in shown.stdout
    assert "install 'grpc-mesh[metrics]'" in shown.stdout


async def test_a_service_in_a_process_of_its_own_is_scraped(rig: Rig, tmp_path: Path) -> None:
    log = tmp_path / "log"
    environment = {
        **clean_environment(),
        "MESH_METRICS": "127.0.0.1:0",
        "MESH_CACHE_DIR": str(tmp_path),
    }
    program = (
        "import asyncio, logging, json, sys\n"
        "logging.basicConfig(level='INFO')\n"
        "from tests.integration.orders import Orders, make_server\n"
        "async def main():\n"
        f"    server = make_server(Orders('one'), control_plane={rig.plane.address!r}, instance_id='orders-1')\n"
        "    return await server.serve()\n"
        "raise SystemExit(asyncio.run(main()))\n"
    )
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, env=environment, cwd=REPOSITORY, stdout=output, stderr=output
        )
    try:
        await eventually(lambda: "metrics are at http://" in log.read_text(), log.read_text)
        address = log.read_text().partition("metrics are at http://")[2].partition("/")[0]
        mesh = await rig.mesh(service="web")
        mesh.channel("orders")
        await until(mesh, lambda: any(state.endpoints for state in mesh.state().services))
        method = "/shop.v1.OrderService/GetOrder"
        for _ in range(3):
            await call(mesh.channel("orders"), ORDER.SerializeToString(), method)
        sample = key("server_calls_total", service="orders", endpoint="orders-1", method=method, code="OK", caller="")

        async def counted() -> bool:
            return parsed((await scrape(address))[0]).get(sample) == 3

        await eventually(counted)
    finally:
        os.kill(process.pid, signal.SIGTERM)
        assert await process.wait() == 0, log.read_text()
