"""Spans with identities, from a mesh client to what an operator is shown, over a restart and a revocation."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import mesh_client
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from mesh_cli.app import app
from mesh_client.core import trace_delivery
from mesh_client.core.policy import Backoff
from mesh_client.trace_exporters import EXPORTERS
from mesh_client.tracing_setup import configure_tracing
from tests.ports import held_address

TIMEOUT = 20.0


@asynccontextmanager
async def running(address: str, enrolment: str, state: Path) -> AsyncIterator[ControlPlane]:
    options = ControlPlaneOptions(address=address, enrolment_address=enrolment, data_dir=state)
    plane = ControlPlane(options)
    await plane.start()
    try:
        yield plane
    finally:
        await plane.stop(0.1)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not condition():
            await asyncio.sleep(0.01)


async def mesh(*arguments: str) -> Result:
    """The command, in a thread, so that control planes in this loop can answer it."""
    result = await asyncio.to_thread(
        CliRunner(env={"MESH_INSECURE": "0", "COLUMNS": "160"}).invoke, app, list(arguments)
    )
    assert result.exit_code == 0, result.stderr
    return result


async def test_an_operator_sees_what_workloads_send_and_nothing_of_the_revoked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trace_delivery, "BACKOFF", Backoff(initial=0.05, max=0.2, multiplier=2.0))
    monkeypatch.setattr(trace_delivery, "_PAUSES", {})
    state, files = tmp_path / "state", tmp_path / "operator"
    provider = configure_tracing("claimed", asked=True, environ={"OTEL_BSP_SCHEDULE_DELAY": "10"}, install=False)
    assert provider is not None
    tracer, exporter = provider.get_tracer("test"), EXPORTERS[provider]
    with held_address() as address, held_address() as enrolment:
        async with AsyncExitStack() as stack:
            ask = ("--control-plane", address, "--operator", str(files))
            async with running(address, enrolment, state) as plane:
                authority = plane.authority
                assert authority is not None
                await authority.create_operator("alice", files)
                token = (await authority.create_token("orders", 600.0, 1, "test")).text
                client = mesh_client.connect(
                    address,
                    service="orders",
                    enrolment=enrolment,
                    token=token,
                    insecure=False,
                    cache_dir="",
                    tracer_provider=provider,
                )
                await stack.enter_async_context(client)
                tracer.start_span("before the restart").end()
                await until(lambda: exporter.counts.sent == 1)
                (trace,) = json.loads((await mesh("trace", "--json", *ask)).stdout)["traces"]
                assert (trace["service"], trace["name"]) == ("orders", "before the restart")
                shown = (await mesh("trace", trace["trace_id"][:8], "-a", *ask)).stdout
                assert "service.name=claimed" in shown
            tracer.start_span("while it is down").end()
            async with running(address, enrolment, state) as plane:
                await until(lambda: exporter.counts.sent == 2)
                listed = (await mesh("trace", "--service", "orders", *ask)).stdout
                assert "while it is down" in listed
                assert "before the restart" not in listed
                assert plane.authority is not None
                await plane.authority.revoke(service="orders")
                tracer.start_span("after the revocation").end()
                await until(lambda: exporter.counts.dropped == 1)
                assert "does not take spans, which are dropped: " in caplog.text
                assert plane.traces.store is not None
                assert plane.traces.store.spans == 1
                await stack.aclose()
    provider.shutdown()
