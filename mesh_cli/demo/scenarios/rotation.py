"""New certificates for everybody, and a new trust root, while orders go on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from mesh.v1 import authority_pb2 as pb

from mesh_cli.demo.promises import Promise, exactly
from mesh_cli.demo.stage import Stage

_PATIENCE = 45.0
_POLL = 0.1


class Rotation:
    """The three steps of a rotation, with `mesh ca rotate` in between; nothing restarts."""

    title = "Rotation of every certificate and of the trust root under load"

    async def play(self, stage: Stage) -> list[Promise]:
        """No order may fail, every workload must have a new certificate, and the old root must be gone."""
        customers, identities = stage.customers, stage.system.identities
        before = await identities.status()
        began = time.monotonic()
        async with customers.watched() as tally:
            await customers.finish(stage.profile.orders_between // 2)
            stage.view.tell("mesh ca rotate add: there is a new root, which everybody shall trust")
            await identities.rotate(pb.ROTATION_STEP_ADD)
            await _until(stage, lambda answer: not any(root.unconfirmed for root in answer.roots))
            stage.view.tell("mesh ca rotate overlap: everybody trusts it; certificates come from it now")
            await identities.rotate(pb.ROTATION_STEP_OVERLAP)
            await _until(stage, lambda answer: all(root.signing or not root.workloads for root in answer.roots))
            stage.view.tell("mesh ca rotate retire: everybody has a certificate of the new root; the old one goes")
            await identities.rotate(pb.ROTATION_STEP_RETIRE)
            elapsed = time.monotonic() - began
            await customers.finish(stage.profile.orders_between)
        after = await identities.status()
        old = {workload.id: workload.serial for workload in before.workloads}
        kept = [each for each in after.workloads if old.get(each.id) == each.serial]
        roots = {root.fingerprint for root in after.roots} & {root.fingerprint for root in before.roots}
        # Whoever joins from now on is told of the new root.
        await identities.make_tokens()
        await stage.operator.reconnect()
        return [
            exactly(
                "rotation.failed",
                "rotation of every certificate and of the trust root: failed orders",
                tally.failed + tally.repeated,
                0,
                f"of {tally.sent}",
                tally.explain() or f"{len(stage.system.instances)} instances, {elapsed:.1f} s{tally.rest()}",
            ),
            exactly(
                "rotation.certificates",
                "workloads that kept their old certificate",
                len(kept),
                0,
                f"of {len(after.workloads)}",
                ", ".join(each.spiffe_id for each in kept[:3]),
            ),
            exactly("rotation.root", "old roots that are still trusted", len(roots), 0, f"of {len(before.roots)}"),
        ]


async def _until(stage: Stage, holds: Callable[[pb.GetCertificateAuthorityResponse], bool]) -> None:
    async with asyncio.timeout(_PATIENCE):
        while not holds(await stage.system.identities.status()):
            await asyncio.sleep(_POLL)
