"""What has begun can be ended at any moment: a mesh client, a server, whatever it is about to do then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import pytest

import mesh_client
from mesh_client.mesh import Mesh
from mesh_client.tasks import AGAIN
from tests.control_plane.test_secure_server import World, running
from tests.integration.orders import make_server

ROUNDS = 60


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running(tmp_path) as world:
        yield world


async def token(world: World, service: str) -> str:
    assert world.plane.authority is not None
    return (await world.plane.authority.create_token(service, 600.0, 2 * ROUNDS, "test")).text


def client(world: World, token: str, identity_dir: Path | None) -> Mesh:
    return mesh_client.connect(
        world.plane.address,
        service="web",
        enrolment=world.plane.enrolment_address,
        token=token,
        identity_dir=identity_dir or "",
        cache_dir="",
        insecure=False,
        load_reports=0.1,
    )


@pytest.mark.parametrize("known", [True, False], ids=["with a certificate", "without"])
async def test_a_client(world: World, tmp_path: Path, known: bool) -> None:
    rng, joins = Random(1), await token(world, "web")
    directory = tmp_path / "identity" if known else None
    async with client(world, joins, directory):
        pass
    for _ in range(ROUNDS):
        async with asyncio.timeout(AGAIN):
            mesh = client(world, joins, directory)
            entering = asyncio.ensure_future(mesh.__aenter__())
            await asyncio.sleep(rng.uniform(0.0, 0.06))
            entered = entering.done()
            if not entered:
                entering.cancel()
                await asyncio.wait({entering})
            if entering.done() and not entering.cancelled():
                entering.result()
                await mesh.__aexit__(None, None, None)


async def test_a_server(world: World, tmp_path: Path) -> None:
    rng, joins = Random(2), await token(world, "orders")
    for _ in range(ROUNDS // 3):
        made = make_server(
            control_plane=world.plane.address,
            enrolment=world.plane.enrolment_address,
            token=joins,
            identity_dir=tmp_path / "orders",
            insecure=False,
        )
        await made.start()
        await asyncio.sleep(rng.uniform(0.0, 0.1))
        async with asyncio.timeout(AGAIN):
            await made.stop(0.0)
