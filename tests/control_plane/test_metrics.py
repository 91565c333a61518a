"""Metrics of a control plane, scraped over a socket and read by Prometheus's own parsers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import grpc.aio
import prometheus_client.openmetrics.parser
import prometheus_client.parser
import pytest
from mesh.v1 import admin_pb2, admin_pb2_grpc
from mesh.v1.discovery_pb2 import Rejection

from control_plane.events import SourceLost
from control_plane.metrics import FAMILIES
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from mesh_client.core.errors import ConfigError
from mesh_client.core.metric import Kind
from tests.control_plane.test_secure_server import running as running_securely
from tests.control_plane.worlds import ENDPOINTS, Request, running
from tests.ports import held_address

PREFIX = "grpc_mesh_control_plane_"


@asynccontextmanager
async def scraped(address: str, accept: str = "") -> AsyncIterator[tuple[str, str]]:
    headers = {"Accept": accept} if accept else {}
    async with aiohttp.ClientSession() as session, session.get(f"http://{address}/metrics", headers=headers) as answer:
        assert answer.status == 200
        yield await answer.text(), answer.headers["Content-Type"]


async def samples(address: str) -> dict[tuple[str, Any], float]:
    async with scraped(address) as (text, _):
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in prometheus_client.parser.text_string_to_metric_families(text)
            for sample in family.samples
        }


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return PREFIX + name, frozenset(labels.items())


def test_names_follow_the_conventions() -> None:
    for family in FAMILIES:
        assert family.name.startswith(PREFIX)
        assert family.name.endswith("_total") == (family.kind is Kind.COUNTER)
        assert family.help.endswith(".")


def options(**more: Any) -> ControlPlaneOptions:
    given = {"insecure": True, "debounce_quiet": 0.001, "debounce_maximum": 0.01, "metrics_address": "127.0.0.1:0"}
    return ControlPlaneOptions(**{**given, **more})


async def until(address: str, name: tuple[str, Any], value: float) -> dict[tuple[str, Any], float]:
    """The samples once one of them is as it should be: an acknowledgement is on its way when a client has sent it."""
    async with asyncio.timeout(30.0):
        while (found := await samples(address)).get(name) != value:
            await asyncio.sleep(0.02)
    return found


async def test_what_a_control_plane_does_can_be_scraped() -> None:
    async with running(options(control_plane_id="plane-1")) as world:
        address = world.plane.metrics_address
        await world.source.lists("orders", "a", "b")
        async with world.client() as client:
            await client.subscribe("orders")
            await client.follow("orders", "a", "b")
            before = await until(address, key("lagging_subscriptions", why="waiting"), 0)
            pushes = before[key("push_latency_seconds_count")]
            await world.source.lists("orders", "a", "b", "c")
            await client.follow("orders", "a", "b", "c")
            found = await until(address, key("push_latency_seconds_count"), pushes + 1)
            assert 0 < found[key("push_latency_seconds_sum")] < 5
            assert found[key("info", control_plane="plane-1", trust_domain="")] == 1
            assert found[key("streams", kind="discovery")] == 1
            assert found[key("streams", kind="load_reports")] == 0
            assert found[key("services")] == 1
            assert found[key("endpoints", health="healthy")] == 3
            assert found[key("source_up", source="hand")] == 1
            assert found[key("source_lag_seconds", source="hand")] == 0
            assert found[key("held_endpoints")] == 0
            assert found[key("snapshots_total")] > before[key("snapshots_total")] > 0
            assert found[key("responses_total")] > before[key("responses_total")]
            assert time.time() - found[key("start_time_seconds")] < 3600
            assert found[key("reporting_processes", state="connected")] == 0


async def test_rejections_and_changes_that_nobody_has_answered_are_counted() -> None:
    async with running(options()) as world:
        address = world.plane.metrics_address
        await world.source.lists("orders", "a")
        async with world.client() as client:
            await client.subscribe("orders", types=(ENDPOINTS,))
            await client.follow("orders", "a")
            before = await until(address, key("lagging_subscriptions", why="waiting"), 0)
            pushes = before[key("push_latency_seconds_count")]
            await world.source.lists("orders", "a", "b")
            response = await client.read()
            found = await until(address, key("lagging_subscriptions", why="waiting"), 1)
            assert found[key("rejections_total")] == 0
            await world.source.lists("orders", "a", "b", "c")
            await client.send(
                Request(type=ENDPOINTS, response_nonce=response.nonce, error=Rejection(message="no, thank you"))
            )
            response = await client.read()
            found = await until(address, key("rejections_total"), 1)
            assert found[key("push_latency_seconds_count")] == pushes + 1
            await client.acknowledge(response)
            await until(address, key("push_latency_seconds_count"), pushes + 2)


async def test_a_lost_source_and_what_is_wrong_are_shown() -> None:
    async with running(options()) as world:
        address = world.plane.metrics_address
        await world.source.lists("orders", *"abcdefgh")
        await until(address, key("endpoints", health="healthy"), 8)
        await world.source.lists("orders", "a")
        await until(address, key("held_endpoints"), 7)
        await world.source.emit(SourceLost("hand", "no route to host"))
        found = await until(address, key("source_up", source="hand"), 0)
        assert found[key("source_lag_seconds", source="hand")] > 0


async def test_certificates_and_refusals_are_counted(tmp_path: Path) -> None:
    async with running_securely(tmp_path, metrics_address="127.0.0.1:0") as world:
        address = world.plane.metrics_address
        channel, _ = await world.workload("orders")
        with pytest.raises(grpc.aio.AioRpcError):
            await admin_pb2_grpc.AdminServiceStub(channel).GetStatus(admin_pb2.GetStatusRequest())
        found = await samples(address)
        assert found[key("certificates_issued_total", kind="issued")] == 1
        assert found[key("certificates_issued_total", kind="renewed")] == 0
        assert found[key("issuer_expiry_timestamp_seconds")] > time.time() + 86_400
        assert found[key("denied_requests_total")] == 1


async def test_openmetrics_is_spoken_with_those_who_ask_for_it() -> None:
    async with running(options()) as world:
        async with scraped(world.plane.metrics_address, "application/openmetrics-text;version=1.0.0") as (text, kind):
            parse: Any = prometheus_client.openmetrics.parser.text_string_to_metric_families
            assert {family.name for family in parse(text)} == {
                family.name.removesuffix("_total") for family in FAMILIES
            }
        assert kind.startswith("application/openmetrics-text; version=1.0.0")
        async with scraped(world.plane.metrics_address, "application/openmetrics-text;version=none.at.all") as (
            _,
            kind,
        ):
            assert kind.startswith("text/plain")


async def test_an_address_that_cannot_be_used_is_a_clear_error_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with held_address() as address:
        host, _, port = address.rpartition(":")
        taken = await asyncio.start_server(lambda *_: None, host, int(port))
        try:
            plane = ControlPlane(options(metrics_address=address, data_dir=tmp_path))
            with pytest.raises(ConfigError, match="metrics_address: cannot listen on"):
                await plane.start()
            again = ControlPlane(options(data_dir=tmp_path))
            await again.start()
            await again.stop(0)
        finally:
            taken.close()
            await taken.wait_closed()
    with pytest.raises(ConfigError, match="metrics_address: '9464' is not allowed"):
        options(metrics_address="9464")


async def test_without_an_address_no_metrics_are_served() -> None:
    async with running() as world:
        assert world.plane.metrics_address == ""
