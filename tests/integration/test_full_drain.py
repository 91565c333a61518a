"""`mesh drain` on a real Consul, with two control planes and under load: no call fails, and none goes astray."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from tests.integration.consul_cluster import ConsulCluster
from tests.integration.system import Load, System, follows, ids, mesh_command


@pytest.mark.timeout(120)
async def test_an_instance_is_taken_out_under_load_on_every_control_plane_and_over_a_restart(
    tmp_path: Path, nobody: str
) -> None:
    async with ConsulCluster.dev(tmp_path) as consul, System(tmp_path) as system:
        options: dict[str, Any] = {
            "registry": consul.registry,
            "insecure": True,
            "debounce_quiet": 0.005,
            "debounce_maximum": 0.05,
        }
        first = await system.run_control_plane(**options, address=nobody, data_dir=tmp_path / "one")
        second = await system.run_control_plane(**options, data_dir=tmp_path / "two")
        both = f"{first.address},{second.address}"
        await system.start_orders(*ids(1, 2), registry=consul.registry, control_plane=first.address)
        mesh, other = await system.connect(first.address), await system.connect(second.address)
        await asyncio.gather(follows(mesh, *ids(1, 2)), follows(other, *ids(1, 2)))
        async with Load(mesh) as load, Load(other) as load_of_other:
            shown = await mesh_command("drain", "orders", "orders-1", control_plane=both)
            assert shown.startswith("orders-1: drained; ")
            for each in (load, load_of_other):
                await each.answered_only_by("orders-2")
            assert "drained by somebody" in await mesh_command("endpoints", "orders", control_plane=second.address)
            await mesh_command("drain", "orders", "orders-2", control_plane=both, exit_code=1)

            await first.stop(0.1)
            again = ControlPlane(ControlPlaneOptions(**options, address=first.address, data_dir=tmp_path / "one"))
            await again.start()
            try:
                await follows(mesh, "orders-2")
                await load.answered_only_by("orders-2")
                shown = await mesh_command("drain", "orders", "--undo", control_plane=both)
                assert shown == "orders-1: called again\n"
                for each in (load, load_of_other):
                    await each.answered_by("orders-1", "orders-2")
            finally:
                await again.stop(0.0)
